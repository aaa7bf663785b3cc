"""What is installed, what an import loads, and which names stay other people's."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"mergekit_cl": "mergekit_cl", "mergekit_cl.kernels": "kernels", "mergekit_cl.adapters": "adapters"}
HEAVY = {
    "torch",
    "jax",
    "flax",
    "triton",
    "numba",
    "llvmlite",
    "transformers",
    "lightning",
    "typer",
    "rich",
    "matplotlib",
}


def modules_in_the_tree() -> set[str]:
    """Paths of all modules as a wheel has them."""
    found = set()
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.relative_to(ROOT / folder)
            if folder != "mergekit_cl" or inside.parts[0] not in ("kernels", "adapters"):  # the symlinks
                found.add(f"{package.replace('.', '/')}/{inside.as_posix()}")
    return found


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


def test_the_wheel_has_every_module(tmp_path: Path) -> None:
    """A sub-package missing from pyproject.toml works in an editable install, and is absent from the wheel."""
    clean = tmp_path / "checkout"  # a build folder in the checkout would bring deleted modules back
    shutil.copytree(ROOT, clean, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "demo-results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(clean)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules_in_the_tree()
    assert "mergekit_cl/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"mergekit_cl", wheel.name.rsplit("-", 3)[0] + ".dist-info"}


def test_the_list_of_packages_is_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({name.rpartition("/")[0].replace("/", ".") for name in modules_in_the_tree()})


@pytest.mark.parametrize("name", ["kernels", "adapters"])
def test_our_folders_are_no_top_level_packages(name: str) -> None:
    """transformers imports ``kernels`` if it finds one: it must not be ours."""
    spec = importlib.util.find_spec(name)
    locations = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    assert ROOT / name not in locations


def test_importing_loads_no_framework_and_no_compiler() -> None:
    assert loaded_by("import mergekit_cl") & HEAVY == set()
    assert loaded_by("import mergekit_cl, numba") & HEAVY >= {"numba"}  # the check can fail


def test_merging_numpy_arrays_loads_no_framework() -> None:
    loaded = loaded_by("import numpy as np, mergekit_cl; mergekit_cl.merge([np.zeros(3, np.float32)] * 2)")
    assert loaded & HEAVY == {"numba", "llvmlite"}
    loaded = loaded_by("import numpy as np, mergekit_cl; mergekit_cl.merge([np.zeros(3)] * 2, backend='numpy')")
    assert loaded & HEAVY == set()


def test_the_torch_adapter_loads_no_other_framework() -> None:
    assert loaded_by("from mergekit_cl.adapters.torch import SFA") & {"jax", "triton", "numba", "typer"} == set()


def test_numba_falls_back_when_nothing_can_be_cached(tmp_path: Path) -> None:
    """With a read-only source and an unwritable home, numba refuses to cache; kernels must compile all the same."""
    program = (
        "import numpy as np, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import mergekit_cl\n"
        "print(mergekit_cl.merge([np.float32([1]), np.float32([3])], backend='numba').tolist())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[2.0]\n"
