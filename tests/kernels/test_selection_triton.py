"""Selection on the device, against sorting: compiled where there is a GPU, else in Triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from mergekit_cl import select
from mergekit_cl.batches import _place
from mergekit_cl.kernels import MISSED, SPOILED, Keep, Selected, Table, interpreted
from mergekit_cl.kernels import triton as backend
from mergekit_cl.kernels.triton import selection
from mergekit_cl.steps import Cut

Array = npt.NDArray[Any]
pytestmark = pytest.mark.gpu

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
DEVICE = "cpu" if interpreted() else "cuda"
INFINITY = 0x7F800000
KINDS = ["spread", "few", "zero", "equal", "heavy", "infinite", "sorted"]
Scope = list[tuple[Array, ...]]
"""Rows: the base, and the models."""


def span(array: Array) -> Any:
    """Put an array where the kernels run, as many bytes behind a 16-byte boundary as it is here."""
    if interpreted():
        return array
    ahead = array.__array_interface__["data"][0] % 16
    memory = torch.zeros(ahead + array.nbytes, dtype=torch.uint8, device=DEVICE)
    memory[ahead:] = torch.from_numpy(array.view(np.uint8).copy()).to(DEVICE)
    return memory[ahead:].view(getattr(torch, array.dtype.name))


def patterns(row: tuple[Array, ...], model: int) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        x, base = row[1 + model].astype(np.float32), row[0].astype(np.float32)
        return np.where(x == base, 0, np.minimum(np.abs(x - base).view(np.int32), INFINITY))


def found(scopes: Sequence[Scope], ranks: Sequence[Sequence[int]]) -> Array:
    """Select in all scopes together; the rows of one dtype and number of models are one table."""
    groups: dict[Any, list[tuple[list[Any], Array]]] = {}
    count = 0
    for scope, wanted in zip(scopes, ranks, strict=True):
        for row in scope:
            group = groups.setdefault(tuple(array.dtype for array in row), [])
            group.append(([span(array) for array in row], np.arange(count, count + len(wanted))))
        count += len(wanted)
    tables = [Table([row for row, _ in group]) for group in groups.values()]
    numbers = [np.array([own for _, own in group]) for group in groups.values()]
    return backend.select_magnitudes(tables, numbers, np.array([r for each in ranks for r in each], np.int64)).fetch()


def check(selected: Array, scopes: Sequence[Scope], ranks: Sequence[Sequence[int]]) -> int:
    """Compare with sorting all that was not missed; return how many were."""
    missed = 0
    rows = iter(selected.tolist())
    for scope, wanted in zip(scopes, ranks, strict=True):
        of_models = [np.concatenate([patterns(row, k) for row in scope]) for k in range(len(wanted))]
        for every, rank in zip(of_models, wanted, strict=True):
            cut, threshold, flags, pattern, part, equal = next(rows)
            assert bool(flags & SPOILED) == any((each == INFINITY).any() for each in of_models)
            if flags & MISSED:
                missed += 1
                continue
            expected = np.sort(every)[::-1][rank - 1]
            larger, same = int((every > expected).sum()), int((every == expected).sum())
            assert (pattern, part, equal) == (expected, rank - larger, same)
            magnitude = float(np.int32(pattern).view(np.float32))
            assert (cut, threshold) == _place(Cut(magnitude, part / equal), np.dtype(np.float32))
    return missed


def values(rng: np.random.Generator, kind: str, size: int, dtype: np.dtype[Any], offset: int = 0) -> Array:
    size += offset
    drawn = rng.standard_normal(size)
    if kind in ("few", "zero", "equal"):
        drawn = {"few": rng.integers(-2, 3, size) * 0.5, "zero": np.zeros(size), "equal": np.full(size, 1.5)}[kind]
    elif kind == "heavy":
        drawn[rng.random(size) < 0.6] = 0.25
    elif kind == "infinite":
        drawn[rng.random(size) < 0.05], drawn[rng.random(size) < 0.05] = np.inf, np.nan
    elif kind == "sorted":
        drawn.sort()
    return drawn.astype(dtype)[offset:]


@st.composite
def scopes(draw: st.DrawFn) -> tuple[list[Scope], list[list[int]]]:
    """One or two scopes of tensors of several sizes and dtypes, and a rank for each model."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    drawn, ranks = [], []
    for _ in range(draw(st.integers(1, 2))):
        count = draw(st.sampled_from([1, 3, selection.MOST + 1]))
        scope: Scope = []
        sizes = draw(st.lists(st.sampled_from([0, 1, 5, 100, 3000]), min_size=1, max_size=3))
        for size in [*sizes, draw(st.integers(1, 9000))]:
            dtypes = draw(st.sampled_from([(F32, F32), (BF16, BF16), (F16, BF16), (BF16, F32)]))
            kinds, offset = draw(st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))), draw(st.integers(0, 3))
            base = values(rng, kinds[0], size, dtypes[0], offset)
            models = [values(rng, kinds[1], size, dtypes[1], offset) for _ in range(count)]
            models[0][::3] = base[::3].astype(dtypes[1])
            scope.append((base, *models))
        elements = sum(len(row[0]) for row in scope)
        drawn.append(scope)
        ranks.append([draw(st.sampled_from([1, elements]) | st.integers(1, elements)) for _ in range(count)])
    return drawn, ranks


@given(drawn=scopes())
@settings(max_examples=5)
def test_all_of_small_scopes_is_collected_and_nothing_missed(drawn: tuple[list[Scope], list[list[int]]]) -> None:
    assert check(found(*drawn), *drawn) == 0


@pytest.fixture
def _small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample scopes from 500 elements on."""
    monkeypatch.setattr(selection, "SAMPLED", 500)
    monkeypatch.setattr(select, "_SAMPLE", (128, 1 << 18))


@pytest.mark.usefixtures("_small_samples")
@given(drawn=scopes())
@settings(max_examples=6)
def test_what_is_found_by_a_sample_is_exact(drawn: tuple[list[Scope], list[list[int]]]) -> None:
    check(found(*drawn), *drawn)


def test_a_bracket_encloses_the_cut_of_large_scopes() -> None:
    rng = np.random.default_rng(0)
    rows = [tuple(values(rng, "spread", size, BF16) for _ in range(4)) for size in (40_000, 30_000)]
    for scopes, ranks in (
        ([rows], [[14_000, 1, 70_000]]),
        ([rows[:1], rows[1:]], [[8000, 40, 39_000], [3000, 15_000, 29_000]]),
    ):
        assert check(found(scopes, ranks), scopes, ranks) == 0


@pytest.mark.usefixtures("_small_samples")
@pytest.mark.parametrize("part", [0.06, 0.3, 0.52])
def test_an_end_of_the_bracket_may_be_the_cut(part: float) -> None:
    # half of the entries are ones, between a twentieth that are larger and the rest. So both ends are ones, or one of them
    rng = np.random.default_rng(1)
    drawn = rng.random(9000)
    model = np.where(drawn < 0.05, 1 + rng.random(9000), np.where(drawn < 0.55, 1, rng.random(9000) / 2)).astype(F32)
    scope: Scope = [(np.zeros(9000, F32), model)]
    rank = int(part * 9000)
    selected = found([scope], [[rank]])
    assert check(selected, [scope], [[rank]]) == 0
    assert selected[0, 3] == np.float32(1).view(np.int32)
    assert selected[0, 4] == rank - (model > 1).sum()
    assert selected[0, 5] == (model == 1).sum()


def misleading(size: int) -> tuple[Array, Array]:
    """Make a base and a model in which the runs of 32 that are sampled are smaller than all else."""
    step = int(select.sample_step(np.array(size)))
    model = np.random.default_rng(2).uniform(1, 2, size).astype(F32)
    model[np.arange(size) % step < 32] *= F32.type(2.0**-20)
    return np.zeros(size, F32), model


@pytest.mark.usefixtures("_small_samples")
def test_a_sample_that_misleads_is_noticed() -> None:
    rng = np.random.default_rng(3)
    good = (values(rng, "spread", 9000, F32), values(rng, "spread", 9000, F32))
    scopes, ranks = [[misleading(9000)], [good]], [[4500], [900]]
    selected = found(scopes, ranks)
    assert [int(flags) for flags in selected[:, 2]] == [MISSED, 0]
    assert check(selected, scopes, ranks) == 1


@pytest.mark.usefixtures("_small_samples")
def test_lists_that_overflow_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    rows = [tuple(values(rng, "spread", 60_000, F32) for _ in range(3))]
    assert check(found([rows], [[6000, 60]]), [rows], [[6000, 60]]) == 0
    room = selection._room
    monkeypatch.setattr(selection, "_room", lambda parts, *given: (room(parts, *given)[0], np.full(2, parts[0].tile)))
    assert check(found([rows], [[6000, 60]]), [rows], [[6000, 60]]) >= 1


@pytest.mark.usefixtures("_small_samples")
def test_neither_lists_nor_programs_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    rows = [tuple(values(rng, "heavy", 50_001, BF16, 1) for _ in range(3))]
    seen = []
    for lists, swept in ((256, 1 << 14), (1, 1 << 14), (3, 1 << 13)):
        monkeypatch.setattr(selection, "LISTS", lists)
        monkeypatch.setattr(selection, "_SWEPT", swept)
        seen.append(found([rows], [[10_000, 40_000]]).tolist())
    assert seen[0] == seen[1] == seen[2]
    assert check(np.array(seen[0]), [rows], [[10_000, 40_000]]) == 0


@given(st.lists(st.tuples(st.integers(0, INFINITY), st.integers(1, 2**45), st.integers(0, 2**45)), min_size=1, max_size=20))
def test_thresholds_are_those_of_the_host(drawn: list[tuple[int, int, int]]) -> None:
    searches = torch.zeros((len(drawn), selection.FIELDS.value), dtype=torch.int64, device=DEVICE)
    for row, (pattern, rank, more) in enumerate(drawn):
        for field, value in ((selection.LOW, pattern), (selection.RANK, rank), (selection.EQUAL, rank + more)):
            searches[row, field.value] = value
    placed = selection._placed(searches, torch.zeros(len(drawn), dtype=torch.int64, device=DEVICE)).tolist()
    for (pattern, rank, more), (cut, threshold, *_) in zip(drawn, placed, strict=True):
        magnitude = float(np.int32(pattern).view(np.float32))
        assert (cut, threshold) == _place(Cut(magnitude, rank / (rank + more)), np.dtype(np.float32))


def test_cuts_are_taken_from_the_device_and_rows_without_them_left_out() -> None:
    device = torch.tensor([[7, 70, 0, 7, 1, 2], [8, 80, SPOILED, 8, 1, 2], [9, 90, MISSED, 9, 1, -1]], device=DEVICE)
    own = np.arange(12).reshape(3, 2, 2)
    places = np.array([[[0, -1], [-1, 1]], [[-1, -1], [-1, -1]], [[2, 1], [0, -1]]])
    keep = Keep("magnitude", np.zeros((3, 2, 2), np.uint32), own, -own, Selected(device), places)
    packed = torch.tensor(np.concatenate([own[..., :1], own, -own], axis=2), device=DEVICE)
    taken, flags = selection.take(keep, packed, torch.tensor(places, device=DEVICE))
    assert flags.tolist() == [SPOILED, 0, SPOILED | MISSED]
    assert taken[0].tolist() == [[0, 70, 1, 7, -1], [2, 2, 80, -2, 8]]
    assert taken[1].tolist() == packed[1].tolist()
    assert taken[2].tolist() == [[8, 90, 80, 9, 8], [10, 70, 11, 7, -11]]


def test_samples_count_runs_over_all_tensors_of_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    # runs of 32 begin at 0, 64, 128, ... of the 300 elements: in tensors of 10, 170 and 120 at 0; 54, 118; 12, 76
    monkeypatch.setattr(selection, "SAMPLED", 300)
    monkeypatch.setattr(select, "_SAMPLE", (150, 150))
    lengths = (10, 170, 120)
    table = Table([[span(np.zeros(length, F32))] * 2 for length in lengths])
    sample = selection._Sample([selection._Part(table, np.zeros((3, 1), np.intp))], np.array([30]))
    assert sample.runs[0].tolist() == [[0, 64], [54, 64], [12, 64]]
    assert sample.pieces[0].tolist() == [[0, 0, 10], [1, 0, 64], [2, 0, 64]]
    assert sample.places[0].tolist() == [[0], [10], [74]]
    assert sample.sizes.tolist() == [138]
