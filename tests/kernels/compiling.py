"""Lets launches compile kernels for a GPU that is not there; for programs that tests start in this folder."""

import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def compile_instead(
    backend: Any,
    kernels: Iterable[tuple[Any, str]],
    found: list[dict[str, Any]],
    targets: Mapping[str, tuple[str, int | str, int]],
    binary: Path,
    facts: Callable[[Any, tuple[Any, ...], dict[str, Any]], dict[str, Any]],
) -> None:
    """Replace the kernels (module, name) of the backend by what compiles them for the target that the last of ``found`` names.

    That entry gets the assembler, and the ``facts`` about the kernel, its arguments and its options. ``binary`` is a file.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    class Driver:
        """As much of a GPU's driver as a kernel that is only compiled asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget(*targets[found[-1]["target"]])

        def get_current_device(self) -> str:
            return str(found[-1]["target"])

        def get_current_stream(self, device: str) -> int:
            return 0

    class Compiled:
        """A kernel that compiles what it would launch."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                kernel = self.kernel.warmup(*arguments, grid=grid, **options)
                found[-1] |= facts(kernel, arguments, options)
                if "cubin" in kernel.asm:
                    binary.write_bytes(kernel.asm["cubin"])
                    dump = subprocess.run([cuobjdump, "-res-usage", "-sass", binary], check=True, capture_output=True)
                    found[-1] |= {"ptx": kernel.asm["ptx"], "dump": dump.stdout.decode()}
                else:
                    found[-1]["gcn"] = kernel.asm["amdgcn"]

            return launch

    backend.launch.device_of = lambda table: torch.device("cpu")
    triton.runtime.driver.set_active(Driver())
    for module, name in kernels:
        setattr(module, name, Compiled(getattr(module, name)))
