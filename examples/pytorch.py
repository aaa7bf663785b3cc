"""Learn to read digits the right way up, then turned by 90 degrees, without forgetting the first: SFA in a PyTorch loop."""

import torch

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.demo import network, rotated_digits, score

STEPS = 150

torch.manual_seed(0)
torch.set_num_threads(1)
tasks = rotated_digits(seed=0)[:2]
model = network(seed=0)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
sfa = None

for number, task in enumerate(tasks):
    if number:  # there is something to forget from the second task on
        sfa = SFA(model, beta=0.5, p=0.25, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(task.train_images), (64,))
        loss = torch.nn.functional.cross_entropy(model(task.train_images[batch]), task.train_digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sfa is not None:
            sfa.step()
    print(f"after task {number + 1}:", *(f"task {i + 1} {accuracy:.3f}" for i, accuracy in enumerate(score(model, tasks))))
