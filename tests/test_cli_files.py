"""The command line for files: what it writes, what it prints where, and how it fails."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from mergekit_cl.cli import app
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import numpy as numpy_kernels
from mergekit_cl.kernels.triton.lanes import Lanes

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})

Array = np.ndarray[Any, Any]


def call(*args: object) -> Result:
    """Run the command line in this process, which may have any amount of memory already."""
    more = ["--memory", "64GB"] if args[0] in ("merge", "run") and "--memory" not in args else []
    return runner.invoke(app, [*map(str, args), *more])


def done(*args: object) -> Result:
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def failed(*args: object, code: int = 1) -> str:
    """Run what must fail; nothing is on standard output, and no traceback on standard error, which is returned."""
    result = call(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def words(text: str) -> str:
    """Undo the frames and the line breaks of a panel."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def write(path: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "float32", **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


NAMES = ("embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "norm.weight")


def tensors(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((4, 4) if "mlp" in name else (8,), np.float32) for name in NAMES}


@pytest.fixture(autouse=True)
def _memory_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process may have more than --memory allows."""
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 50_000_000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three models: base, a and b."""
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, tensors(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """What all files of a folder hold."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def expected(weights: tuple[float, float], seeds: tuple[int, int] = (1, 2)) -> dict[str, Array]:
    one, other = (tensors(seed) for seed in seeds)
    return {name: (weights[0] * one[name] + weights[1] * other[name]) / sum(weights) for name in NAMES}


def assert_close(path: Path, tensors: Mapping[str, Array]) -> None:
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_allclose(found[name].astype(np.float32), array, rtol=1e-6, atol=1e-6, err_msg=name)


TIES = ("merge", "a", "b", "-m", "ties", "--base", "base", "-o", "out")
LINEAR = ("merge", "a", "b", "-m", "linear", "-o", "out")


def planned(*args: object) -> str:
    """What a dry run says of the tensors that are merged."""
    plan = json.loads(done(*args, "--dry-run", "--json").stdout)
    return str(plan["tensors"][0]["what"])


# Merging


def test_a_merge_and_its_summary(folder: Path) -> None:
    result = done(*LINEAR, "-p", "weight=0.75,0.25")
    assert_close(folder / "out/model.safetensors", expected((0.75, 0.25)))
    first, second = result.stdout.splitlines()
    assert first == "out: 4 tensors merged, verified"
    assert re.fullmatch(
        r"read 384 bytes, wrote 192 bytes in \d+\.\d s \([\d.]+ \w+/s\), at most [\d.]+ [MG]B of memory", second
    )
    assert result.stderr == ""
    assert sorted(os.listdir("out")) == ["README.md", "config.json", "model.safetensors", "recipe.yml", "tokenizer.json"]
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]


def test_quiet_prints_nothing(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE)
    assert done("run", "recipe.yml", "out", "--quiet", "--multi-gpu").output == ""
    assert done(*LINEAR, "--quiet", "--overwrite").output == ""
    assert done("run", "recipe.yml", "other", "--no-quiet", "--multi-gpu").output != ""


def test_json_tells_what_was_done(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE)
    facts = json.loads(done(*LINEAR, "--json", "--only", "*mlp*", "--no-verify").stdout)
    assert facts["target"] == "out"
    assert (facts["merged"], facts["copied"], facts["resumed"]) == (2, 2, 0)
    assert (facts["read"], facts["written"], facts["verified"]) == (2 * 128 + 64, 192, False)
    result = done("run", "recipe.yml", "other", "--json", "--multi-gpu")
    facts = json.loads(result.stdout)
    assert facts["verified"] is True
    assert facts["notes"] == ["--multi-gpu has no meaning here: one GPU is used"]
    assert result.stderr == "note: --multi-gpu has no meaning here: one GPU is used\n"
    assert facts["device"] == "cpu"


def test_a_single_file(folder: Path) -> None:
    done("merge", "a/model.safetensors", "b", "-m", "linear", "-o", "out.safetensors")
    assert_close(folder / "out.safetensors", expected((1, 1)))
    assert sorted(os.listdir()) == ["a", "b", "base", "out.safetensors"]
    assert done("verify", "out.safetensors").stdout == "out.safetensors: 4 tensors in 1 file, 192 bytes: as they were written\n"


@pytest.mark.parametrize(
    ("size", "files"), [("70", 4), ("130", 2), ("1kB", 1), ("5B", 1), ("5b", 1), ("0.5 B", 1), ("2GiB", 1)]
)
def test_shard_sizes(folder: Path, size: str, files: int) -> None:
    done(*LINEAR, "--out-shard-size", size)
    shards = [name for name in os.listdir("out") if name.endswith(".safetensors")]
    assert len(shards) == files
    merged = {name: array for shard in shards for name, array in load_file(folder / "out" / shard).items()}
    for name, array in expected((1, 1)).items():
        np.testing.assert_allclose(merged[name], array, rtol=1e-6, atol=1e-6)


def test_what_a_shard_size_of_mergekit_means(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr("mergekit_cl.file_merge.FileMerge.check", lambda _, **given: sizes.append(given["shard_size"]))
    for size in ("5B", "5b", "1.5 B", "7", "5MB", "1GiB"):
        done(*LINEAR, "--dry-run", "--out-shard-size", size)
    assert sizes == [5 * 10**9, 5 * 10**9, 1_500_000_000, 7, 5_000_000, 2**30]


def test_out_dtype(folder: Path) -> None:
    done(*LINEAR, "--out-dtype", "float16")
    found = load_file(folder / "out/model.safetensors")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    assert json.loads((folder / "out/config.json").read_text())["dtype"] == "float16"
    assert failed(*LINEAR, "--out-dtype", "bf16", "--overwrite") == (
        'error: unknown out_dtype "bf16": did you mean "bfloat16"?\n'
    )


def test_the_seed_decides_random_masks(folder: Path) -> None:
    dare = ("merge", "a", "b", "-m", "dare_linear", "--base", "base", "-p", "density=0.5")
    for seed, out in ((1, "one"), (1, "again"), (2, "two")):
        done(*dare, "--seed", seed, "-o", out)
    one, again, two = (everything(folder / out) for out in ("one", "again", "two"))
    assert one == again
    assert one["model.safetensors"] != two["model.safetensors"]
    assert "--seed" in words(failed(*dare, "--seed", "x", "-o", "three", code=2))


def test_threads_and_backends_give_the_same_bytes(folder: Path) -> None:
    for out, options in {"1": ["-j", "1"], "3": ["--threads", "3"], "numpy": ["--backend", "numpy"]}.items():
        done("merge", "a", "b", "-m", "ties", "--base", "base", "-p", "density=0.3", "-o", out, *options)
    assert everything(folder / "1") == everything(folder / "3") == everything(folder / "numpy")


def test_only_and_exclude_may_be_given_several_times(folder: Path) -> None:
    done(*TIES, "-p", "density=1", "--only", "*mlp*", "--only", "norm*", "--exclude", "*.0.*", "--exclude", "norm.w*")
    found, base = load_file(folder / "out/model.safetensors"), tensors(0)
    assert [name for name in NAMES if not np.array_equal(found[name], base[name])] == ["layers.1.mlp.weight"]
    error = failed(*TIES, "-p", "density=1", "--only", "*mpl*", "--exclude", "norm", "--overwrite")
    assert 'only: "*mpl*" matches no tensor' in error
    assert 'exclude: "norm" matches no tensor' in error


def test_overwrite(folder: Path) -> None:
    done(*LINEAR, "--out-shard-size", "70")
    before = everything(folder / "out")
    assert "--overwrite" in failed(*LINEAR, "-p", "weight=1,3")
    assert "--overwrite" in failed(*LINEAR, "--dry-run")
    assert everything(folder / "out") == before
    done(*LINEAR, "-p", "weight=1,3", "--overwrite")
    assert [name for name in os.listdir("out") if "safetensors" in name] == ["model.safetensors"]
    assert_close(folder / "out/model.safetensors", expected((1, 3)))
    assert "inputs are never changed" in failed("merge", "a", "b", "-m", "linear", "-o", "a", "--overwrite")


def test_nonfinite(folder: Path) -> None:
    bad = tensors(1)
    bad["norm.weight"][3] = np.nan
    write(folder / "bad", bad)
    error = failed("merge", "bad", "b", "-m", "linear", "-o", "out")
    assert "norm.weight" in error
    assert "--allow-nonfinite" in error
    assert "nonfinite=" not in error
    assert not Path("out").exists()
    done("merge", "bad", "b", "-m", "linear", "-o", "out", "--allow-nonfinite")
    assert np.isnan(load_file(folder / "out/model.safetensors")["norm.weight"]).tolist() == [False] * 3 + [True] + [False] * 4


# Verifying


def test_verify_finds_damage(folder: Path) -> None:
    done(*LINEAR)
    assert done("verify", "out").stdout == "out: 4 tensors in 1 file, 192 bytes: as they were written\n"
    assert json.loads(done("verify", "out", "--json").stdout) == {"verified": "out", "files": 1, "tensors": 4, "bytes": 192}
    path = folder / "out/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "damaged" in failed("verify", "out")
    result = call("verify", "out", "--json")
    assert result.exit_code == 1
    assert "model.safetensors" in json.loads(result.stdout)["error"]["message"]
    assert "holds no checksums" in failed("verify", "a")
    assert failed("verify", "nothing") == "error: nothing: cannot be read: No such file or directory\n"


# Parameters


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["density=0.5"], "density=0.5, weight=1"),
        (["density=1"], "density=1,"),
        (["density=1e-5"], "density=1e-05,"),
        (["density=.5"], "density=0.5,"),
        (["density=0.5", "weight=-0.5"], "weight=-0.5,"),
        (["density=0.5", "weight=-2,1e-1"], "weight=[-2, 0.1],"),
        (["density=0.5", " weight = 0.5, 0.25 "], "weight=[0.5, 0.25],"),
        (["density=0.5,0.25"], "density=[0.5, 0.25],"),
        (["density=0.5", "rescale=none"], "rescale=None,"),
        (["density=0.5", "rescale=Null"], "rescale=None,"),
        (["density=0.5", "rescale=l1"], "rescale=l1,"),
        (["density=0.5", "elect=unweighted"], "elect=unweighted,"),
        (["density=0.5", "lambda=2"], "lambda=2"),
        (["density=0.5", "lambda_=2"], "lambda=2"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_parameters(given: list[str], shown: str) -> None:
    assert shown in planned(*TIES, *(word for each in given for word in ("-p", each)))


@pytest.mark.parametrize(("text", "shown"), [("true", "True"), ("False", "False"), ("TRUE", "True")])
@pytest.mark.usefixtures("folder")
def test_flags_as_parameters(text: str, shown: str) -> None:
    assert planned(*LINEAR, "--parameter", f"normalize={text}") == f"linear(weight=1, normalize={shown})"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["density"], "-p density: must be name=value, such as -p density=0.2"),
        (["=5"], "-p =5: must be name=value"),
        (["density="], "-p density=: must be name=value"),
        (["density=0.5", "weight=1,"], "-p weight=1,: must be name=value"),
        (["density=0.5", "weight=1,,2"], "-p weight=1,,2: must be name=value"),
        (["density=0.5", "density=0.5"], "-p density=0.5: density is given twice; a list of values has commas"),
        (["density=0.5", "lambda=1", "lambda_=1"], "lambda_ is given twice"),
        (["densty=0.5"], 'unknown parameter of ties "densty": did you mean "density"?'),
        (["density=half"], "density='half': must be a number"),
        (["density=true"], "density=True: must be a number"),
        (["density=nan"], "density='nan': must be a number"),
        (["density=1.5"], "density=1.5"),
        (["density=0.5", "weight=1,2,3"], "3 values for 2 models"),
        (["density=0.5", "elect=loudly"], "elect"),
        ([], "density"),
    ],
)
def test_wrong_parameters(folder: Path, given: list[str], message: str) -> None:
    error = failed(*TIES, *(word for each in given for word in ("-p", each)))
    assert error.startswith("error: ")
    assert message in error
    assert not (folder / "out").exists()


# What is wrong is said at once, before anything is written


def test_a_dry_run_shows_the_plan_and_writes_nothing(folder: Path) -> None:
    before = everything(folder)
    result = done(*TIES, "-p", "density=0.5", "--exclude", "norm*", "--dry-run")
    assert everything(folder) == before
    assert sorted(os.listdir()) == ["a", "b", "base"]
    text = words(result.stdout.replace("┃", "│"))
    assert "ties(density=0.5, weight=1, rescale=None, 3 40 elect=weighted" in text
    assert "copied, not merged 1 8" in text
    assert "to read 512 bytes to write 192 bytes to out" in text
    assert "beside README.md, config.json, recipe.yml, tokenizer.json" in text
    assert text.endswith("nothing was written (--dry-run)")
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_plan_prints_names_as_they_are(folder: Path) -> None:
    done("merge", "a", "b", "-m", "linear", "-o", "[bold]:smile:", "--dry-run")
    result = done("merge", "a", "b", "-m", "linear", "-o", folder / "[red]x", "--dry-run")
    assert f"to {folder}/[red]x\n" in result.stdout


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_all_problems_at_once(folder: Path, dry: list[str]) -> None:
    write(folder / "c", {**tensors(3), "norm.weight": np.zeros(7, np.float32)})
    error = failed(
        "merge", "a", "c", "-m", "ties", "--base", "base", "-o", "out", "-p", "density=2", "--memory", "lots",
        "--out-shard-size", "0", "--only", "nothing*", *dry,
    )  # fmt: skip
    for problem in ("--memory='lots'", "--out-shard-size='0'", "density=2", '"nothing*" matches no tensor'):
        assert problem in error
    error = failed("merge", "./x", "a", "./y", "-m", "linear", "-o", "out", *dry)
    assert "./x: no such file" in error
    assert "./y: no such file" in error
    error = failed("merge", "a", "c", "-m", "linear", "-o", "out", *dry)
    assert '"norm.weight"' in error
    assert "(7,)" in error
    assert sorted(os.listdir()) == ["a", "b", "base", "c"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--backend", "nump"], 1, 'unknown backend "nump": did you mean "numpy"?'),
        (["--device", "gpu"], 1, """device='gpu': must be "cpu", "cuda", a GPU with its number such as "cuda:1", or "auto\""""),
        (["--device", "cuda:1"], 1, 'device="cuda:1": TRITON_INTERPRET is set'),
        (["--threads", "0"], 2, "greater than or equal to 1"),
        (["-j", "two"], 2, "--threads"),
        (["--memory", "lots"], 1, "--memory='lots': must be a number of bytes, such as 512MB or 2GiB"),
        (["--memory", "0"], 1, "--memory='0': must be a number"),
        (["--memory", "1MB"], 1, "where the program itself takes"),
        (["--out-shard-size", "5X"], 1, "--out-shard-size='5X': must be a number of bytes"),
        (["--seed", "1.5"], 2, "--seed"),
        (["--frobnicate"], 2, "No such option: --frobnicate"),
        (["--base", "b"], 1, "linear has no use for a base"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_wrong_options(options: list[str], code: int, message: str) -> None:
    assert message in words(failed(*LINEAR, *options, code=code))
    assert message in words(failed(*LINEAR, *options, "--dry-run", code=code))
    result = call(*LINEAR, *options, "--json")
    assert result.exit_code == code
    error = json.loads(result.stdout)["error"]
    assert message in words(error["message"])
    assert error["kind"]
    assert result.stderr != ""


def test_a_merge_on_a_gpu_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stands here for Triton's interpreter, on the CPU."""
    for module in ("staging", "file_merge"):
        monkeypatch.setattr(f"mergekit_cl.{module}.find_device", lambda device: device.replace("cuda", "cuda:1")[:6])
    monkeypatch.setattr("mergekit_cl.kernels.load", lambda backend, device: (backend, numpy_kernels))
    on_the_cpu = Lanes("cpu")
    monkeypatch.setattr("mergekit_cl.kernels.triton.lanes.Lanes", lambda device: on_the_cpu)
    dry = words(done(*TIES, "--device", "cuda", "-p", "density=0.5", "--dry-run").stdout)
    assert "to compute on cuda:1" in dry
    assert json.loads(done(*LINEAR, "--device", "cuda", "--dry-run", "--json").stdout)["device"] == "cuda:1"
    result = done(*LINEAR, "--device", "cuda", "-p", "weight=0.75,0.25")
    assert re.search(r"/s\) on cuda:1, at most .* of memory", words(result.stdout))
    assert_close(folder / "out/model.safetensors", expected((0.75, 0.25)))
    (folder / "recipe.yml").write_text(RECIPE)
    assert json.loads(done("run", "recipe.yml", "by-recipe", "--cuda", "--json").stdout)["device"] == "cuda:1"
    error = failed("merge", "a", "b", "-m", "cat", "-o", "x", "--device", "cuda")
    assert "cat merges adapters of one base into an adapter, as a whole; leave device= away" in words(error)


@pytest.mark.usefixtures("folder")
def test_options_reach_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stop(_: object, **options: Any) -> None:
        given.update(options)
        raise MergeError("seen")

    monkeypatch.setattr("mergekit_cl.file_merge.FileMerge.run", stop)
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 100_000_000)
    usual = {
        "overwrite": False,
        "verify": True,
        "shard_size": 50 * 10**9,
        "backend": "auto",
        "threads": None,
        "nonfinite": "error",
    }
    other = {"overwrite": True, "verify": False, "shard_size": 1000, "backend": "numpy", "threads": 3, "nonfinite": "allow"}
    assert runner.invoke(app, [*LINEAR]).stderr == "error: seen\n"
    assert usual | {"memory": 512_000_000, "held": 100_000_000} == {name: given[name] for name in (*usual, "memory", "held")}
    monkeypatch.setattr("mergekit_cl.staging.find_device", lambda _: "cuda:0")
    assert runner.invoke(app, [*LINEAR, "--device", "cuda"]).stderr == "error: seen\n"
    assert (given["memory"], given["device"]) == (2 * 10**9, "cuda:0")
    failed(*LINEAR, "--overwrite", "--no-verify", "--out-shard-size", "1kB", "--backend", "numpy", "-j", "3",
           "--allow-nonfinite", "--memory", "300MB")  # fmt: skip
    assert other | {"memory": 300_000_000} == {name: given[name] for name in (*usual, "memory")}


def test_usage_errors(folder: Path) -> None:
    error = words(failed("merge", "a", "b", "-m", "linear", code=2))
    assert "--out" in error
    assert "merge --help' for help" in error
    assert "--method" in words(failed("merge", "a", "b", "-o", "out", code=2))
    assert "MODEL" in words(failed("merge", "-m", "linear", "-o", "out", code=2))
    assert "merge" in words(failed("merg", code=2))
    assert "OUT" in words(failed("run", "recipe.yml", code=2))
    assert 'unknown method "lineal": did you mean "linear"?' in failed("merge", "a", "b", "-m", "lineal", "-o", "out")
    assert "ties needs the model that the others were fine-tuned from" in failed("merge", "a", "b", "-m", "ties", "-o", "out")
    assert sorted(os.listdir(folder)) == ["a", "b", "base"]


# Errors that nobody expects


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("x"), 3, "this should not have happened: KeyError: 'x'; --debug shows where, please report it"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "[Errno 13] Permission denied: 'a'"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_errors(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mergekit_cl.api.prepare_files", fail)
    assert failed(*LINEAR, code=code).removeprefix("error: ") == f"{message}\n"
    result = call(*LINEAR, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]) == (code, {"kind": type(error).__name__, "message": message})
    for args in ([*LINEAR, "--debug"], ["--debug", *LINEAR]):
        result = runner.invoke(app, args)
        assert result.exit_code == code
        assert result.exception is error or "Traceback" in result.stderr


INTERRUPTING = """
import os, signal, sys
from mergekit_cl.checkpoint.writer import Writer
from mergekit_cl.cli import app
complete = Writer._complete
def interrupted(self, tensor):
    complete(self, tensor)
    os.kill(os.getpid(), signal.SIGINT)
Writer._complete = interrupted
app()
"""


def test_an_interrupted_merge_goes_on(folder: Path) -> None:
    done(*LINEAR, "-q")
    os.rename("out", "whole")
    command = [*LINEAR, "-j", "1"]
    result = subprocess.run([sys.executable, "-c", INTERRUPTING, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 130, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"interrupted; the target is as it was, .*: the same command goes on from there\n", result.stderr)
    assert not Path("out").exists()
    again = done(*command)
    assert re.fullmatch(r"note: \d of the tensors are there already, by an earlier run that was stopped\n", again.stderr)
    assert re.search(r"4 tensors merged, \d of them by an earlier run, verified", again.stdout)
    assert everything(folder / "out") == everything(folder / "whole")


# As a program

PROGRAM = (sys.executable, "-c", "from mergekit_cl.cli import main; main()")
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "PYTHONWARNINGS": "error"}


@pytest.mark.usefixtures("folder")
def test_a_piped_program_prints_nothing_but_its_summary() -> None:
    result = subprocess.run([*PROGRAM, *LINEAR], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert result.stderr == ""
    assert result.stdout.startswith("out: 4 tensors merged, verified\n")
    result = subprocess.run([*PROGRAM, *LINEAR], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: .*out: exists; .*\n", result.stderr)
    result = subprocess.run([*PROGRAM, *LINEAR, "--debug"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")


def on_a_terminal(*args: str) -> tuple[int, str]:
    """Run the program with its standard error on a terminal; return its exit code and what the terminal got."""
    master, slave = pty.openpty()
    with subprocess.Popen([*PROGRAM, *args], stdout=subprocess.DEVNULL, stderr=slave, env=ENVIRONMENT) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:  # the other end is closed
                piece = b""
            if not piece:
                break
            text += piece
        code = process.wait()
    os.close(master)
    return code, text.decode()


@pytest.mark.usefixtures("folder")
def test_a_terminal_gets_a_progress_bar() -> None:
    code, text = on_a_terminal(*LINEAR)
    assert code == 0
    assert "merging" in text
    assert "finishing" in text
    assert re.search(r"\d+%", text)
    assert "━━━" in text
    assert text.endswith("\x1b[2K")  # the line is cleared in the end
    code, text = on_a_terminal("verify", "out")
    assert code == 0
    assert "reading" in text
    assert on_a_terminal(*LINEAR, "--overwrite", "--quiet") == (0, "")
    assert on_a_terminal(*LINEAR, "--overwrite", "--json") == (0, "")


def test_progress_reaches_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress, TaskID

    totals: list[float] = []
    advanced: list[float] = []
    add_task, update = Progress.add_task, Progress.update

    def count_task(bar: Progress, what: str, total: float) -> TaskID:
        totals.append(total)
        return add_task(bar, what, total=total)

    def count(bar: Progress, task: TaskID, advance: float | None = None, description: str | None = None) -> None:
        advanced.append(advance or 0)
        update(bar, task, advance=advance, description=description)

    monkeypatch.setattr(Progress, "add_task", count_task)
    monkeypatch.setattr(Progress, "update", count)
    done(*TIES, "-p", "density=0.5", "--only", "*mlp*")
    assert totals == [3 * 128 + 64 + 2 * 192]  # what is written is read back
    assert sum(advanced) == pytest.approx(totals[0])
    totals.clear()
    advanced.clear()
    done("verify", "out")
    assert sum(advanced) == 192
    assert totals == [(folder / "out/model.safetensors").stat().st_size]


@pytest.mark.parametrize("command", [(), ("merge",), ("run",), ("verify",), ("methods",), ("demo",)])
def test_help_fits_a_terminal(command: tuple[str, ...]) -> None:
    text = runner.invoke(app, [*command, "--help"]).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


# Models by name, and adapters


def write_adapter(path: Path, seed: int, module: str = "layers.0.mlp", rank: int = 2) -> Array:
    """Write a LoRA adapter, and return the change that it makes."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, 4), np.float32), rng.standard_normal((4, rank), np.float32)
    path.mkdir()
    prefix = f"base_model.model.{module}.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["mlp"],
        "base_model_name_or_path": "base",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return np.asarray(2 * b @ a)


def test_an_adapter_is_applied_on_the_fly(folder: Path) -> None:
    change = write_adapter(folder / "lora", 7)
    done("merge", "base+lora", "b", "-m", "linear", "-o", "out")
    wanted = expected((1, 1), (0, 2))
    wanted["layers.0.mlp.weight"] += change / 2
    assert_close(folder / "out/model.safetensors", wanted)
    assert "which has no revision" in failed("merge", "base@main", "b", "-m", "linear", "-o", "x")
    assert "is not path[@revision][+lora[@revision]]" in failed("merge", "base+lora+lora", "b", "-m", "linear", "-o", "x")
    assert "no such file" in failed("merge", "base+./none", "b", "-m", "linear", "-o", "x")


def test_adapters_are_merged(folder: Path) -> None:
    one, other = write_adapter(folder / "one", 7), write_adapter(folder / "other", 8)
    total = 0.5 * one + 2 * other
    report = done("merge", "one", "other", "-m", "cat", "-p", "weight=0.5,2", "-o", "cat")
    assert "verified" in report.stdout
    assert done("verify", "cat").exit_code == 0
    done("merge", "one", "other", "-m", "svd", "-p", "weight=0.5,2", "-p", "rank=4", "-o", "svd")
    for out in ("cat", "svd"):
        config = json.loads((folder / out / "adapter_config.json").read_text())
        factors = load_file(folder / out / "adapter_model.safetensors")
        (a,), (b,) = ([array for name, array in factors.items() if f"lora_{letter}" in name] for letter in "AB")
        np.testing.assert_allclose(config["lora_alpha"] / config["r"] * b @ a, total, atol=1e-5)
    plan = json.loads(done("merge", "one", "other", "-m", "svd", "-p", "rank=1", "-o", "x", "--dry-run", "--json").stdout)
    assert plan["tensors"][0]["what"] == "svd(weight=[1.0, 1.0], rank=1) of 2 adapters"
    assert "nothing was written" in done("merge", "one", "other", "-m", "cat", "-o", "x", "--dry-run").stdout
    assert not Path("x").exists()
    assert "cat" in failed("merge", "one", "other", "-m", "linear", "-o", "x")
    assert "is not a LoRA adapter" in failed("merge", "one", "b", "-m", "cat", "-o", "x")
    assert 'unknown parameter of cat "rank"' in failed("merge", "one", "other", "-m", "cat", "-p", "rank=1", "-o", "x")
    assert "leave" in failed("merge", "one", "other", "-m", "cat", "--base", "base", "-o", "x")
    assert "exists" in failed("merge", "one", "other", "-m", "cat", "-o", "cat")


# Recipes

RECIPE = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: 0.5}
"""

MEANINGLESS = {
    "--allow-crimes": (),
    "--lora-merge-cache": ("somewhere",),
    "--lora-merge-dtype": ("bfloat16",),
    "--low-cpu-memory": (),
    "--clone-tensors": (),
    "--trust-remote-code": (),
    "--lazy-unpickle": (),
    "--read-to-gpu": (),
    "--multi-gpu": (),
    "--gpu-rich": (),
    "--async-write": (),
    "--write-threads": ("4",),
    "-v": (),
}
HARMLESS = (
    "--no-allow-crimes", "--no-unsafe-truncate-embeddings", "--no-trust-remote-code", "--no-cuda", "--no-low-cpu-memory",
    "--no-lazy-unpickle", "--no-read-to-gpu", "--no-multi-gpu", "--num-threads", "2", "--no-async-write", "--out-shard-size",
    "5B", "--copy-tokenizer", "--no-clone-tensors", "--write-model-card", "--safe-serialization", "--no-quiet", "--device",
    "cpu",
)  # fmt: skip


def test_flags_of_mergekit_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    (folder / "recipe.yml").write_text(RECIPE)
    assert done("run", "recipe.yml", "plain").stderr == ""
    assert done("run", "recipe.yml", "harmless", *HARMLESS).stderr == ""
    flags = [word for flag, values in MEANINGLESS.items() for word in (flag, *values)]
    result = done("run", "recipe.yml", "noted", *flags, "-v", "--transformers-cache", "cache")
    names = [name.replace("-v", "--verbose") if name == "-v" else name for name in MEANINGLESS]
    assert [line.split(" has no meaning here: ")[0] for line in result.stderr.splitlines()] == [
        f"note: {name}" for name in names
    ]
    assert all(line.split(" has no meaning here: ")[1] for line in result.stderr.splitlines())
    assert everything(folder / "plain") == everything(folder / "harmless") == everything(folder / "noted")
    for flag, values in MEANINGLESS.items():
        assert "note: " in call("run", "recipe.yml", "out", flag, *values, "--dry-run").stderr


@pytest.mark.usefixtures("folder")
def test_every_flag_of_mergekit_is_known() -> None:
    options = pytest.importorskip("mergekit.scripts.run_yaml").main.params
    names = {
        name for option in options if option.param_type_name == "option" for name in (*option.opts, *option.secondary_opts)
    }
    tried = {
        *MEANINGLESS,
        *HARMLESS,
        "--cuda",
        "--device",
        "--no-copy-tokenizer",
        "--no-write-model-card",
        "--no-safe-serialization",
        "-j",
        "--quiet",
    }
    assert names <= {*tried, "--unsafe-truncate-embeddings", "--transformers-cache", "--random-seed"}


def test_flags_of_mergekit_with_a_meaning(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE)
    done("run", "recipe.yml", "out", "--no-copy-tokenizer", "--no-write-model-card", "-j", "1", "--out-shard-size", "130")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(os.listdir("out")) == ["config.json", *names, "recipe.yml"]
    assert "pickles are not written" in failed("run", "recipe.yml", "x", "--no-safe-serialization")
    assert "embeddings are not cut" in failed("run", "recipe.yml", "x", "--unsafe-truncate-embeddings")
    assert 'device="cuda"' in failed("run", "recipe.yml", "x", "--cuda")
    assert 'device="cuda:1"' in failed("run", "recipe.yml", "x", "--device", "cuda:1", "--cuda")
    assert not Path("x").exists()


def test_wrong_recipes(folder: Path) -> None:
    assert failed("run", "recipe.yml", "out") == "error: recipe.yml: cannot be read: No such file or directory\n"
    (folder / "recipe.yml").write_text(RECIPE.replace("density", "densty", 1).replace("model: b", "model: ./c"))
    error = failed("run", "recipe.yml", "out", "--memory", "x")
    assert 'recipe.yml: models[0].parameters: unknown parameter "densty"' in error or 'did you mean "density"?' in error
    assert "--memory='x'" in error
    (folder / "recipe.yml").write_text(RECIPE.replace("model: b", "model: ./c"))
    assert "./c: no such file" in failed("run", "recipe.yml", "out")
    (folder / "recipe.yml").write_text("merge_method: [")
    assert "not YAML" in failed("run", "recipe.yml", "out", "--dry-run")
    assert sorted(os.listdir()) == ["a", "b", "base", "recipe.yml"]


def test_the_command_line_adds_to_a_recipe(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE.replace("ties", "dare_ties"))
    done("run", "recipe.yml", "one", "--seed", "5", "--exclude", "norm*", "--exclude", "embed*")
    done("run", "recipe.yml", "other", "--random-seed", "6", "--exclude", "norm*", "--exclude", "embed*")
    found = load_file(folder / "one/model.safetensors")
    np.testing.assert_array_equal(found["norm.weight"], tensors(0)["norm.weight"])
    assert everything(folder / "one")["model.safetensors"] != everything(folder / "other")["model.safetensors"]
    done("run", "one/recipe.yml", "again")
    assert everything(folder / "again") == everything(folder / "one")


def test_a_merge_leaves_a_recipe_that_makes_it_again(folder: Path) -> None:
    done("merge", "a", "b", "-m", "dare_ties", "--base", "base", "-p", "density=0.5,0.25", "-p", "lambda=0.7", "--seed", "3",
         "--only", "*mlp*", "--out-dtype", "bfloat16", "-o", "out")  # fmt: skip
    done("run", "out/recipe.yml", "again")
    out, again = everything(folder / "out"), everything(folder / "again")
    assert out.keys() == again.keys()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert out[name] == again[name]
    assert yaml.safe_load(out["recipe.yml"]) == yaml.safe_load(again["recipe.yml"])


# The recipes of mergekit's documentation, on small Llama models

LLAMA_RECIPES = {
    "linear": """
        models:
          - {model: a, parameters: {weight: 1.0}}
          - {model: b, parameters: {weight: 0.3}}
          - {model: c, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float16
        """,
    "slerp": """
        slices:
          - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
        merge_method: slerp
        base_model: a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
        """,
    "ties": """
        models:
          - model: a
            parameters: {density: [1, 0.7, 0.1], weight: 1.0}
          - model: b
            parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
          - model: c
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
    "dare_ties": """
        models:
          - model: base
          - model: a
            parameters: {weight: 0.4, density: 0.75}
          - model: b
            parameters: {weight: 0.3, density: 0.5}
        merge_method: dare_ties
        base_model: base
        parameters: {int8_mask: true}
        dtype: bfloat16
        """,
    "task_arithmetic": """
        models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: -0.2}}]
        merge_method: task_arithmetic
        base_model: base
        parameters: {normalize: false, lambda: 0.8}
        """,
    "breadcrumbs": """
        models:
          - {model: a, parameters: {weight: 1, density: 0.9, gamma: 0.01}}
          - {model: b, parameters: {weight: 0.5, density: 0.8}}
        merge_method: breadcrumbs
        base_model: base
        """,
    "model_stock": """
        models: [{model: a}, {model: b}, {model: c}]
        merge_method: model_stock
        base_model: base
        parameters: {filter_wise: false}
        dtype: bfloat16
        """,
    "nuslerp": """
        models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
        merge_method: nuslerp
        base_model: base
        """,
    "passthrough": """
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: float16
        """,
    "scaled_frankenmerge": """
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources:
              - model: a
                layer_range: [2, 4]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
        merge_method: passthrough
        """,
    "multislerp": """
        models:
          - {model: a, parameters: {weight: 0.5}}
          - {model: b, parameters: {weight: 0.3}}
          - {model: c, parameters: {weight: 0.2}}
        merge_method: multislerp
        base_model: base
        tokenizer_source: base
        """,
    "karcher": """
        models: [{model: a}, {model: b}, {model: c}]
        merge_method: karcher
        parameters: {max_iter: 20, tol: 1e-6}
        tokenizer: {source: a}
        chat_template: chatml
        """,
}
LAYERS = {"passthrough": 6, "scaled_frankenmerge": 5}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models with four layers, and a tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llamas")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0"))
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", LLAMA_RECIPES)
def test_recipes_of_the_documentation(llamas: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(llamas)
    recipe = Path(f"{name}.yml")
    recipe.write_text(LLAMA_RECIPES[name])
    done("run", recipe, f"out/{name}", "-q")
    model, found = AutoModelForCausalLM.from_pretrained(f"out/{name}", output_loading_info=True, dtype="auto")
    assert not any(found.values()), found
    assert model.config.num_hidden_layers == LAYERS.get(name, 4)
    said = yaml.safe_load(LLAMA_RECIPES[name]).get("dtype", "float32")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{said}"}
    assert str(model.dtype) == f"torch.{said}"
    tokens = torch.tensor([AutoTokenizer.from_pretrained(f"out/{name}").convert_tokens_to_ids(["w1", "w5"])])
    assert tokens.tolist() == [[1, 5]]
    assert torch.isfinite(model(tokens).logits).all()
    done("run", f"out/{name}/recipe.yml", f"again/{name}", "-q")
    assert everything(llamas / "again" / name) == everything(llamas / "out" / name)


def test_layers_of_a_frankenmerge(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llamas)
    Path("layers.yml").write_text(LLAMA_RECIPES["scaled_frankenmerge"])
    done("run", "layers.yml", "layers.safetensors")
    found, model = load_file(llamas / "layers.safetensors"), load_file(llamas / "a/model.safetensors")
    for layer, origin in enumerate([0, 1, 2, 2, 3]):
        for part in ("self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj"):
            scale = 0 if layer > 2 and part != "self_attn.q_proj" else 1
            wanted = scale * model[f"model.layers.{origin}.{part}.weight"]
            np.testing.assert_array_equal(found[f"model.layers.{layer}.{part}.weight"], wanted)
