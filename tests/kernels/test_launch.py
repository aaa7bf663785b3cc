"""What kernels are told of a table: records by hand, and that their programs work on each element once."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

from mergekit_cl.kernels import Array, Table, interpreted
from mergekit_cl.kernels.triton import launch

pytestmark = pytest.mark.gpu


@dataclass
class Span:
    """A span that nobody reads."""

    place: int
    dtype: str
    length: int

    @property
    def device(self) -> str:
        return "cpu" if interpreted() else "cuda"

    def data_ptr(self) -> int:
        return self.place

    def __len__(self) -> int:
        return self.length


def told(table: Table, pieces: Array, block: int, anywhere: bool) -> tuple[list[list[int]], list[int]]:
    """Return the records, and which of them each program finds."""
    ready = launch.prepare(SimpleNamespace(), block, table, pieces, anywhere=anywhere)
    return (ready.tables[0].tolist(), ready.tables[1].tolist()) if ready.tables else ([], [])


HALF, SINGLE = "bfloat16", "float32"


@pytest.mark.parametrize(
    ("dtypes", "places", "pieces", "expected"),
    [
        ((HALF, HALF), (4096, 8192), [(0, 100)], [(0, 100, 1)]),
        ((HALF, HALF), (4096, 8192), [(8, 100)], [(8, 100, 1)]),
        ((HALF, HALF), (4102, 8198), [(0, 100)], [(0, 5, 0), (5, 100, 1)]),  # six bytes behind a multiple of 16
        ((HALF, HALF), (4096, 8192), [(3, 100)], [(3, 8, 0), (8, 100, 1)]),
        ((HALF, HALF), (4102, 8198), [(0, 4)], [(0, 4, 0)]),  # it ends in front of the next multiple
        ((HALF, HALF), (4102, 8198), [(0, 5)], [(0, 5, 0)]),
        ((HALF, SINGLE), (4098, 8196), [(0, 100)], [(0, 7, 0), (7, 100, 1)]),  # of 14 and of 28 bytes
        ((HALF, HALF), (4096, 8194), [(0, 100)], [(0, 100, 0)]),  # never both
        ((HALF, SINGLE), (4096, 8192), [(4, 50), (50, 100)], [(4, 8, 0), (50, 56, 0), (8, 50, 1), (56, 100, 1)]),
    ],
)
def test_what_lies_in_front_of_an_aligned_element_is_cut_off(
    dtypes: tuple[str, ...], places: tuple[int, ...], pieces: list[tuple[int, int]], expected: list[tuple[int, int, int]]
) -> None:
    table = Table([[Span(place, dtype, 100) for place, dtype in zip(places, dtypes, strict=True)]])
    records, piece_of = told(table, np.array([(0, *piece) for piece in pieces]), 1024, anywhere=True)
    assert piece_of == list(range(len(records)))
    starts = [record[1] + 1024 * number for number, record in enumerate(records)]
    found = [(start, stop, aligned) for start, (_, _, stop, aligned, *_) in zip(starts, records, strict=True)]
    assert sorted(found) == sorted(expected)
    assert all(record[4:] == list(places) for record in records)
    records, _ = told(table, np.array([(0, *piece) for piece in pieces]), 1024, anywhere=False)
    assert [(record[2], record[3]) for record in records] == [
        (
            stop,
            int(
                all(
                    (place + start * (2 if dtype == HALF else 4)) % 16 == 0 for place, dtype in zip(places, dtypes, strict=True)
                )
            ),
        )
        for start, stop in pieces
    ]


@given(st.data(), st.sampled_from([16, 64, 1024]), st.booleans())
def test_programs_work_on_each_element_once(data: Any, block: int, anywhere: bool) -> None:
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    rows = [[Span(4096 + 2 * data.draw(st.integers(0, 9)), HALF, length) for _ in range(2)] for length in lengths]
    bounds = [sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for length in lengths]
    pieces = np.array([(row, *bound) for row, bound in enumerate(bounds)], np.int64)
    records, piece_of = told(Table(rows), pieces, block, anywhere)
    done = [np.zeros(length, int) for length in lengths]
    for program, number in enumerate(piece_of):
        row, origin, stop, aligned, *places = records[number]
        start = origin + program * block
        assert start < stop
        done[row][start : min(start + block, stop)] += 1
        assert aligned == all((place + 2 * start) % 16 == 0 for place in places)
    for row, (start, stop) in enumerate(bounds):
        assert (done[row][start:stop] == 1).all()
        assert done[row].sum() == stop - start


def test_what_is_copied_does_not_change_with_what_it_was_copied_from() -> None:
    numbers, table = np.arange(3.0), Table([[Span(4096, SINGLE, 3)]])
    (first,) = launch.on_device(table, numbers)
    numbers[1] = 7
    (other,) = launch.on_device(table, numbers)
    assert (first.tolist(), other.tolist()) == ([0, 1, 2], [0, 7, 2])
