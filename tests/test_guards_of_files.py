"""What no other test of merges into files would notice if it went wrong: found by faults that were put in on purpose."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from mergekit_cl import CheckpointError, MergeError, Scope, companions, file_merge, merge, method, out_of_core
from mergekit_cl.api import prepare_files
from mergekit_cl.checkpoint import stored as stored_tensors
from mergekit_cl.checkpoint.folder import open_checkpoint
from mergekit_cl.checkpoint.reference import ModelRef, open_reference
from mergekit_cl.checkpoint.stored import DataFile, Stored
from mergekit_cl.execute import WINDOW, Executor
from mergekit_cl.file_merge import FileMerge, prepare_recipe
from mergekit_cl.kernels import BLOCK
from mergekit_cl.out_of_core import Budget
from mergekit_cl.recipe import Recipe, read_recipe
from mergekit_cl.steps import Apply
from mergekit_cl.windows import Incoming, Outgoing, Windows

Array = npt.NDArray[Any]


def filled(value: float, *names: str) -> dict[str, Array]:
    return {
        name: np.full((4, 4), value, np.float32)
        for name in names or ("embed_tokens.weight", "layers.0.w.weight", "norm.weight")
    }


def folder(
    path: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None, stem: str = "model", **files: str
) -> Path:
    path.mkdir()
    save_file(dict(tensors), path / f"{stem}.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "tiny"} if config is None else config))
    for name, text in files.items():
        (path / name.replace("_DOT_", ".")).write_text(text)
    return path


def adapter(path: Path, value: float, alpha: float = 1, rank: int = 1, **files: str) -> Path:
    factors = {"A": np.full((rank, 4), value, np.float32), "B": np.full((4, rank), 1, np.float32)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["w"]}
    path.mkdir()
    save_file(
        {f"base_model.model.layers.0.w.lora_{side}.weight": array for side, array in factors.items()},
        path / "adapter_model.safetensors",
        {"made_by": path.name},
    )
    (path / "adapter_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("_DOT_", ".")).write_text(text)
    return path


def recipe_of(models: list[Path], more: str = "", name: str = "linear", parameters: str = "{}") -> Recipe:
    listed = "\n".join(f"- {{model: '{path}', parameters: {{weight: 1}}}}" for path in models)
    return read_recipe(f"merge_method: {name}\nmodels:\n{listed}\nparameters: {parameters}\n{more}\n")


# What the bytes depend on


def print_of(merging: FileMerge, **options: Any) -> str:
    """Hash what the result depends on, but for the text of the recipe, which says some of it a second time."""
    beside = {name: what for name, what in merging.companions.items() if name not in ("recipe.yml", "README.md")}
    return replace(merging, origin="", companions=beside)._fingerprint(**{"backend": "numpy", "nonfinite": "error"} | options)


def test_a_fingerprint_changes_with_everything_that_the_bytes_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [folder(tmp_path / name, filled(value), tokenizer_DOT_json="{}") for name, value in (("a", 1), ("b", 2))]

    def made(**options: Any) -> FileMerge:
        given = {"seed": 0, "out_dtype": None, "only": None, "exclude": None} | options
        parameters = {"density": 0.5, "weight": given.pop("weight", 1.0)}
        kept = {"out": tmp_path / "out", "parameters": parameters, "base": paths[0], **given}
        prepared = prepare_files([paths[1]], "dare_linear", **kept)
        assert isinstance(prepared, FileMerge)
        return prepared

    prints = [print_of(made()), print_of(made(seed=1)), print_of(made(weight=0.5)), print_of(made(out_dtype="float16"))]
    prints += [print_of(made(), nonfinite="allow"), print_of(made(), backend="numba"), print_of(made(exclude="norm*"))]
    origins = [replace(made(), origin=text)._fingerprint("numpy", "error") for text in ("one recipe", "another")]
    assert origins[0] != origins[1]
    (paths[0] / "tokenizer.json").write_text('{"a": 1}')
    prints.append(print_of(made()))
    with monkeypatch.context() as patch:
        patch.setattr(file_merge, "version", lambda _: "another version")
        prints.append(print_of(made()))
    file = paths[1] / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    prints.append(print_of(made()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert print_of(made()) == prints[7]
    assert len(set(prints)) == len(prints) == 10


def test_a_fingerprint_tells_headers_and_places_in_a_file_apart(tmp_path: Path) -> None:
    def of(offset: int = 0, digest: str = "1", size: int = 9) -> str:
        file = DataFile(tmp_path / "a.safetensors", size, 7, digest=digest)
        path = folder(tmp_path / f"{offset}-{digest}-{size}", filled(1)) / "model.safetensors"
        merging = prepare_files([path, path], "linear", out=tmp_path / "out.safetensors", parameters={})
        assert isinstance(merging, FileMerge)
        copies = {"norm.weight": Stored(file, "norm.weight", (4, 4), "float32", offset)}
        same_models = replace(merging.job, plans=(), copies=copies)
        return print_of(replace(merging, job=same_models))

    assert len({of(), of(offset=64), of(digest="2"), of(size=10)}) == 4


def test_a_fingerprint_tells_the_strength_of_an_adapter(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", filled(1))
    lora = adapter(tmp_path / "lora", 1)
    prints = []
    for alpha in (1, 2, 1):
        config = json.loads((lora / "adapter_config.json").read_text())
        (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
        merging = prepare_files([f"{base}+{lora}"], "passthrough", out=tmp_path / "out", parameters={})
        assert isinstance(merging, FileMerge)
        prints.append(print_of(merging))
    assert prints[0] == prints[2] != prints[1]


def test_copied_files_may_not_change_either(tmp_path: Path) -> None:
    base = save_file(filled(1), tmp_path / "base.safetensors") or tmp_path / "base.safetensors"
    model = save_file(filled(2), tmp_path / "model.safetensors") or tmp_path / "model.safetensors"
    merging = prepare_files([model], "passthrough", base=None, out=tmp_path / "out.safetensors", exclude="*", parameters={})
    assert isinstance(merging, FileMerge)
    assert [file.path for file in merging.job.files] == [model]
    os.replace(base, model)
    with pytest.raises(CheckpointError, match="was changed"):
        merging.run()


@pytest.mark.parametrize("what", ["size", "mtime_ns", "inode"])
def test_each_sign_of_a_change_is_looked_at(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    status = path.stat()
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    DataFile(path, **known).check_unchanged()
    with pytest.raises(CheckpointError, match="was changed"):
        DataFile(path, **known | {what: known[what] + 1}).check_unchanged()


# What a call says goes before what its recipe says


def test_arguments_go_before_the_recipe(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name, filled(value)) for name, value in (("a", 1), ("b", 2), ("c", 4))]
    more = f"base_model: '{paths[0]}'\nmergekit_cl: {{seed: 5, only: ['layers*', 'norm*'], exclude: ['norm*']}}"
    recipe = recipe_of(paths[1:], more, "dare_linear", "{density: 0.5}")

    def seed_and_merged(**options: Any) -> tuple[int, list[str]]:
        (plan,) = prepare_recipe(recipe, tmp_path / "out", **options).job.plans
        return plan.scopes[0][0].seed, sorted(item.name for item in plan.items)

    assert seed_and_merged() == (5, ["layers.0.w.weight"])
    assert seed_and_merged(seed=0) == (0, ["layers.0.w.weight"])
    assert seed_and_merged(only=[]) == (5, ["embed_tokens.weight", "layers.0.w.weight"])
    assert seed_and_merged(exclude=[]) == (5, ["layers.0.w.weight", "norm.weight"])
    assert seed_and_merged(exclude="layers*") == (5, ["norm.weight"])


def test_scopes_of_recipes_are_those_that_they_say(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name, filled(value)) for name, value in (("a", 1), ("b", 2), ("c", 4))]
    counts = []
    for scope in ("model", "tensor"):
        recipe = recipe_of(paths[1:], f"base_model: '{paths[0]}'", "ties", f"{{density: 0.5, scope: {scope}}}")
        counts.append([len(plan.scopes) for plan in prepare_recipe(recipe, tmp_path / "out").job.plans])
    assert counts == [[1], [3]]


def test_what_a_recipe_copies_has_no_adapter(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", filled(1))
    lora = adapter(tmp_path / "lora", 1)
    recipe = read_recipe(
        f"merge_method: passthrough\nmodels: [{{model: {{model: {{path: '{base}'}}, lora: {{path: '{lora}'}}}}}}]\n"
    )
    with pytest.raises(MergeError, match=r'"layers\.0\.w\.weight": is left out .* has an adapter to be applied'):
        prepare_recipe(recipe, tmp_path / "out", exclude="layers*")


def test_notes_of_a_recipe_are_handed_on(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name, filled(1), {"tie_word_embeddings": True}) for name in "ab"]
    save_file(filled(1) | filled(2, "lm_head.weight"), paths[0] / "model.safetensors")
    merging = prepare_recipe(recipe_of(paths), tmp_path / "out")
    (note,) = merging.notes
    assert '"lm_head.weight" is left out' in note


# Heads that are tied


@pytest.mark.parametrize(
    ("ties", "heads", "kept"),
    [
        ((None, None), (True, True), True),
        ((None, None), (True, False), True),
        ((None, None), (False, True), False),
        ((True, None), (True, True), False),
        ((False, True), (True, False), True),
        ((False, True), (True, True), True),
    ],
)
@pytest.mark.parametrize("based", [False, True])
def test_the_donor_decides_about_tied_heads(
    ties: tuple[Any, Any], heads: tuple[bool, bool], kept: bool, based: bool, tmp_path: Path
) -> None:
    names = ("embed_tokens.weight", "layers.0.w.weight")
    paths = []
    for number, (tied, head) in enumerate(zip(ties, heads, strict=True)):
        tensors = filled(number + 1, *names) | (filled(10 * (number + 1), "lm_head.weight") if head else {})
        config = {"model_type": "tiny"} | ({} if tied is None else {"tie_word_embeddings": tied})
        paths.append(folder(tmp_path / str(number), tensors, config))
    given: tuple[list[Any], str, dict[str, Any]] = (paths, "linear", {})
    if based:
        given = ([paths[1]], "task_arithmetic", {"base": paths[0]})
    out = merge(given[0], given[1], out=tmp_path / "out", **given[2])
    merged = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in merged) == kept
    if kept:
        other = 20 if heads[1] else 2
        assert merged["lm_head.weight"][0, 0] == (other if based else (10 + other) / 2)


def test_every_model_without_a_head_gets_a_stand_in_unless_it_says_that_it_is_not_tied(tmp_path: Path) -> None:
    first = folder(tmp_path / "0", filled(3) | filled(9, "lm_head.weight"), {"tie_word_embeddings": False})
    others = [folder(tmp_path / str(number), filled(number)) for number in (6, 12)]
    out = merge([first, *others], "linear", out=tmp_path / "out")
    assert load_file(out / "model.safetensors")["lm_head.weight"][0, 0] == 9
    untied = folder(tmp_path / "untied", filled(1), {"tie_word_embeddings": False})
    for models in ([first, untied], [untied, first]):
        with pytest.raises(MergeError, match=r"lm_head\.weight"):
            merge(models, "linear", out=tmp_path / "new")
    out = merge([first, filled(1)], "linear", out=tmp_path / "new")  # what is in memory does not say
    assert load_file(out / "model.safetensors")["lm_head.weight"][0, 0] == 5


# What lies beside the weights


def test_the_stem_is_that_of_the_donors_folder_and_no_files_name(tmp_path: Path) -> None:
    unusual = folder(tmp_path / "a", filled(1), stem="diffusion_pytorch_model")
    assert (merge([unusual], "passthrough", out=tmp_path / "one") / "diffusion_pytorch_model.safetensors").is_file()
    save_file(filled(1), tmp_path / "alone.safetensors")
    assert (merge([tmp_path / "alone.safetensors"], "passthrough", out=tmp_path / "two") / "model.safetensors").is_file()


def test_the_config_names_a_dtype_only_if_it_is_that_of_all(tmp_path: Path) -> None:
    mixed = filled(1, "a") | {"b": np.ones(3, np.float16)}
    given = {"dtype": "float32", "torch_dtype": "float32"}
    out = merge([folder(tmp_path / "mixed", mixed, given | {"dtype": "x"})], "passthrough", out=tmp_path / "one")
    assert json.loads((out / "config.json").read_text()) == given | {"dtype": "x"}
    out = merge([folder(tmp_path / "same", filled(1), given)], "passthrough", out=tmp_path / "two", out_dtype="float16")
    assert json.loads((out / "config.json").read_text()) == {"dtype": "float16", "torch_dtype": "float16"}


def test_the_config_of_a_donor_stays_as_it_is(tmp_path: Path) -> None:
    config = {"text_config": {"layers": 3, "list": [1, 2]}, "layers": 3}
    donor = open_reference(folder(tmp_path / "a", filled(1), config))
    found = companions.companions_of(donor, None, {"text_config.layers": 2, "layers": 2}, None, [], "linear")
    assert json.loads(companions.content(found["config.json"])) == {
        "text_config": {"layers": 2, "list": [1, 2]},
        "layers": 2,
    }
    assert donor.config == config


TOKENIZER = {
    "tokenizer_DOT_json": '{"model": {"vocab": {"a": 0}}}',
    "chat_template_DOT_jinja": "old",
    "Tokenizer_DOT_MODEL": "x",
    "spiece_DOT_spm": "y",
}


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_the_tokenizer_that_was_asked_for(asked: bool, copied: bool, tmp_path: Path) -> None:
    first = folder(tmp_path / "a", filled(1), vocab_DOT_json="{}", LICENSE="mine", **TOKENIZER)
    other = folder(tmp_path / "b", filled(2), LICENSE="theirs", **TOKENIZER | {"chat_template_DOT_jinja": "new"})
    recipe = recipe_of([first, other], f"tokenizer_source: '{other}'" if asked else "")
    merging = prepare_recipe(recipe, tmp_path / "out", copy_tokenizer=copied, write_card=copied)
    found = {name: companions.content(what).decode() for name, what in merging.companions.items()}
    assert ("README.md" in found) == copied
    found.pop("README.md", None)
    found.pop("recipe.yml")
    tokenizer = {name.replace("_DOT_", "."): text for name, text in TOKENIZER.items()} if copied else {}
    if copied:
        tokenizer |= {"chat_template.jinja": "new"} if asked else {"vocab.json": "{}"}
    assert found == {"config.json": found["config.json"], "LICENSE": "mine"} | tokenizer


def test_a_chat_template_replaces_that_of_the_tokenizers_config(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": "é"}
    paths = [folder(tmp_path / name, filled(1), tokenizer_config_DOT_json=json.dumps(config)) for name in "ab"]
    merging = prepare_recipe(recipe_of(paths, "chat_template: '{{ new }}'"), tmp_path / "out")
    assert merging.companions["chat_template.jinja"] == b"{{ new }}"
    assert json.loads(companions.content(merging.companions["tokenizer_config.json"])) == {"bos_token": "é"}


# Adapters


def test_an_adapter_is_made_as_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [adapter(tmp_path / name, value, LICENSE=name) for name, value in (("one", 1), ("two", 2))]
    counted: list[int] = []
    prepared = prepare_files(paths, "cat", out=tmp_path / "out", out_dtype="float16", parameters={"weight": [0.5, 3]})
    prepared.run(advance=counted.append)
    assert sum(counted) == prepared.elements == 16
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype.name for tensor in made.values()} == {"float16"}
    sides = [next(tensor for name, tensor in made.items() if f"lora_{side}" in name) for side in "BA"]
    assert (sides[0] @ sides[1])[0, 0] == 6.5
    assert (tmp_path / "out" / "LICENSE").read_text() == "one"
    assert open_checkpoint(tmp_path / "out").metadata["made_by"] == "one"
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not [link for link in links if link.startswith(str(tmp_path))]
    with pytest.raises(CheckpointError, match="exists"):
        prepared.check(memory=10**9, threads=1, backend="auto")
    with pytest.raises(CheckpointError, match=r"the input .*two"):
        merge(paths, "cat", out=paths[1], overwrite=True)
    merge(paths, "cat", out=tmp_path / "plain")
    made = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    sides = [next(tensor for name, tensor in made.items() if f"lora_{side}" in name) for side in "BA"]
    assert (sides[0] @ sides[1])[0, 0] == 3
    for parameters, message in (({"rank": 0}, "rank"), ({"rank": True}, "rank")):
        with pytest.raises(MergeError, match=message):
            merge(paths, "svd", out=tmp_path / "new", **parameters)


@pytest.mark.parametrize("of_adapters", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_a_result_is_read_back_if_that_was_asked_for(
    verify: bool, of_adapters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("mergekit_cl.checkpoint.writer.Writer._read_back", lambda *_: seen.append(True))
    paths = [(adapter if of_adapters else lambda path, value: folder(path, filled(value)))(tmp_path / x, 1) for x in "ab"]
    merge(paths, "cat" if of_adapters else "linear", out=tmp_path / "out", verify=verify)
    assert bool(seen) == verify


# The arguments of merge


def test_options_of_merge_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "a", filled(1))
    given: dict[str, Any] = {}
    monkeypatch.setattr(FileMerge, "run", lambda self, **options: given.update(options))
    options = {"overwrite": True, "verify": False, "backend": "numpy", "threads": 3, "nonfinite": "allow"}
    merge([path], "passthrough", out=tmp_path / "out", memory="1GB", shard_size="2MB", **options)
    given.pop("advance")
    assert given == options | {"device": "cpu", "memory": 10**9, "shard_size": 2 * 10**6}
    for wrong in ({"backend": "nunba"}, {"threads": 0}, {"nonfinite": "maybe"}):
        with pytest.raises(MergeError, match=next(iter(wrong))):
            merge([path], "passthrough", out=tmp_path / "out", **wrong)


@pytest.mark.parametrize("other", [np.ones(3, np.float32), np.ones(4, np.float16)])
def test_what_is_copied_in_memory_has_to_fit(other: Array) -> None:
    models = [{"a": np.ones(2, np.float32), "b": tensor} for tensor in (other, np.ones(4, np.float32))]
    target = {"a": np.zeros(2, np.float32), "b": np.zeros(4, np.float32)}
    with pytest.raises(MergeError, match='tensor "b": is not merged but copied, and does not fit'):
        merge(models, "linear", exclude="b", out=target)
    assert not target["b"].any()


def test_revisions_of_models_and_adapters_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"org/base": folder(tmp_path / "base", filled(1)), "org/lora": adapter(tmp_path / "lora", 1)}
    asked: list[tuple[Any, Any]] = []

    def resolve(where: str, revision: str | None = None) -> Path:
        asked.append((where, revision))
        return here[where]

    monkeypatch.setattr("mergekit_cl.checkpoint.reference.resolve", resolve)
    opened = open_reference(ModelRef("org/base", "r1", "org/lora", "r2"))
    assert asked == [("org/base", "r1"), ("org/lora", "r2")]
    assert opened.label == opened.checkpoint.label == "org/base@r1+org/lora@r2"
    assert opened.adapter is not None
    assert opened.adapter.label == "org/lora"
    assert [checkpoint.path for checkpoint in opened.checkpoints] == list(here.values())


@pytest.mark.parametrize("by_recipe", [False, True])
def test_an_adapter_that_is_read_is_not_replaced(by_recipe: bool, tmp_path: Path) -> None:
    base, lora = folder(tmp_path / "base", filled(1)), adapter(tmp_path / "lora", 1)
    if by_recipe:
        where = f"{{model: {{path: '{base}'}}, lora: {{path: '{lora}'}}}}"
        merging = prepare_recipe(read_recipe(f"merge_method: passthrough\nmodels: [{{model: {where}}}]\n"), lora)
    else:
        merging = cast(FileMerge, prepare_files([f"{base}+{lora}"], "passthrough", out=lora, parameters={}))
    with pytest.raises(CheckpointError, match=r"the input .*lora"):
        merging.run(overwrite=True)


# Windows


def stored(tmp_path: Path, count: int) -> tuple[Stored, Array]:
    values = np.arange(count, dtype=np.float32)
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 16 + values.tobytes())
    status = path.stat()
    return Stored(DataFile(path, status.st_size, status.st_mtime_ns, status.st_ino), "w", (count,), "float32", 16), values


def test_the_system_is_told_of_the_bytes_that_come_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(DataFile, "advise", lambda self, offset, length: told.append((offset, length)))
    source, values = stored(tmp_path, 40 * BLOCK)
    written = np.zeros(40 * BLOCK, np.float32)

    def write(first: int, data: Array) -> None:
        written[first : first + len(data)] = data

    spans = {"w": (Incoming(source),)}
    merging = prepare_files([{"w": values}], "linear", out=tmp_path / "out.safetensors", parameters={})
    assert isinstance(merging, FileMerge)
    (plan,) = merging.job.plans
    executor = Executor(
        plan, backend="numpy", threads=2, nonfinite="allow", spans=spans,
        outputs=lambda item: Outgoing("float32", 40 * BLOCK, write), window=8 * BLOCK * 8,
    )  # fmt: skip
    executor.run()
    assert (written == values).all()
    shares = [(16 + 8 * BLOCK * 4 * number, 8 * BLOCK * 4) for number in range(5)]
    assert sorted(told) == shares[2:]


def test_buffers_begin_at_a_line_of_the_cache() -> None:
    windows = Windows()
    for size in (1, 100, 1000, 1 << 20):
        memory = windows._buffer(size)
        assert memory.ctypes.data % 64 == 0
        assert len(memory) >= size


# Memory, files and threads


def test_what_the_process_has_counts_before_a_run_too(tmp_path: Path) -> None:
    merging = prepare_files([folder(tmp_path / "a", filled(1))], "passthrough", out=tmp_path / "out", parameters={})
    enough = (96 << 20) + (2 << 20)
    merging.check(memory=enough, threads=1, backend="numpy")
    with pytest.raises(MergeError, match=r"memory: .* are too little"):
        merging.check(memory=enough, threads=1, backend="numpy", held=1)


@pytest.mark.parametrize("by_recipe", [False, True])
def test_a_method_that_fails_does_so_before_anything_is_written(by_recipe: bool, tmp_path: Path) -> None:
    @method(paper="")
    def fails(scope: Scope) -> Apply:
        """Fail."""
        raise ValueError("never")

    path = folder(tmp_path / "a", filled(1))
    out = tmp_path / "out"
    recipe = read_recipe(f"merge_method: fails\nmodels: [{{model: '{path}'}}]\n")
    with pytest.raises(MergeError, match="fails failed with ValueError: never"):
        _ = prepare_recipe(recipe, out) if by_recipe else prepare_files([path], "fails", out=out, parameters={})


def test_a_budget_is_divided_as_it_says() -> None:
    fixed = 96 << 20
    assert Budget.of(fixed + (40 << 20), 4) == Budget(5 << 20, 20 << 20)
    assert Budget.of(fixed + (40 << 20) + 12345, 4, 12345) == Budget(5 << 20, 20 << 20)
    assert Budget.of(10**9, 1) == Budget(WINDOW, 10**9 - fixed - WINDOW)


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    resource = pytest.importorskip("resource")
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: changed.append(new))
    return changed


@pytest.mark.parametrize(
    ("soft", "hard", "count", "expected"),
    [(256, 4096, 200, [(328, 4096)]), (256, 300, 200, [(300, 300)]), (256, -1, 200, [(328, -1)]), (256, 4096, 128, [])],
)
def test_as_many_files_may_be_open_as_are_read(
    soft: int, hard: int, count: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = limits(monkeypatch, soft, hard)
    monkeypatch.setattr(os, "listdir", lambda _: [])
    stored_tensors.allow_open_files(count)
    assert changed == expected


def test_a_run_asks_for_as_many_files_as_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(out_of_core, "allow_open_files", asked.append)
    paths = [folder(tmp_path / name, filled(1)) for name in "abc"]
    merge(paths, "linear", out=tmp_path / "out")
    assert asked == [3]


def test_a_run_passes_on_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Watched(Executor):
        def __init__(self, plan: Any, **options: Any) -> None:
            given.append(options)
            super().__init__(plan, **options)

    monkeypatch.setattr(out_of_core, "Executor", Watched)
    paths = [folder(tmp_path / name, filled(1)) for name in "ab"]
    memory = (96 << 20) + (24 << 20) + 1000
    merging = prepare_files(paths, "linear", out=tmp_path / "out", parameters={})
    merging.run(threads=3, nonfinite="allow", backend="numpy", memory=memory, held=1000)
    (options,) = given
    assert (options["threads"], options["nonfinite"], options["window"]) == (3, "allow", 4 << 20)
    assert options["backend"] == "numpy"


def test_groups_of_scopes_take_half_of_the_room(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.w": np.ones(100, np.float32) for number in range(6)}
    paths = [save_file(tensors, tmp_path / name) or tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    merging = prepare_files(paths[:1], "ties", base=paths[1], out=tmp_path / "out.safetensors", parameters={"density": 0.5})
    assert isinstance(merging, FileMerge)
    (plan,) = merging.job.plans
    each = 100 * (4 + 4)  # the result is written as it is computed

    def cut(room: int) -> list[tuple[int, bool]]:
        return [(len(part.scopes), kept) for part, kept in out_of_core._parts(plan, room)]

    assert cut(4 * each) == [(2, True)] * 3
    assert cut(4 * each - 1) == [(1, True)] * 6
    assert cut(each) == [(1, True)] * 6
    assert cut(each - 1) == [(1, False)] * 6


def test_what_comes_after_a_part_is_announced_if_it_will_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 100, "b": 100_000, "c": 100, "d": 100}
    tensors = {name: np.ones(size, np.float32) for name, size in sizes.items()}
    paths = [save_file(tensors, tmp_path / name) or tmp_path / name for name in ("x.safetensors", "y.safetensors")]
    merging = prepare_files(paths[:1], "ties", base=paths[1], out=tmp_path / "out.safetensors", parameters={"density": 0.5})
    assert isinstance(merging, FileMerge)
    announced: list[list[str]] = []
    monkeypatch.setattr(out_of_core, "_announce", lambda plan: announced.append([item.name for item in plan.items]))
    monkeypatch.setattr(Budget, "of", lambda memory, threads, held=0: Budget(1 << 20, 1300))
    monkeypatch.setattr(out_of_core, "check_memory", lambda *_: None)
    merging.run(threads=1)
    assert announced == [["c"], ["d"]]


def test_progress_counts_what_is_there_already(tmp_path: Path) -> None:
    tensors = {name: np.ones(100 + index, np.float32) for index, name in enumerate("abcd")}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    merging = prepare_files([path], "linear", out=tmp_path / "out.safetensors", exclude=["c", "d"], parameters={})
    assert isinstance(merging, FileMerge)

    class Sink:
        done = frozenset({"a", "c"})
        written: list[str] = []  # noqa: RUF012

        def write(self, name: str, first: int, data: Array) -> None:
            self.written.append(name)

    counted: list[int] = []
    out_of_core.run(merging.job, Sink(), threads=1, advance=counted.append)
    assert sum(counted) == 100 + 101 + 102 + 103
    assert sorted(Sink.written) == ["b", "d"]
