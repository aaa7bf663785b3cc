"""Set up before any test: Triton's interpreter, eight JAX devices, hypothesis without a deadline."""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings

from mergekit_cl import registry

# under CI the same examples each time: a rare failure should not stop a change that has nothing to do with it
settings.register_profile("default", deadline=None, max_examples=50, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """Forget the methods that a test registers."""
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


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
