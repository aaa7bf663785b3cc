"""What whole processes do when something goes wrong: killed, out of room, given damaged or changing files.

Each fault is an error that names the file; at the target is what was there before, and nothing is left beside it.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

MAIN = "from mergekit_cl.cli import main; main()"
LINEAR = ("-m", "linear", "-p", "weight=0.25,0.75")
TENSORS = 100  # of the larger models

COUNTED = """
import atexit, os, signal, sys
left = {left}
def hook(event, args):
    global left
    if event == "ctypes.dlsym":
        ours = "renameat2" in args
    else:
        ours = event in {events} and any("{name}." in str(each) for each in args)
    if ours:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
atexit.register(lambda: print("events", -left, file=sys.stderr))
"""
"""Kills the process before it asks the system for one more change of the files beside the target."""
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """What --json printed."""
        assert self.code == 0, self
        facts: dict[str, Any] = json.loads(self.out)
        return facts


def start(*arguments: object, before: str = "", wrapper: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, with a line of Python to run first, or a command to wrap it."""
    command = [*wrapper, sys.executable, "-c", f"{before}\n{MAIN}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=50)
    return Ended(process.returncode, out, err)


def run(*arguments: object, before: str = "", wrapper: Sequence[str] = ()) -> Ended:
    return ended(start(*arguments, before=before, wrapper=wrapper))


def merging(
    out: Path, *models: Path, base: Path | None = None, method: Sequence[str] = LINEAR, more: Sequence[str] = ()
) -> list[object]:
    """Spell a merge that goes tensor by tensor, in one thread."""
    basis = [] if base is None else ["--base", base]
    return ["merge", *models, *method, *basis, "-o", out, "--json", "--threads", "1", "--backend", "numpy", *more]


def contents(path: Path) -> dict[str, bytes | None]:
    """Read a file, or all that is in a folder, hidden files too; a folder has ``None``."""
    if not path.is_dir():
        return {"": path.read_bytes()} if path.exists() else {}
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() else None
        for each in sorted(path.rglob("*"))
        if each.is_file() or each.is_dir()
    }


def check_refused(result: Ended, *words: object) -> None:
    """Check that a fault is one readable error with these words."""
    assert result.code == 1, result
    assert result.err.startswith("error: "), result.err
    assert "Traceback" not in result.err
    assert "should not have happened" not in result.err
    for word in words:
        assert str(word) in result.err, result.err
    if result.out:
        assert result.err.strip() == "error: " + json.loads(result.out)["error"]["message"]


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Check that a folder is as it was: nothing lost, nothing new, no staging."""
    before = contents(folder)
    yield
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after == before


def save(folder: Path, tensors: Mapping[str, Any], shards: int = 1) -> Path:
    """Write a model as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    place = {name: files[number * shards // len(tensors)] for number, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def tensors_of(seed: int, count: int = 6, rows: int = 20) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {f"layers.{n:03d}.weight": generator.standard_normal((rows, 100)).astype(np.float32) for n in range(count)}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make models "a" of one file and "b" of three: 6 tensors of 8000 bytes each. Not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    save(folder / "a", tensors_of(1))
    save(folder / "b", tensors_of(2), shards=3)
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make models that take about a second to merge: "base", "a", and "b" of three files. Not to be changed."""
    folder = tmp_path_factory.mktemp("large")
    save(folder / "base", tensors_of(3, TENSORS, 300))
    save(folder / "a", tensors_of(4, TENSORS, 300))
    save(folder / "b", tensors_of(5, TENSORS, 300), shards=3)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Make a folder for results, with an old model "old" in three shards, and its config."""
    folder = tmp_path / "results"
    save(folder / "old", tensors_of(9), shards=3)
    return folder


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """Copy the small models, to damage them."""
    shutil.copytree(small, tmp_path / "own")
    return tmp_path / "own"


# Killed


def slowly(out: Path, large: Path, *more: str) -> list[object]:
    """Spell a merge of the large models by TIES, with so little memory that only a few tensors are looked at together."""
    more = ("--memory", "170MB", *more)
    return merging(out, large / "a", large / "b", base=large / "base", method=("-m", "ties", "-p", "density=0.4"), more=more)


def complete(out: Path) -> int:
    """Count the tensors in the journal of a merge."""
    try:
        return (out.parent / f".{out.name}.merging" / "journal").read_bytes().count(b"\n") - 1
    except (FileNotFoundError, NotADirectoryError):
        return -1


def has_completed(out: Path, tensors: int) -> bool:
    return complete(out) >= tensors


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Wait until something has happened; False if the process has ended before."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.0005)
    return False


@contextmanager
def paused(process: subprocess.Popen[str], out: Path, tensors: int = 1) -> Iterator[None]:
    """Stop a merge when it has completed so many tensors, and let it go on after the block."""
    assert wait_for(process, lambda: complete(out) >= tensors), ended(process)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert complete(out) >= tensors, "it was too fast"
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


SCENES: dict[str, tuple[bool, str, tuple[str, ...]]] = {
    "linear-file": (False, "out.safetensors", ()),
    "linear-replacing": (False, "old", ("--overwrite", "--out-shard-size", "6MB")),
    "ties-shards": (True, "out", ("--out-shard-size", "3MB")),
    "ties-replacing": (True, "old", ("--overwrite",)),
}


@pytest.mark.parametrize("scene", SCENES)
def test_killed_and_resumed(scene: str, large: Path, results: Path, tmp_path: Path) -> None:
    ties, name, more = SCENES[scene]
    generator = random.Random(scene)

    def command(folder: Path) -> list[object]:
        if ties:
            return slowly(folder / name, large, *more)
        return merging(folder / name, large / "a", large / "b", more=more)

    counting = partial(COUNTED.format, events=EVENTS, name=f"/.{name}")
    old = contents(results / name)
    fresh_folder = tmp_path / "fresh"
    shutil.copytree(results, fresh_folder)
    begin = time.monotonic()
    whole = run(*command(fresh_folder), before=counting(left=0))
    duration = time.monotonic() - begin
    fresh, expected = whole.facts, contents(fresh_folder)
    events = int(whole.err.split()[-1])
    assert sorted(os.listdir(fresh_folder)) == sorted({"old", name})
    assert events > 10
    assert fresh["resumed"] == 0

    def at_a_moment() -> subprocess.Popen[str]:
        process = start(*command(results))
        time.sleep(duration * generator.uniform(0.2, 1.0))
        process.kill()
        return process

    def at_a_tensor() -> subprocess.Popen[str]:
        process, tensors = start(*command(results)), generator.randrange(1, TENSORS * 2 // 3)
        wait_for(process, lambda: complete(results / name) >= tensors)
        process.kill()
        return process

    def at_a_change() -> subprocess.Popen[str]:
        return start(*command(results), before=counting(left=generator.randint(1, events)))

    for way in (at_a_tensor, at_a_moment, at_a_change):
        killed = ended(way())
        assert killed.code in (-signal.SIGKILL, 0)
        there, done = contents(results / name), complete(results / name)
        assert there in (old, contents(fresh_folder / name)), f"{way.__name__}: half a model is there"
        assert way is not at_a_tensor or done > 0
        resumed = run(*command(results))
        if there != old and "--overwrite" not in more:
            check_refused(resumed, results / name, "exists")
        else:
            assert resumed.facts["resumed"] in (max(0, done), max(0, done - 1))  # the last line may be torn
            left = TENSORS - resumed.facts["resumed"]
            assert resumed.facts["read"] * TENSORS == fresh["read"] * left, way.__name__
            assert contents(results) == expected, way.__name__
        shutil.rmtree(results)
        save(results / "old", tensors_of(9), shards=3)
        assert contents(results / name) == old


def test_killed_at_each_of_the_last_changes(small: Path, results: Path, tmp_path: Path) -> None:
    counting = partial(COUNTED.format, events=EVENTS, name="/.old")

    def command(folder: Path) -> list[object]:
        method = ("-m", "ties", "-p", "density=0.5")
        return merging(folder / "old", small / "a", small / "b", base=small / "a", method=method, more=["--overwrite"])

    old = contents(results)
    folders = [shutil.copytree(results, tmp_path / f"{number}") for number in range(9)]
    whole = run(*command(results), before=counting(left=0))
    new, events = contents(results), int(whole.err.split()[-1])
    assert sorted(os.listdir(results)) == ["old"]
    killed = [start(*command(folder), before=counting(left=events - number)) for number, folder in enumerate(folders)]
    assert [ended(process).code for process in killed] == [-signal.SIGKILL] * len(folders)
    found = [contents(folder / "old") for folder in folders]
    target_old, target_new = ({k[4:]: v for k, v in each.items() if k.startswith("old/")} for each in (old, new))
    assert all(each in (target_old, target_new) for each in found)
    assert found[0] == target_new
    assert found[-1] == target_old
    resumed = [start(*command(folder)) for folder in folders]
    for process in resumed:
        ending = ended(process)
        assert ending.code == 0, ending
    assert all(contents(folder) == new for folder in folders)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_the_system_sees_that_a_resumed_merge_reads_less(large: Path, results: Path) -> None:
    def bytes_read(process: subprocess.Popen[str]) -> int:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # the counters are there until it is waited for
        (line,) = (line for line in Path(f"/proc/{process.pid}/io").read_text().splitlines() if line.startswith("rchar"))
        assert ended(process).code == 0
        return int(line.split()[1])

    fresh = bytes_read(start(*slowly(results / "fresh", large)))
    for tensors in (
        TENSORS // 2,
        TENSORS // 2 + 10,
    ):  # what the first one has done, the third one finds in the second one's journal
        process = start(*slowly(results / "out", large))
        assert wait_for(process, partial(has_completed, results / "out", tensors)), ended(process)
        process.kill()
        ended(process)
    resumed = bytes_read(start(*slowly(results / "out", large)))
    tensor = 300 * 100 * 4
    # half of the tensors: not read from three models, and read back once at the beginning in place of once at the end
    assert fresh - resumed > 0.95 * 3 * tensor * TENSORS / 2
    assert contents(results / "out") == contents(results / "fresh")


def test_interrupted(large: Path, results: Path) -> None:
    old = contents(results / "old")
    process = start(*slowly(results / "old", large, "--overwrite"))
    assert wait_for(process, lambda: complete(results / "old") >= 10)
    process.send_signal(signal.SIGINT)
    result = ended(process)
    assert result.code == 130
    assert "interrupted" in result.err
    assert "goes on" in result.err
    assert "Traceback" not in result.err
    assert contents(results / "old") == old
    done = complete(results / "old")
    assert done >= 10
    assert run(*slowly(results / "old", large, "--overwrite")).facts["resumed"] == done
    run(*slowly(results / "fresh", large)).facts  # noqa: B018 - succeeds
    assert contents(results / "old") == contents(results / "fresh")
    assert sorted(os.listdir(results)) == ["fresh", "old"]


def test_work_for_another_merge_is_dropped(large: Path, results: Path) -> None:
    process = start(*slowly(results / "out", large))
    assert wait_for(process, lambda: complete(results / "out") >= 10)
    process.kill()
    ended(process)
    other = merging(results / "out", large / "a", large / "b")
    assert run(*other).facts["resumed"] == 0
    merged = load_file(results / "out" / "model.safetensors")["layers.000.weight"]
    expected = 0.25 * tensors_of(4, 1, 300)["layers.000.weight"] + 0.75 * tensors_of(5, 1, 300)["layers.000.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(results)) == ["old", "out"]


# No room


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_room_is_checked_first(replacing: bool, small: Path, results: Path) -> None:
    before = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=47_999)"
    out, more = (results / "old", ["--overwrite"]) if replacing else (results / "out", [])
    with kept(results):
        result = run(*merging(out, small / "a", small / "b", more=more), before=before)
    check_refused(result, out, "47,999 are free")


def test_files_may_not_be_that_large(large: Path, results: Path) -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    with kept(results):
        result = run(*merging(results / "old", large / "a", large / "b", more=["--overwrite"]), before=before)
    check_refused(result, "model.safetensors", "File too large", "the result needs 12,0")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process cannot be set")
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_write_fails_half_way(replacing: bool, large: Path, results: Path) -> None:
    out, more = (results / "old", ["--overwrite"]) if replacing else (results / "out", [])
    with kept(results):
        process = start(*slowly(out, large, *more))
        with paused(process, out):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 10, 1 << 10))
        result = ended(process)
    check_refused(result, f".{out.name}.merging", "File too large")


ON_A_SMALL_DISK = """
disk=$1 old=$2 size=$3 mode=$4; shift 4
mount -t tmpfs -o size=$size none "$disk" && cp -r "$old" "$disk/old" && mount -o remount,$mode "$disk" || exit 77
"$@"; code=$?
diff -r "$old" "$disk/old" && test "$(ls -A "$disk")" = old || exit 78
exit $code
"""


def small_disk(folder: Path, old: Path, size: str, mode: str = "rw") -> list[str]:
    """Wrap a command: it finds a disk of this size mounted at the folder, with an old model, which must be all that is left."""
    folder.mkdir()
    script = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(folder), str(old), size, mode]
    wrapper = ["unshare", "--user", "--map-root-user", "--mount", *script]
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    return wrapper


BLIND = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 60)"


@pytest.mark.parametrize(("name", "more"), [("out", []), ("old", ["--overwrite"])])
def test_a_full_disk(name: str, more: list[str], large: Path, results: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    wrapper = small_disk(disk, results / "old", "4m")
    command = merging(disk / name, large / "a", large / "b", more=more)
    noticed, full = start(*command, wrapper=wrapper), start(*command, wrapper=wrapper, before=BLIND)
    check_refused(ended(noticed), disk / name, "the result needs 12,0", "are free")
    check_refused(ended(full), f".{name}.merging", "No space left on device", "the result needs 12,0", "free some room")


def test_a_disk_that_is_full_for_what_lies_beside_the_weights(own: Path, results: Path, tmp_path: Path) -> None:
    (own / "a" / "tokenizer.json").write_bytes(b" " * 3_000_000)
    disk = tmp_path / "disk"
    wrapper = small_disk(disk, results / "old", "1m")
    result = run(*merging(disk / "old", own / "a", own / "b", more=["--overwrite"]), wrapper=wrapper)
    check_refused(result, "tokenizer.json", "No space left on device")


# Places that cannot be written, inputs that cannot be read


def test_a_disk_that_is_read_only(small: Path, results: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    wrapper = small_disk(disk, results / "old", "4m", "ro")
    processes = [
        start(*merging(disk / name, small / "a", small / "b", more=["--overwrite"]), wrapper=wrapper)
        for name in ("old", "new", "x.safetensors", "new/er")
    ]
    for process in processes:
        check_refused(ended(process), disk, "write elsewhere")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder of Linux")
def test_folders_that_take_no_files(small: Path) -> None:
    places = [Path("/proc/merged"), Path("/proc/merged.safetensors"), Path("/sys/merged/model")]
    processes = [start(*merging(place, small / "a", small / "b")) for place in places]
    for place, process in zip(places, processes, strict=True):
        check_refused(ended(process), place.parent)
        assert not place.exists()


def test_a_file_where_a_folder_should_be(small: Path, results: Path) -> None:
    (results / "notes.txt").write_text("mine")
    with kept(results):
        for more in ([], ["--overwrite"]):
            check_refused(
                run(*merging(results / "notes.txt" / "out", small / "a", small / "b", more=more)), "notes.txt", "not a folder"
            )
        check_refused(run(*merging(results / "notes.txt", small / "a", small / "b", more=["--overwrite"])), "notes.txt")


def _no_such_folder(own: Path) -> None:
    shutil.rmtree(own / "b")


def _empty_folder(own: Path) -> None:
    _no_such_folder(own)
    (own / "b").mkdir()


def _damaged_config(own: Path) -> None:
    (own / "b" / "config.json").write_text('{"model_type": ')


def _no_shard(own: Path) -> None:
    (own / "b" / "model-00002-of-00003.safetensors").unlink()


def _cut_shard(own: Path) -> None:
    os.truncate(own / "b" / "model-00002-of-00003.safetensors", 9000)


def _empty_shard(own: Path) -> None:
    os.truncate(own / "b" / "model-00002-of-00003.safetensors", 0)


def _moved_tensor(own: Path) -> None:
    index = own / "b" / "model.safetensors.index.json"
    changed = json.loads(index.read_text())
    changed["weight_map"]["layers.000.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(changed))


def _garbage_index(own: Path) -> None:
    (own / "b" / "model.safetensors.index.json").write_bytes(random.Random(0).randbytes(300))


def _no_index(own: Path) -> None:
    (own / "b" / "model.safetensors.index.json").unlink()


def _pickle(own: Path, name: str = "pytorch_model.bin") -> None:
    _empty_folder(own)
    (own / "b" / name).write_bytes(pickle.dumps(Explosive(own / "results" / "exploded")))


def _pickle_in_disguise(own: Path) -> None:
    _pickle(own, "model.safetensors")


def _gguf(own: Path) -> None:
    _empty_folder(own)
    (own / "b" / "model-q4.gguf").write_bytes(b"GGUF" + bytes(60))


class Explosive:
    """What makes a file when its pickle is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


BAD_INPUTS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (_no_such_folder, ("/b", "no such")),
    (_empty_folder, ("/b", "no .safetensors file")),
    (_damaged_config, ("/b/config.json", "not valid JSON")),
    (_no_shard, ("/b/model-00002-of-00003.safetensors", "is missing", "layers.002.weight")),
    (_cut_shard, ("/b/model-00002-of-00003.safetensors", "truncated", "has 9000 bytes", "layers.003.weight")),
    (_empty_shard, ("/b/model-00002-of-00003.safetensors", "is empty")),
    (_moved_tensor, ("/b/model-00003-of-00003.safetensors", 'lacks tensor "layers.000.weight"', "model-00001-of-00003")),
    (_garbage_index, ("/b/model.safetensors.index.json", "not UTF-8")),
    (_no_index, ("/b", "without their index", "model.safetensors.index.json")),
    (_pickle, ("pytorch_model.bin", "is a pickle", "safe_serialization=True")),
    (_pickle_in_disguise, ("/b/model.safetensors", "is a pickle")),
    (_gguf, ("model-q4.gguf", "GGUF", "convert")),
]


@pytest.mark.parametrize(("damage", "words"), BAD_INPUTS, ids=[damage.__name__[1:] for damage, _ in BAD_INPUTS])
def test_an_input_that_cannot_be_read(damage: Callable[[Path], None], words: Sequence[str], own: Path) -> None:
    save(own / "results" / "old", tensors_of(9))
    damage(own)
    with kept(own):
        result = run(*merging(own / "results" / "old", own / "a", own / "b", more=["--overwrite"]))
    check_refused(result, *words)


def test_pickles_are_not_opened(small: Path, results: Path, tmp_path: Path) -> None:
    trap = Explosive(tmp_path / "exploded")
    pickle.loads(pickle.dumps(trap))
    trap.path.rmdir()  # opening it would have done that
    arguments: list[list[object]] = []
    files = []
    for name in ("pytorch_model.bin", "weights.pt", "weights.pth", "weights.ckpt"):
        files.append(tmp_path / name)
        files[-1].write_bytes(pickle.dumps(trap))
        arguments.append(merging(results / "out", small / "a", files[-1]))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {small}/a}}, {{model: {files[0]}}}]\nparameters: {{weight: 1}}\n"
    )
    arguments.append(["run", recipe, results / "out"])
    with kept(results):
        for process, path in zip([start(*each) for each in arguments], [*files, files[0]], strict=True):
            check_refused(ended(process), path.name, "pickle", "safetensors.torch.save_file")
    assert not trap.path.exists()


# Headers that are wrong


def entry(begin: int, end: int, **more: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end], **more}


HEADERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "overlapping": ({"x": entry(0, 8), "y": entry(4, 12), "z": entry(12, 16, shape=[1])}, ('"y"', 'overlaps tensor "x"')),
    "negative": ({"x": entry(-8, 0), "y": entry(0, 8)}, ('"x"', "data_offsets")),
    "beyond": ({"x": entry(0, 8), "y": entry(8, 4008, shape=[1000])}, ("truncated", '"y"')),
    "far-beyond": ({"x": entry(0, 8), "y": entry(8, 8 + 2**62, shape=[2**60])}, ("truncated", '"y"')),
    "reversed": ({"x": entry(0, 8), "y": entry(16, 8)}, ('"y"', "reversed")),
    "gap": ({"x": entry(0, 4, shape=[1]), "y": entry(8, 16)}, ('"y"', "belong to no tensor")),
    "twice": (b'{"x": %b, "x": %b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), ('"x" is given twice',)),
    "shape": ({"x": entry(0, 8), "y": entry(8, 16, shape=[3])}, ('"y"', "takes 12")),
    "dtype": ({"x": entry(0, 8), "y": entry(8, 16, dtype="F31")}, ('"y"', "F31")),
    "garbage": (random.Random(1).randbytes(100), ("header", "damaged or not safetensors")),
    "not-json": (b"{" * 5000, ("header", "not valid JSON")),
}


def test_headers_that_are_wrong(small: Path, results: Path, tmp_path: Path) -> None:
    expected: dict[Path, tuple[str, ...]] = {}
    for name, (header, words) in HEADERS.items():
        path = tmp_path / f"{name}.safetensors"
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
        expected[path] = words
    hundred = tmp_path / "hundred-gigabytes.safetensors"
    hundred.write_bytes((100 * 10**9).to_bytes(8, "little") + bytes(100))
    expected[hundred] = ("100000000000",)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(random.Random(2).randbytes(5000))
    expected[noise] = ("damaged or not safetensors",)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"  # of memory, in bytes
    with kept(results):
        for group in (list(expected)[::2], list(expected)[1::2]):
            processes = [start(*merging(results / "out", small / "a", path), before=limited) for path in group]
            for path, process in zip(group, processes, strict=True):
                check_refused(ended(process), path, *expected[path])


# Numbers that are not finite


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_nan_in_a_shard(method: str, own: Path, results: Path) -> None:
    shard = own / "b" / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["layers.002.weight"][3, :7] = np.nan
    tensors["layers.003.weight"][0, 0] = -np.inf
    save_file(tensors, shard)
    given: dict[str, Any] = {}
    if method == "ties":
        given = {"base": own / "a", "method": ("-m", "ties", "-p", "density=0.5")}
    with kept(results):
        result = run(*merging(results / "old", own / "a", own / "b", more=["--overwrite"], **given))
    check_refused(result, shard, '"layers.002.weight": 7 NaN', '"layers.003.weight": 1 Inf')


def test_a_result_beyond_its_dtype(own: Path, results: Path) -> None:
    tensors = tensors_of(1)
    tensors["layers.004.weight"][2, 2] = 70_000  # float16 ends at 65504
    for name in ("a", "c"):
        save(own / name, tensors)
    with kept(results):
        command = merging(results / "out", own / "a", own / "c", more=["--out-dtype", "float16"])
        check_refused(run(*command), '"layers.004.weight"', "overflow float16")
    assert run(*command[:-1], "float32").facts["merged"] == 6


# Inputs that change during the merge


def _truncate(shard: Path) -> None:
    os.truncate(shard, 1_000_000)


def _replace(shard: Path) -> None:
    other = shard.with_name("other")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    os.replace(other, shard)


def _change_a_byte(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


@pytest.mark.parametrize(
    "change",
    [_truncate, _replace, _change_a_byte, Path.unlink],
    ids=["truncate", "replace", "change_a_byte", "unlink"],
)
def test_a_shard_that_changes_during_the_merge(
    change: Callable[[Path], None], large: Path, results: Path, tmp_path: Path
) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(large / name, tmp_path / "large" / name)
    shard = tmp_path / "large" / "b" / "model-00003-of-00003.safetensors"
    with kept(results):
        process = start(*slowly(results / "old", tmp_path / "large", "--overwrite"))
        with paused(process, results / "old"):
            change(shard)
        result = ended(process)
    check_refused(result, shard)


def test_an_input_that_changed_since_the_merge_was_killed(large: Path, results: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(large / name, tmp_path / "large" / name)
    process = start(*slowly(results / "out", tmp_path / "large"))
    assert wait_for(process, lambda: complete(results / "out") >= 10)
    process.kill()
    ended(process)
    first = load_file(tmp_path / "large" / "a" / "model.safetensors")
    first["layers.000.weight"][:] = 5
    save_file(first, tmp_path / "large" / "a" / "model.safetensors", {"format": "pt"})
    assert run(*slowly(results / "out", tmp_path / "large")).facts["resumed"] == 0
    assert load_file(results / "out" / "model.safetensors")["layers.000.weight"].max() > 4


# Two merges into one place


def test_another_merge_is_writing(large: Path, small: Path, results: Path) -> None:
    process = start(*slowly(results / "out", large))
    with paused(process, results / "out"), kept(results):
        check_refused(run(*merging(results / "out", small / "a", small / "b")), results / "out", "another merge is writing")
        check_refused(
            run(*merging(results / "out", small / "a", small / "b", more=["--overwrite"])), "another merge is writing"
        )
    assert ended(process).facts["merged"] == TENSORS
    assert sorted(os.listdir(results)) == ["old", "out"]


def test_one_of_several_merges_wins(small: Path, results: Path) -> None:
    processes = [start(*merging(results / "out", small / "a", small / "b")) for _ in range(4)]
    endings = [ended(process) for process in processes]
    assert sorted(ending.code for ending in endings) == [0, 1, 1, 1], endings
    for ending in endings:
        if ending.code:
            check_refused(ending, results / "out")
            assert "another merge is writing" in ending.err or "exists" in ending.err
    assert sorted(os.listdir(results)) == ["old", "out"]
    assert run("verify", results / "out").code == 0


# verify


def _flipped(out: Path) -> None:
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)


def _truncated(out: Path) -> None:
    os.truncate(out / "model-00002-of-00003.safetensors", 9000)


def _without_a_shard(out: Path) -> None:
    (out / "model-00002-of-00003.safetensors").unlink()


def _stale_shard(out: Path) -> None:
    shutil.copy(out / "model-00002-of-00003.safetensors", out / "model-00004-of-00004.safetensors")


def _pointing_elsewhere(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["layers.002.weight"] = "model-00003-of-00003.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def _rewritten(out: Path) -> None:
    shard = out / "model-00002-of-00003.safetensors"
    save_file(load_file(shard), shard)


DAMAGES: dict[Callable[[Path], None], tuple[str, ...]] = {
    _flipped: ("/model-00002-of-00003.safetensors", '"layers.003.weight"', "damaged"),
    _truncated: ("/model-00002-of-00003.safetensors", "truncated"),
    _without_a_shard: ("/model-00002-of-00003.safetensors", "is missing"),
    _stale_shard: ("/model-00004-of-00004.safetensors", "does not belong to the model"),
    _pointing_elsewhere: ("/model-00003-of-00003.safetensors", '"layers.002.weight"', "is missing"),
    _rewritten: ("/model-00002-of-00003.safetensors", "holds no checksums"),
}


def test_verify(small: Path, results: Path) -> None:
    out = results / "out"
    assert run(*merging(out, small / "a", small / "b", more=["--out-shard-size", "16kB"])).code == 0
    expected: dict[Path, tuple[str, ...]] = {out: ()}
    for damage, words in DAMAGES.items():
        expected[out.with_name(damage.__name__)] = words
        shutil.copytree(out, out.with_name(damage.__name__))
        damage(out.with_name(damage.__name__))
    expected[results / "nowhere"] = ("nowhere",)
    expected[small / "a"] = ("holds no checksums",)
    with kept(results):
        processes = [start("verify", place, "--json") for place in expected]
        good, *bad = map(ended, processes)
    assert good.facts == {"verified": str(out), "files": 3, "tensors": 6, "bytes": 48_000}
    for result, (place, words) in zip(bad, list(expected.items())[1:], strict=True):
        check_refused(result, place, *words)


# What is replaced, and what is not


def test_no_shard_and_no_index_of_the_old_model_survives(small: Path, results: Path) -> None:
    one = merging(results / "old", small / "a", small / "b", more=["--overwrite"])
    (results / "old" / "special_tokens_map.json").write_text("{}")
    check_refused(run(*one[:-1]), results / "old", "exists", "--overwrite")
    assert run(*one).code == 0
    assert sorted(os.listdir(results / "old")) == ["README.md", "config.json", "model.safetensors", "recipe.yml"]
    assert run(*one, "--out-shard-size", "16kB").code == 0
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    weights = sorted(path.name for path in (results / "old").glob("model*"))
    assert weights == [*shards, "model.safetensors.index.json"]
    assert os.listdir(results) == ["old"]
    assert run("verify", results / "old").code == 0


def test_what_is_never_replaced(own: Path, results: Path) -> None:
    (results / "photos").mkdir()
    (results / "photos" / "cat.jpg").write_bytes(b"cat")
    (results / "notes.safetensors").write_text("mine")
    (results / "link").symlink_to(results / "old")
    (results / "file.safetensors").symlink_to(results / "notes.safetensors")
    (own / "input").symlink_to(own / "b")
    refusals = {
        results / "photos": "not of a model",
        results / "link": "is a symbolic link",
        results / "file.safetensors": "is a symbolic link",
        own / "a": "inputs are never changed",
        own / "b": "inputs are never changed",
        own / "a" / "model.safetensors": "inputs are never changed",
        own: "inputs are never changed",
    }
    with kept(own), kept(results):
        processes = [start(*merging(place, own / "a", own / "input", more=["--overwrite"])) for place in refusals]
        for (place, words), process in zip(refusals.items(), processes, strict=True):
            check_refused(ended(process), place, words)
    assert (results / "link").is_symlink()
    assert (results / "file.safetensors").is_symlink()


def test_a_file_is_replaced_when_the_new_one_is_complete(own: Path, results: Path) -> None:
    out = results / "merged.safetensors"
    save_file(tensors_of(8), out)
    tensors = tensors_of(1)
    tensors["layers.005.weight"][0, 0] = np.nan
    shutil.copytree(own / "b", own / "c")
    good = merging(out, own / "b", own / "c", more=["--overwrite"])
    save(own / "a", tensors)
    with kept(results):
        check_refused(run(*good[:-1]), out, "exists")
        check_refused(run(*merging(out, own / "a", own / "b", more=["--overwrite"])), own / "a" / "model.safetensors", "1 NaN")
    assert run(*good).code == 0
    for name, values in load_file(out).items():
        np.testing.assert_allclose(values, tensors_of(2)[name], rtol=1e-6)
    assert sorted(os.listdir(results)) == ["merged.safetensors", "old"]
