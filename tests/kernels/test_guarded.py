"""Weighted sums that the device itself allows: all of them are written, with the bits of the NumPy backend, or none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from mergekit_cl.dtypes import largest_finite, type_of
from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import Array, Table, interpreted
from mergekit_cl.kernels import numpy as oracle
from mergekit_cl.kernels.triton.guarded import GuardedSums

DEVICE = "cpu" if interpreted() else "cuda"
FLOATS = tuple(type_of)
TILE = 2048

_LOOKS = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__array__")
pytestmark = pytest.mark.gpu


@dataclass
class Group:
    """Sums of rows of models: their dtypes, the last of which is written in place; sizes, and where in memory rows begin."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    about: bool
    seed: int = 0

    def open(self) -> list[list[Array]]:
        """Make the inputs, the same at each call."""
        random = np.random.default_rng(self.seed)
        return [[random.standard_normal(size).astype(type_of[dtype]) for dtype in self.dtypes] for size in self.sizes]

    def weights(self, table: Table) -> Array:
        """Make weights, the same at each call."""
        choice = np.random.default_rng(self.seed).choice([0.5, 0.25, -1.0, 1.5], (len(self.sizes), len(self.dtypes)))
        return choice[:, self.about :].astype(table.compute)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    about = draw(st.booleans())
    dtypes = draw(st.lists(st.sampled_from(FLOATS), min_size=1 + about, max_size=3).map(tuple))
    size = st.integers(1, 40) | st.sampled_from([TILE - 1, TILE, TILE + 9, 8 * TILE + 1])
    sizes = draw(st.lists(size, min_size=1, max_size=3).map(tuple))
    starts = tuple(draw(st.sampled_from([0, 1, 8, 13])) for _ in sizes)
    return Group(dtypes, sizes, starts, about, draw(st.integers(0, 2**32 - 1)))


def on_device(values: Any, start: int = 0, dtype: str = "float32") -> torch.Tensor:
    """Copy values to where the kernels work, so many elements behind an aligned address."""
    array = np.asarray(values, type_of[dtype])
    place = torch.empty(start + len(array), dtype=getattr(torch, dtype), device=DEVICE)[start:]
    return place.copy_(torch.from_numpy(array.view(np.uint8)).view(place.dtype))


def written_in_place(rows: Sequence[Sequence[Any]]) -> Table:
    """Make a table of inputs, the last of which are written."""
    return Table([[*row, row[-1]] for row in rows])


def placed(group: Group) -> Table:
    starts = zip(group.open(), group.starts, strict=True)
    return written_in_place([[on_device(a, start, a.dtype.name) for a in row] for row, start in starts])


def guarded(tables: Sequence[Table], given_: Sequence[Group], reach: float, **options: Any) -> GuardedSums:
    sums = GuardedSums(tables[0])
    for table, group in zip(tables, given_, strict=True):
        sums.add(table, group.weights(table), group.about, np.full(len(table.spans), reach), **options)
    return sums


def run(sums: GuardedSums) -> bool:
    sums.launch()
    return sums.done()


def contents(tables: Sequence[Table]) -> list[bytes]:
    spans = [span for table in tables for row in table.spans for span in row]
    return [(s.cpu().view(torch.uint8).numpy() if isinstance(s, torch.Tensor) else s).tobytes() for s in spans]


@settings(max_examples=12)
@given(st.lists(groups(), min_size=1, max_size=3))
def test_what_is_fit_is_computed_with_the_bits_of_numpy(given_: list[Group]) -> None:
    tables, expected = [placed(group) for group in given_], [written_in_place(group.open()) for group in given_]
    sums = guarded(tables, given_, 16.0)
    for _ in range(2):
        for table, group in zip(expected, given_, strict=True):
            oracle.weighted_sum(table, group.weights(table), group.about, table.whole)
        assert run(sums)
        assert contents(tables) == contents(expected)


@settings(max_examples=15)
@given(st.lists(groups(), min_size=1, max_size=3), st.data(), st.sampled_from([np.nan, -np.inf, np.inf, 17.0, -17.0]))
def test_one_entry_that_is_not_fit_keeps_everything_as_it_is(given_: list[Group], data: st.DataObject, value: float) -> None:
    tables = [placed(group) for group in given_]
    row = data.draw(st.sampled_from(data.draw(st.sampled_from(tables)).spans))
    span = row[data.draw(st.integers(0, len(row) - 2))]
    at = data.draw(st.sampled_from([0, len(span) // 2, len(span) - 1]))
    fit = span[at].clone()
    span[at] = value
    sums = guarded(tables, given_, 16.0)
    before = contents(tables)
    assert not run(sums)
    assert contents(tables) == before
    span[at] = fit  # and what was found is forgotten
    assert run(sums)
    assert contents(tables) != before


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reach_itself_is_fit(dtype: str) -> None:
    reach = largest_finite(dtype) / 8  # a power of two less than the largest: representable
    for value, fit in ((reach, True), (np.nextafter(type_of[dtype].type(reach), type_of[dtype].type(np.inf)), False)):
        table = written_in_place([[on_device([value] * 9, dtype=dtype) for _ in range(2)]])
        sums = GuardedSums(table)
        sums.add(table, np.full((1, 1), 0.5, table.compute), True, np.array([reach]))
        assert run(sums) == fit


def test_each_row_has_its_own_reach() -> None:
    table = written_in_place([[on_device([3] * 5), on_device([1] * 5)] for _ in range(2)])
    for reach, fit in (([3, 3], True), ([2, 3], False), ([3, 2], False)):
        sums = GuardedSums(table)
        sums.add(table, np.full((2, 1), 0.5, np.float32), True, np.array(reach, np.float64))
        assert run(sums) == fit
    assert table.spans[0][1].tolist() == [2.0] * 5  # 3 - 0.5 * (3 - 1), once


def test_what_never_changes_is_checked_until_it_was_fit() -> None:
    anchor, current = on_device([0] * 4), on_device([8] * 4)
    table = written_in_place([[anchor, current]])
    sums = GuardedSums(table)
    sums.add(table, np.full((1, 1), 0.5, np.float32), True, np.array([16.0]), constant=[0])
    anchor[2] = np.nan
    assert not run(sums)
    anchor[2] = 0
    assert run(sums)
    assert current.tolist() == [4.0] * 4  # 0 - 0.5 * (0 - 8)
    anchor[2] = np.nan  # against the promise: so it shows that nobody looks any more
    assert run(sums)
    assert current.isnan().tolist() == [False, False, True, False]


def test_without_a_reach_everything_passes(looks: Callable[..., list[str]]) -> None:
    table = written_in_place([[on_device([np.inf, 1]), on_device([np.inf, 3])]])
    sums = GuardedSums(table)
    sums.add(table, np.full((1, 1), 0.5, np.float32), True, None)
    seen = looks(*_LOOKS)
    assert run(sums)
    assert not seen
    assert table.spans[0][1].tolist() == [np.inf, 2.0]  # 1 - 0.5 * (1 - 3)


def test_nobody_waits_but_for_one_flag_at_the_end(looks: Callable[..., list[str]]) -> None:
    given_ = [Group(("float32", "float32"), (50, 3000), (0, 1), True), Group(("bfloat16",) * 2, (77,), (0,), True)]
    tables = [placed(group) for group in given_]
    seen = looks(*_LOOKS)
    sums = guarded(tables, given_, 16.0, constant=[0])
    assert not seen
    assert run(sums)
    assert run(sums)
    assert seen == ["item", "item"]


@pytest.mark.skipif(not interpreted(), reason="there is a GPU")
def test_a_graph_is_one_of_a_gpu() -> None:
    table = written_in_place([[on_device([0, 0])]])
    with pytest.raises(BackendError, match="a CUDA graph holds work of a GPU, but the tensors are on cpu; move them"):
        GuardedSums(table).record()
