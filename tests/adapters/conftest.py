"""Tests on several processes: a file of tests names its checks, and each process carries them out, one after the other.

Run as a program, which the fixture does, this file imports the file of checks once and forks the processes, so that one import
serves all of them. A check that fails on one process ends the run; its name and the traceback are in the failure of the test.
"""

import datetime
import gc
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT = datetime.timedelta(seconds=60)
"""How long a process waits for the others."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Keep torch to one thread, and what was imported out of the garbage collection, which some trainers begin with.

    With networks as small as those of the tests, threads wait for one another.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def on_processes(tmp_path: Path) -> Callable[[str, int], None]:
    """Carry out the checks of a file on a number of processes.

    The file has ``CHECKS``, functions that take a folder, each with the numbers of processes that it is for, and may have
    ``prepare``, a function that is called before the processes are forked.
    """

    def launch(file: str, world: int) -> None:
        command = [sys.executable, __file__, file, str(world), str(tmp_path)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}  # the ranks are on the CPU
        ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
        outcomes = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
        assert len(outcomes) == world, ended.stdout + ended.stderr
        failed = [outcome["failure"] for outcome in outcomes if outcome["failure"]]
        assert not failed, "\n".join([ended.stdout[-2000:], *failed])
        assert ended.returncode == 0, ended.stderr
        assert all(outcome["done"] == outcome["planned"] for outcome in outcomes)

    return launch


def _process(checks: dict[Callable[[Path], None], tuple[int, ...]], rank: int, world: int, folder: Path) -> None:
    """Carry out the checks, all processes in step; write down what was done, and what failed."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=LIMIT)
    chosen = [check for check, worlds in checks.items() if world in worlds]
    outcome: dict[str, Any] = {"planned": [check.__name__ for check in chosen], "done": [], "failure": ""}
    for check in chosen:
        started = time.process_time()
        try:
            check(folder)
            outcome["done"].append(check.__name__)
        except BaseException:
            outcome["failure"] = f"{check.__name__}, process {rank} of {world}:\n{traceback.format_exc()}"
        store.set(f"{check.__name__} {rank}", outcome["failure"])
        keys = [f"{check.__name__} {other}" for other in range(world)]
        store.wait(keys, LIMIT)
        if not rank:
            print(f"{check.__name__}: {time.process_time() - started:.1f} s of one core", flush=True)
        if any(store.get(key) for key in keys):
            break
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


def _launch(file: str, world: int, folder: Path) -> int:
    specification = importlib.util.spec_from_file_location("checks", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["checks"] = module
    specification.loader.exec_module(module)
    getattr(module, "prepare", lambda: None)()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(module.CHECKS, rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
