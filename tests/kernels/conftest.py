"""What tests of kernels share: memory where the kernels run, and what the compilers make of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from filelock import FileLock

from mergekit_cl.kernels import Table, address, interpreted

_ALIGNED = 64  # bytes
_GUARD = 4096  # bytes in front of and behind each buffer
_NAN = 0xFF  # each byte of a NaN of any floating dtype

TARGETS = ("sm_90", "sm_80", "gfx942")
Found: TypeAlias = list[dict[str, Any]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Compile the kernels that a file of tests, run as a program, launches; return what was found (see compiling.py).

    The processes of one run of pytest share what one of them has compiled.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def compiled(file: str) -> Found:
        folder = root / Path(file).stem
        folder.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / "cache")
        with FileLock(folder / "lock"):
            if not (folder / "done").exists():
                commands = [[sys.executable, "-W", "error", file, target, folder / f"{target}.json"] for target in TARGETS]
                processes = [subprocess.Popen(command, env=environment) for command in commands]
                assert [process.wait() for process in processes] == [0] * len(TARGETS)
                (folder / "done").touch()
        return [each for path in sorted(folder.glob("*.json")) for each in json.loads(path.read_text())]

    return compiled


class OnDevice:
    """A backend that is given tables of NumPy arrays, and works on copies of their memory where the kernels run.

    Each array that spans are parts of is copied between guards of NaN, to an address as far behind a multiple of 64 bytes: so
    spans that share memory, or are not aligned, do and are not there either. What was written is copied back, and the guards
    have to be as they were.
    """

    def __init__(self, module: Any, device: str, tensors: bool) -> None:
        self._module, self._device, self._tensors = module, device, tensors

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(table: Table, *arguments: Any) -> Any:
            copies = _Copies(self._device, self._tensors)
            result = getattr(self._module, name)(Table([[copies.of(span) for span in row] for row in table.spans]), *arguments)
            copies.back()
            return result

        return call


class _Copies:
    """Copies of arrays, each in a buffer of its own."""

    def __init__(self, device: str, tensors: bool) -> None:
        self._device, self._tensors = device, tensors
        self._made: dict[int, tuple[Any, Any, int]] = {}  # the array's bytes, the buffer, and where in it the copy begins

    def of(self, span: Any) -> Any:
        import torch

        whole = span
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if id(whole) not in self._made:
            data = whole.reshape(-1).view(np.uint8)
            buffer = torch.full((2 * _GUARD + _ALIGNED + len(data),), _NAN, dtype=torch.uint8, device=self._device)
            first = _GUARD + (address(whole) - buffer.data_ptr() - _GUARD) % _ALIGNED
            buffer[first : first + len(data)] = torch.from_numpy(data.copy())
            self._made[id(whole)] = data, buffer, first
        data, buffer, first = self._made[id(whole)]
        start = first + address(span) - address(whole)
        part = buffer[start : start + span.nbytes]
        return part.view(getattr(torch, span.dtype.name)) if self._tensors else part.numpy().view(span.dtype)

    def back(self) -> None:
        for data, buffer, first in self._made.values():
            host = buffer.cpu().numpy()
            assert (host[:first] == _NAN).all()
            assert (host[first + len(data) :] == _NAN).all()
            if data.flags.writeable:
                data[:] = host[first : first + len(data)]


@pytest.fixture(scope="session")
def kernels() -> OnDevice:
    """The Triton backend: compiled, in a GPU's memory, or interpreted."""
    from mergekit_cl.kernels import triton

    return OnDevice(triton, "cpu" if interpreted() else "cuda", tensors=not interpreted())


@pytest.fixture(scope="session")
def in_torch() -> OnDevice:
    """What the Triton backend has torch do, in a GPU's memory if there is one."""
    from mergekit_cl.kernels.triton import tiles

    return OnDevice(tiles, "cpu" if interpreted() else "cuda", tensors=True)
