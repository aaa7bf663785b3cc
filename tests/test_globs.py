"""Which tensors are merged: globs on names."""

from typing import Any

import pytest

from mergekit_cl import MergeError
from mergekit_cl.globs import check_globs, chosen, globs_of, matches

NAMES = ["model.layers.0.mlp.weight", "model.layers.10.mlp.weight", "model.norm.weight", "lm_head.weight", "lm_head.bias", ""]


@pytest.mark.parametrize(
    ("only", "exclude", "merged"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        ([], (), [0, 1, 2, 3, 4, 5]),
        ("*layers*", None, [0, 1]),
        ("model.*.weight", None, [0, 1, 2]),  # a star matches dots too
        (None, "*.weight", [4, 5]),
        (["lm_head.*", "*norm*"], ["*.bias"], [2, 3]),
        ("lm_head.weight", None, [3]),
        ("lm_head", None, []),  # the whole name has to match
        ("*layers.?.*", None, [0]),
        ("*layers.[1-9]*", None, [1]),
        ("LM_HEAD*", None, []),  # capitals count
        ("*", "*", []),
        (iter(["lm_head.*"]), iter(["*.bias"]), [3]),
    ],
)
def test_only_and_exclude(only: Any, exclude: Any, merged: list[int]) -> None:
    rule = chosen(only, exclude)
    assert [number for number, name in enumerate(NAMES) if rule(name)] == merged


@pytest.mark.parametrize("globs", ["", [""], ["a", 3], [None], {"a": 1}.values(), [["a"]]])
def test_what_is_no_glob(globs: Any) -> None:
    with pytest.raises(MergeError, match=r"only=.*must be a glob on the names of tensors, or a list"):
        globs_of("only", globs)


@pytest.mark.parametrize("globs", [3, True, 1.5])
def test_what_is_not_even_a_list(globs: Any) -> None:
    with pytest.raises(MergeError, match="only="):
        globs_of("only", globs)


def test_globs_that_match_nothing_are_all_named() -> None:
    check_globs(["*norm*", "lm_head.bias"], "*.weight", NAMES)
    check_globs(None, None, [])
    with pytest.raises(MergeError) as caught:
        check_globs(["*nrom*", "*norm*"], ["lm_haed.*"], iter(NAMES))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["only", "exclude"]
    assert '"*nrom*" matches no tensor' in lines[0]
    assert '"lm_haed.*" matches no tensor' in lines[1]
    assert lines[0].endswith("names are such as model.norm.weight")  # one that is spelled nearly as the glob
    assert lines[1].endswith("names are such as lm_head.weight, lm_head.bias")
    with pytest.raises(
        MergeError, match=r'"lm_head" matches no tensor; a glob has to match the whole name, as "\*lm_head\*" would'
    ):
        check_globs(None, "lm_head", NAMES)
    with pytest.raises(MergeError, match=f"such as {', '.join(NAMES[:3])}$"):
        check_globs("*zzz*", None, NAMES)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("*", [0, 1, 2, 3, 4, 5]),
        ("mlp", [0, 1]),
        ("MLP", []),
        ("layers.1", [1]),
        ("layers.?.*", []),  # with the characters of a glob the whole name has to match
        ("*layers.?.*", [0]),
        ("*.[lm]*", [0, 1]),
        ("lm_head.[!w]*", [4]),
        ("model.*.weight", [0, 1, 2]),
        ("norm.weight", [2]),
        ("", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_filters_are_globs_or_parts_of_names(pattern: str | None, matched: list[int]) -> None:
    assert [number for number, name in enumerate(NAMES) if matches(pattern, name)] == matched
