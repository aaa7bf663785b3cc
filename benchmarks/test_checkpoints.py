"""``mergekit-cl run`` beside ``mergekit-yaml``: the same recipes give the same models; time and memory of whole processes.

``MERGEKIT_CL_BENCH_SIZE`` is one of the sizes in checkpoints.py: "0.95B", or "tiny" for a trial. mergekit runs once per row.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from string import Template
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import yaml
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors import safe_open

from mergekit_cl import merge

from .checkpoints import SIZES, Llama, Run, make, make_place, measure, warm

pytestmark = pytest.mark.filterwarnings("default")  # of mergekit and transformers

TRIAL = float(os.environ.get("MERGEKIT_CL_BENCH_SCALE", "1")) < 1
SIZE = os.environ.get("MERGEKIT_CL_BENCH_SIZE", "tiny" if TRIAL else "0.95B")
LLAMA = SIZES[SIZE]
LARGE = SIZES["4x"] if SIZE == "0.95B" else replace(LLAMA, layers=4 * LLAMA.layers)

ROUNDS = 1 if TRIAL else 3
BIN = Path(sys.executable).parent
OURS, UNVERIFIED, THEIRS, NOTHING = "mergekit-cl run", "mergekit-cl run --no-verify", "mergekit-yaml", "mergekit-cl --version"
MEMORY = 512_000_000  # bytes of anonymous memory
OFFLINE = {"HF_HUB_OFFLINE": "1"}


# the same recipes, the same models

BLOCKS = {
    "weighted": """[
  {model: $one, parameters: {weight: [{filter: mlp, value: [0.1, 0.9, 0.4]}, {filter: embed, value: 0.8}, {value: 0.3}]}},
  {model: $two, parameters: {weight: [0.2, 0.7]}},
  {model: $three},
  ]""",
    "trimmed": """[
  {model: $one, parameters: {density: [1, 0.7, 0.1], weight: 1.0}},
  {model: $two, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}},
  {model: $three, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0.2}]}},
  ]""",
    "sliced": """[
  {sources: [{model: $one, layer_range: [0, 4], parameters: {weight: [0, 1]}}, {model: $two, layer_range: [0, 4]}]},
  {sources: [{model: $one, layer_range: [2, 6]}, {model: $two, layer_range: [1, 5]}], parameters: {weight: 0.7}},
  ]""",
    "plain": "[{model: $one}, {model: $two}, {model: $three}]",
    "t": "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]",
}

RECIPES = {
    "linear": """
models: $weighted
parameters: {weight: 0.25}
""",
    "linear (sum)": """
models: $weighted
parameters: {weight: 0.25, normalize: [{filter: mlp, value: false}, {value: true}]}
""",
    "linear (base)": """
models: $weighted
base_model: $base
parameters: {weight: 0.5, normalize: false}
""",
    "linear (slices)": """
slices: $sliced
parameters: {weight: [0.2, 0.4]}
""",
    "linear (modules)": """
modules: {default: {slices: $sliced, parameters: {weight: 0.3}}}
""",
    "linear (modules, models)": """
modules: {default: {models: $weighted, parameters: {weight: 0.3}}}
""",
    "linear (bfloat16 to float32)": """
models:
- {model: $one_bfloat16, parameters: {weight: [0.1, 0.9]}}
- {model: $two_bfloat16, parameters: {weight: 0.5}}
dtype: float32
""",
    "slerp": """
models: [{model: $base}, {model: $one}]
base_model: $base
parameters: {t: $t}
""",
    "slerp (slices)": """
slices: [{sources: [{model: $one, layer_range: [0, 6]}, {model: $two, layer_range: [0, 6]}]}]
base_model: $one
parameters: {t: $t}
dtype: float32
""",
    "task_arithmetic": """
models: $weighted
base_model: $base
parameters: {weight: 0.4, lambda: [0.5, 1.5]}
""",
    "task_arithmetic (mean)": """
models: $weighted
base_model: $base
parameters: {weight: 0.4, normalize: true}
""",
    "task_arithmetic (slices)": """
slices: $sliced
base_model: $two
parameters: {weight: 0.6}
""",
    "ties": """
models: $trimmed
base_model: $base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "ties (sum, rescaled)": """
models: $trimmed
base_model: $base
parameters: {normalize: false, rescale: true, lambda: 0.7}
""",
    "ties (slices)": """
slices:
- sources: [{model: $one, layer_range: [0, 3], parameters: {density: [0.2, 0.8]}}, {model: $two, layer_range: [3, 6]}]
- sources: [{model: $two, layer_range: [2, 4]}, {model: $one, layer_range: [1, 3]}]
  parameters: {weight: 0.5}
base_model: $two
parameters: {density: 0.4, weight: [{filter: v_proj, value: 0.3}, {value: 0.9}]}
""",
    "breadcrumbs": """
models: $trimmed
base_model: $base
parameters: {gamma: [0, 0.05]}
""",
    "breadcrumbs_ties": """
models: $trimmed
base_model: $base
parameters: {gamma: 0.02, lambda: 0.8}
""",
    "dare_linear (density 1)": """
models: $weighted
base_model: $base
parameters: {density: 1.0, weight: 0.4}
""",
    "dare_ties (density 1)": """
models: $weighted
base_model: $base
parameters: {density: 1.0, weight: 0.4}
""",
    "nuslerp": """
models: [{model: $one, parameters: {weight: [0.1, 0.9]}}, {model: $two, parameters: {weight: 0.5}}]
""",
    "nuslerp (base)": """
models: [{model: $one, parameters: {weight: [0.1, 0.9]}}, {model: $two, parameters: {weight: 0.5}}]
base_model: $base
""",
    "nuslerp (rows)": """
models: [{model: $one, parameters: {weight: 0.3}}, {model: $two, parameters: {weight: [0.5, 1]}}]
parameters: {nuslerp_flatten: [{filter: mlp, value: true}, {value: false}]}
""",
    "nuslerp (columns)": """
models: [{model: $one, parameters: {weight: 0.3}}, {model: $two, parameters: {weight: [0.5, 1]}}]
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "multislerp": """
models: $weighted
parameters: {weight: 0.4}
""",
    "multislerp (base)": """
models: $weighted
base_model: $base
parameters: {weight: 0.4, normalize_weights: false}
""",
    "karcher": """
models: $plain
parameters: {max_iter: 20, tol: 1.0e-6}
""",
    "model_stock": """
models: $plain
base_model: $base
""",
    "model_stock (rows)": """
models: $plain
base_model: $base
parameters: {filter_wise: true}
""",
    "passthrough": """
slices:
- sources: [{model: $one, layer_range: [0, 4]}]
- sources: [{model: $two, layer_range: [2, 6], parameters: {scale: [{filter: o_proj, value: 0}, {value: [1, 0.5]}]}}]
""",
    "passthrough (modules)": """
modules: {default: {slices: [{sources: [{model: $two, layer_range: [1, 4]}]}, {sources: [{model: $one, layer_range: [3, 6]}]}]}}
parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}
""",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes: in float32, of two shards each, and in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    names = ["base", "one", "two", "three"]
    wide = make(folder / "float32", SIZES["tiny"], dtype="float32", shards=2)
    narrow = make(folder / "bfloat16", SIZES["tiny"], dtype="bfloat16")
    return {**dict(zip(names, wide, strict=True)), **dict(zip([f"{name}_bfloat16" for name in names], narrow, strict=True))}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(benchmark: BenchmarkFixture, tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("mergekit")
    recipe, ours, theirs = tmp_path / "recipe.yml", tmp_path / "ours", tmp_path / "theirs"
    text = f"merge_method: {name.partition(' ')[0]}\n{RECIPES[name]}"
    recipe.write_text(Template(Template(text).safe_substitute(BLOCKS)).substitute(tiny))
    benchmark.pedantic(lambda: run(recipe, ours), rounds=1)  # type: ignore[no-untyped-call]
    run_mergekit(recipe, theirs)

    merged, expected = tensors(ours), tensors(theirs)
    assert list(merged) == list(expected)
    differences = []
    for tensor, other in expected.items():
        assert merged[tensor].dtype == other.dtype == torch.float32, tensor
        assert merged[tensor].shape == other.shape, tensor
        differences.append(float((merged[tensor].double() - other.double()).abs().max() / other.abs().max().clamp(min=1e-30)))
        assert differences[-1] <= 1e-6, tensor
    check_loads(ours, merged)
    benchmark.extra_info.update(
        table="recipes",
        case={"recipe": name, "tensors": len(merged)},
        errors={"largest difference, of the largest entry of its tensor": max(differences)},
    )


def run_mergekit(recipe: Path, out: Path) -> None:
    """Do what mergekit-yaml does, without the seconds that its imports take."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())), str(out), MergeOptions(quiet=True))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder, sorted by name; none may be there twice."""
    found: list[tuple[str, torch.Tensor]] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    assert len(dict(found)) == len(found)
    return dict(sorted(found))


def check_loads(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Load a folder as a model and a tokenizer: all tensors of the model are in the folder, and no others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(loading.values()), loading
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True)("hello world")["input_ids"] == [3, 4]


# time and memory

# name: (models, whether there is a base, parameters, which merge() and recipes name alike)
SPEED: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "linear": (3, False, {"weight": [0.5, 0.3, 0.2]}),
    "task_arithmetic": (3, True, {"weight": [0.5, 0.3, 0.2]}),
    "slerp": (1, True, {"t": 0.3}),
    "ties": (3, True, {"density": 0.2, "weight": [1.0, 1.0, 1.0]}),
}


def run(recipe: Path, out: Path, *flags: str) -> Run:
    """Merge in a process of its own, into a folder that is not there."""
    shutil.rmtree(out, ignore_errors=True)
    return measure([BIN / "mergekit-cl", "run", recipe, out, "--memory", "512MB", *flags], OFFLINE)


def write_recipe(file: Path, method: str, folders: Sequence[Path]) -> Path:
    """Write the recipe of a row; ``folders`` are the base and its fine-tunes."""
    count, based, parameters = SPEED[method]
    models: list[dict[str, Any]] = [{"model": str(path), "parameters": {}} for path in folders[1 : 1 + count]]
    for name, value in parameters.items():
        for n, model in enumerate(models):
            model["parameters"] |= {name: value[n]} if isinstance(value, list) else {}
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if based:
        recipe["base_model"] = str(folders[0])
    recipe["parameters"] = {name: value for name, value in parameters.items() if not isinstance(value, list)}
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def test_measure(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The instrument: 100 MB here and 50 MB in a child for half a second, 20 MB written by the one and read by the other."""
    file = tmp_path / "file"
    child = f"held = open({str(file)!r}, 'rb').read() + bytes(30_000_000); import time; time.sleep(0.5)"
    parent = f"""
import subprocess, sys
held = bytearray(b"1") * 100_000_000
open({str(file)!r}, "wb", buffering=0).write(memoryview(held)[:20_000_000])
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    cost = benchmark.pedantic(lambda: measure([sys.executable, "-W", "ignore", "-c", parent]))  # type: ignore[no-untyped-call]
    assert 0.5 < cost.seconds < 10
    assert 150e6 < cost.anonymous < 200e6
    assert 20e6 <= cost.written < 21e6
    assert 20e6 <= cost.read < 25e6  # what Python reads to start, too
    with pytest.raises(RuntimeError, match=r"exit status 3: .*\n.*out of order"):
        measure([sys.executable, "-c", "import sys; print('out of order'); sys.exit(3)"])


class Scene(Protocol):
    """Make a base and its fine-tunes, unless they are there: their folders, and a folder for results."""

    def __call__(self, llama: Llama, *, linked: bool = False) -> tuple[list[Path], Path]: ...


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Keep one set of folders at a time, with room for two results; for one beside linked models."""
    made: dict[Llama, tuple[list[Path], Path]] = {}

    def clear() -> None:
        while made:
            shutil.rmtree(made.popitem()[1][1])

    def build(llama: Llama, *, linked: bool = False) -> tuple[list[Path], Path]:
        if llama not in made:
            clear()
            needed = 2 * llama.parameters * (3 if linked else 6)
            place = make_place(needed)
            made[llama] = [], place
            if shutil.disk_usage(place).free < needed:
                pytest.skip(f"{needed / 1e9:.0f} GB are needed in {place.parent}")
            made[llama] = make(place, llama, linked=linked), place
            warm(made[llama][0])
        return made[llama]

    yield build
    clear()


@pytest.mark.parametrize("method", SPEED)
def test_speed(benchmark: BenchmarkFixture, scene: Scene, method: str) -> None:
    pytest.importorskip("mergekit")
    folders, place = scene(LLAMA)
    recipe, ours, theirs = write_recipe(place / "recipe.yml", method, folders), place / "ours", place / "theirs"
    run(recipe, ours)  # compiles, too
    slow = measure([BIN / "mergekit-yaml", recipe, theirs], OFFLINE)
    assert headers(ours) == headers(theirs)
    shutil.rmtree(theirs)
    check_against_float64(ours, method, folders)
    runs: dict[str, list[Run]] = {OURS: [], UNVERIFIED: [], THEIRS: [slow]}
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: runs[OURS].append(run(recipe, ours)),
        setup=lambda: runs[UNVERIFIED].append(run(recipe, ours, "--no-verify")),
        rounds=ROUNDS,
    )
    count, based, _ = SPEED[method]
    case = {"method": method, "models": count, "base": "yes" if based else ""}
    report(benchmark, "checkpoints", method, LLAMA, case, runs)


@pytest.mark.parametrize("method", SPEED)
def test_memory(benchmark: BenchmarkFixture, scene: Scene, method: str) -> None:
    folders, place = scene(LARGE, linked=True)
    recipe, ours = write_recipe(place / "recipe.yml", method, folders), place / "ours"
    runs: dict[str, list[Run]] = {OURS: []}
    benchmark.pedantic(lambda: runs[OURS].append(run(recipe, ours)), rounds=1)  # type: ignore[no-untyped-call]
    check_against_float64(ours, method, folders)
    shutil.rmtree(ours)
    report(benchmark, "checkpoint_memory", method, LARGE, {"method": method}, runs)


TENSORS = [replace(SIZES["many"], layers=layers) for layers in (111, 222, 444)]  # 222 are 2,000 tensors
BYTES = [replace(LLAMA, layers=max(1, LLAMA.layers * quarters // 4)) for quarters in (1, 2, 3)]


@pytest.mark.parametrize("llama", [*TENSORS, *BYTES, LLAMA], ids=lambda llama: f"{len(llama.shapes())}-{llama.parameters}")
def test_growth(benchmark: BenchmarkFixture, scene: Scene, llama: Llama) -> None:
    folders, place = scene(llama)
    recipe, ours = write_recipe(place / "recipe.yml", "linear", folders), place / "ours"
    run(recipe, ours)
    check_against_float64(ours, "linear", folders)
    runs: dict[str, list[Run]] = {OURS: [], NOTHING: []}
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: runs[OURS].append(run(recipe, ours)),
        setup=lambda: runs[NOTHING].append(measure([BIN / "mergekit-cl", "--version"])),
        rounds=ROUNDS,
    )
    report(benchmark, "checkpoint_growth", "linear", llama, {"tensors": len(llama.shapes())}, runs)


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Read dtype and shape of all tensors of a folder."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def read(folder: Path, name: str) -> Any:
    """Read a tensor in float64."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name).double().numpy()
    raise AssertionError(f"{folder} has no {name}")


def check_against_float64(result: Path, method: str, folders: Sequence[Path]) -> None:
    """Check a matrix and a vector against merge() in float64, to half a unit in the last place and float32 arithmetic."""
    count, based, parameters = SPEED[method]
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
        base, *models = ({name: read(folder, name)} for folder in folders[: 1 + count])
        exact = merge(models, method, base=base if based else None, **parameters)[name]
        scale = np.max([np.abs(model[name]) for model in (base, *models)], axis=0)
        error = np.abs(read(result, name) - exact)
        # of equal entries, and of sums that cancel, another one may be chosen in float64
        assert (error > 2.0**-8 * np.abs(exact) + 2.0**-18 * scale).mean() < 1e-3, name


def report(
    benchmark: BenchmarkFixture, table: str, method: str, llama: Llama, case: dict[str, Any], runs: dict[str, list[Run]]
) -> None:
    """Hand runs to report.py; the first contender is the one that pytest-benchmark timed, and has to keep to its memory."""
    count, based, _ = SPEED[method]
    name, *others = runs
    assert max(run.anonymous for run in runs[name]) <= MEMORY
    seconds = {other: [run.seconds for run in runs[other]] for other in others}
    kinds = ("anonymous", "resident", "read", "written")
    benchmark.extra_info.update(
        table=table,
        case={**case, "parameters": llama.parameters},
        bytes=(count + based + 1) * 2 * llama.parameters,  # of the models and the result
        name=name,
        beside={other: {"min": min(times), "median": median(times)} for other, times in seconds.items()},
        most={other: {kind: max(getattr(run, kind) for run in measured) for kind in kinds} for other, measured in runs.items()},
    )
