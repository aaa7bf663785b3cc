"""Windows of spans that are not in memory: the same indices and addresses as if all of them were."""

from collections.abc import Iterable
from threading import Barrier, Thread
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import execute, kernels
from mergekit_cl.kernels import BLOCK, Slices, Table, address
from mergekit_cl.windows import Incoming, Outgoing, Window, Windows, on_disk, portions, sampled

Array = npt.NDArray[Any]


class Recorded:
    """A source that is an array, and notes which windows of it are read."""

    name, files = "w", ()

    def __init__(self, array: Array) -> None:
        self.array = array.reshape(-1)
        self.shape, self.dtype = array.shape, array.dtype.name
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int, out: Array) -> None:
        assert out.shape == (stop - start,)
        assert out.dtype == self.array.dtype
        self.reads.append((start, stop))
        out[:] = self.array[start:stop]


class Result:
    """An outgoing span that notes which windows are written."""

    def __init__(self, length: int, dtype: str = "float32") -> None:
        self.array = np.full(length, -1, dtype)
        self.writes: list[tuple[int, int]] = []
        self.span = Outgoing(dtype, length, self.write)

    def write(self, first: int, data: Array) -> None:
        self.writes.append((first, first + len(data)))
        self.array[first : first + len(data)] = data


def pieces(*rows: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(-1, 3)


def test_a_window_is_sliced_by_the_numbers_of_the_whole() -> None:
    array = np.arange(10, 20, dtype=np.float32)
    window = Window(array, 10, 100)
    assert len(window) == 100
    assert window.dtype == np.float32
    assert window[12:15].tolist() == [12, 13, 14]
    window[12:15] = 0
    assert array.tolist() == [10, 11, 0, 0, 0, 15, 16, 17, 18, 19]
    assert address(window) + 10 * 4 == array.ctypes.data
    assert not on_disk(window)
    assert not on_disk(array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_only_the_pieces_of_a_call_are_read_and_written(dtype: str) -> None:
    """From the first piece of a row to its last; rows without pieces are not there."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    sources = [Recorded(np.arange(1000).astype(kind) + k) for k in range(3)]
    results = [Result(1000) for _ in range(3)]
    resident = np.arange(1000, dtype=np.float32)
    table = Table([(Incoming(source), resident, result.span) for source, result in zip(sources, results, strict=True)])
    seen = []

    def kernel(part: Table, which: Array) -> str:
        assert part.dtypes == table.dtypes == (dtype, "float32", "float32")
        assert part.lengths.tolist() == [1000] * 3
        for row, start, stop in which.tolist():
            one, two, out = part.spans[row]
            seen.append(one[start:stop].astype(float).tolist())
            assert np.shares_memory(two, resident)
            for column, span in enumerate((one, two, out)):
                assert part.addresses[row, column] == address(span)
            assert not any(
                (part.addresses[row, column] + start * span.dtype.itemsize - address(np.asarray(span[start:stop])))
                for column, span in enumerate((one, two, out))
            )
            out[start:stop] = one[start:stop].astype(np.float32) * 2
        return "done"

    windows = Windows()
    assert windows.call(kernel, table, None, pieces((0, 100, 120), (2, 5, 6), (2, 200, 210))) == "done"
    assert [source.reads for source in sources] == [[(100, 120)], [], [(5, 210)]]
    assert results[1].writes == []
    assert seen == [sources[0].array[100:120].astype(float).tolist(), [sources[2].array[5]], list(sources[2].array[200:210])]
    assert results[0].writes == [(100, 120)]
    assert (results[0].array[100:120] == sources[0].array[100:120].astype(np.float32) * 2).all()
    assert set(results[0].array[:100]) == {-1}


def test_slices_count_in_slices() -> None:
    source, result = Recorded(np.arange(60, dtype=np.float32)), Result(60)
    table = Table([(Incoming(source), result.span)])

    def kernel(part: Table, which: Array) -> None:
        assert which.tolist() == [[0, 2, 4]]
        part.spans[0][1][20:40] = part.spans[0][0][20:40]

    Windows().call(kernel, table, Slices(np.array([10]), False), pieces((0, 2, 4)))
    assert source.reads == [(20, 40)]
    assert result.writes == [(20, 40)]
    assert (result.array[20:40] == source.array[20:40]).all()


def test_the_buffer_is_used_again_by_its_thread_only() -> None:
    """And every array in it begins at a line of the cache."""
    table = Table([(Incoming(Recorded(np.arange(1000, dtype=np.float32))), Result(1000).span)])
    windows, places = Windows(), {}
    barrier = Barrier(2)

    def work(number: int) -> None:
        own = []

        def kernel(part: Table, which: Array) -> None:
            spans = part.spans[0]
            assert (spans[0][which[0, 1] : which[0, 2]] == np.arange(*which[0, 1:])).all()
            own.append([span.array.ctypes.data for span in spans])
            barrier.wait(10)

        for start, stop in ((0, 100), (300, 333), (7, 8)):
            windows.call(kernel, table, None, pieces((0, start, stop)))
        places[number] = own

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 2
    for own in places.values():
        assert len({first for first, _ in own}) == 1
        assert all(at % 64 == 0 for pair in own for at in pair)
    assert not {at for pair in places[0] for at in pair} & {at for pair in places[1] for at in pair}


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_kernels_take_windows_as_they_take_whole_tensors(backend: str) -> None:
    rng = np.random.default_rng(0)
    lengths = [3 * BLOCK + 5, 10, BLOCK]
    models = [[rng.standard_normal(length).astype(np.float32) for length in lengths] for _ in range(2)]
    expected = [np.empty(length, np.float32) for length in lengths]
    _, load = kernels.load(backend, "cpu")
    weights = np.float32([[0.3, 0.7]] * 3)
    whole = Table(list(zip(*models, expected, strict=True)))
    load.weighted_sum(whole, weights, 0, whole.whole)
    results = [Result(length) for length in lengths]
    rows: Iterable[Any] = zip(*models, results, strict=True)
    table = Table([(Incoming(Recorded(one)), two, result.span) for one, two, result in rows])
    for share in execute.deal(table.lengths, 3, BLOCK):
        Windows().call(lambda part, which: load.weighted_sum(part, weights, 0, which), table, None, share)
    for result, array in zip(results, expected, strict=True):
        assert result.array.tobytes() == array.tobytes()


def test_sampled_takes_runs_at_equal_distances() -> None:
    source = Recorded(np.arange(1005, dtype=np.float64))
    found = [sampled(Incoming(source), 1000, 100, 3), sampled(source.array, 1000, 100, 3)]
    assert found[0].tolist() == found[1].tolist() == [100 * k + i for k in range(10) for i in range(3)]
    assert source.reads == [(100 * k, 100 * k + 3) for k in range(10)]


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 25])
def test_portions_cover_a_span_in_order(length: int) -> None:
    source = Recorded(np.arange(length, dtype=np.int16))
    for span in (Incoming(source), source.array):
        assert [len(part) for part in portions(span, 10)] == [10] * (length // 10) + [length % 10] * (length % 10 > 0)
        assert [value for part in portions(span, 10) for value in part.tolist()] == list(range(length))
