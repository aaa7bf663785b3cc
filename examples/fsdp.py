"""Learn to read digits the right way up, then turned, on processes that share one model: SFA with FSDP's fully_shard.

``torchrun --nproc-per-node 2 examples/fsdp.py``, or without torchrun: it starts two processes by itself then.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.demo import network, rotated_digits, score

STEPS = 100
TASKS = rotated_digits(seed=0)[:2]


def train(rank: int = 0, meeting_point: str = "env://", processes: int = -1) -> None:
    """Train one process's part of the model on its own batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=processes)
    model = fully_shard(network(seed=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    sfa = None
    for number, task in enumerate(TASKS):
        if number:  # there is something to forget from the second task on; every process averages its own shards
            sfa = SFA(model, beta=0.5, p=0.25, total_steps=STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(task.train_images), (64,))
            loss = torch.nn.functional.cross_entropy(model(task.train_images[batch]), task.train_digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sfa is not None:
                sfa.step()
        found = score(model, TASKS)
        if dist.get_rank() == 0:
            print(f"after task {number + 1}:", *(f"task {i + 1} {accuracy:.3f}" for i, accuracy in enumerate(found)))
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        train(int(os.environ["RANK"]), processes=int(os.environ["WORLD_SIZE"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = f"file://{folder}/meeting", 2
            torch.multiprocessing.start_processes(train, arguments, nprocs=2, start_method="fork")
