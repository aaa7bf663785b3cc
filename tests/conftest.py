"""Set up before any test: how Triton's kernels run, eight JAX devices, hypothesis without a deadline.

The kernels are compiled where there is a GPU, and interpreted elsewhere; ``TRITON_INTERPRET`` says otherwise.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from mergekit_cl import registry
from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import interpreted


def _has_gpu() -> bool:
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return False  # without importing torch
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


if "TRITON_INTERPRET" not in os.environ:  # which is read when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "0" if _has_gpu() else "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# under CI the same examples each time: a rare failure should not stop a change that has nothing to do with it
settings.register_profile("default", deadline=None, max_examples=50, print_blob=True, derandomize="CI" in os.environ)
settings.register_profile("gpu", settings.get_profile("default"), max_examples=10)  # most of which compile a kernel
settings.load_profile("default" if interpreted() else "gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip tests that give arrays of the CPU to the Triton kernels where those were compiled for a GPU."""
    try:
        return (yield)
    except BackendError as error:
        if interpreted() or "TRITON_INTERPRET" not in str(error) or item.get_closest_marker("gpu"):
            raise
        # only where there is a GPU, whose compiled kernels cannot take arrays of the CPU: without one, as in CI, the test runs
        pytest.skip("needs Triton's interpreter, but there is a GPU: set TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """Forget the methods that a test registers."""
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return what notes down, from its call on, by which of some methods the host looks at a tensor: on a GPU it waits."""

    def note(*names: str) -> list[str]:
        import torch

        seen: list[str] = []

        def spy(name: str) -> Callable[..., object]:
            whole = getattr(torch.Tensor, name)

            def spied(*given: object, **named: object) -> object:
                seen.append(name)
                return whole(*given, **named)

            return spied

        for name in names:
            monkeypatch.setattr(torch.Tensor, name, spy(name))
        return seen

    return note


@pytest.fixture(autouse=True)
def _numpy_in_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["np"] = np
    try:
        import torch
    except ImportError:
        return
    doctest_namespace["torch"] = torch


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; programs that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
