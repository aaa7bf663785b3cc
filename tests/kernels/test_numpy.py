"""The oracle itself, by hand: what the other backends are compared with has to be right."""

import numpy as np
import pytest

from mergekit_cl.kernels import BLOCK, Keep, Slices, Table, TaskVectors, load
from mergekit_cl.kernels import numpy as oracle


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the authors' Random123, for counters of which the upper two words are zero; the last computed by hand
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ],
)
def test_philox(counter: int, key: tuple[int, int], words: str) -> None:
    found = oracle.philox(np.array([counter], np.uint64), *map(np.uint64, key))
    assert " ".join(f"{int(word[0]):08x}" for word in found) == words


@pytest.mark.parametrize("counter", [0, 1, 77, 2**32 - 1, 2**32, 2**45 + 3])
@pytest.mark.parametrize("key", [(0, 0), (1, 2), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)])
def test_philox_in_integers(counter: int, key: tuple[int, int]) -> None:
    c, k = [counter % 2**32, counter // 2**32, 0, 0], list(key)
    for _ in range(10):
        one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [two >> 32 ^ c[1] ^ k[0], two % 2**32, one >> 32 ^ c[3] ^ k[1], one % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    assert [int(w[0]) for w in oracle.philox(np.array([counter], np.uint64), *map(np.uint64, key))] == c


HALF = 1 << 31


def pattern(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@pytest.mark.parametrize("name", ["numpy", "numba", "triton"])
def test_which_entries_are_kept(name: str) -> None:
    """Magnitudes 1, 2, 3, 2 and cuts at 1 and 3: hashes decide about the edges alone."""
    backend = load(name, "cpu")[1]
    base, model = np.zeros(4, np.float32), np.float32([1, -2, 3, 2])
    keys = np.zeros((1, 1, 2), np.uint32)  # hashes 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8
    for low, high, expected in [
        (0, 0, [0, -2, 3, 2]),
        (0x6627E8D5, 0, [0, -2, 3, 2]),  # h < threshold, not h <= threshold
        (0x6627E8D6, 0, [1, -2, 3, 2]),
        (0, 0xBC57AC4C, [0, -2, 3, 2]),  # h >= threshold
        (0, 0xBC57AC4D, [0, -2, 0, 2]),
    ]:
        keep = Keep("magnitude", keys, np.array([[[low, high]]]), np.array([[[pattern(1), pattern(3)]]]))
        one = np.ones((1, 1), np.float32)
        out = np.empty(4, np.float32)
        how = TaskVectors(keep, None, "sum", one, one, one, np.ones(1, np.float32))
        backend.task_vector_merge(Table([[base, model, out]]), how, np.array([[0, 0, 4]]))
        assert out.tolist() == expected
        kept = backend.kept_magnitude(Table([[base, model]]), keep, np.array([[0, 0, 4]]))
        assert kept.tolist() == [[[8.0, float(np.abs(expected).sum())]]]
    keep = Keep("random", keys, np.array([[[0x9B00DBD8, 0]]]), np.array([[[0, 0]]]))
    kept = backend.kept_magnitude(Table([[base, model]]), keep, np.array([[0, 0, 4]]))
    assert kept.tolist() == [[[8.0, 1.0]]]  # only the first hash is below that of the last


@pytest.mark.parametrize("name", ["numpy", "numba", "triton"])
def test_histogram(name: str) -> None:
    backend = load(name, "cpu")[1]
    base = np.ones(BLOCK + 5, np.float32)
    model = base.copy()
    model[:6] += np.float32([0.5, -0.5, 1, 4, np.inf, np.nan])
    model[BLOCK:] += 2
    low, shift = np.array([[pattern(0.5)]]), np.array([[23]])
    pieces = np.array([[0, 0, BLOCK], [0, BLOCK, BLOCK + 5]])
    # a bin for each power of two: [0.5, 1), [1, 2), [2, 4); 4, inf and NaN are above, the zeros below
    for groups, expected in [([0, 1], [[2, 1, 0, 3, 2], [0, 0, 5, 0, 0]]), ([0, 0], [[2, 1, 5, 3, 2]])]:
        counts = backend.magnitude_histogram(Table([[base, model]]), low, shift, 3, False, np.array(groups), pieces)
        assert counts.tolist() == [[row] for row in expected]
    wide = np.array([[int(np.float64(0.5).view(np.int64))]])
    counts = backend.magnitude_histogram(Table([[base, model]]), wide, shift + 29, 3, True, np.array([0, 0]), pieces)
    assert counts.tolist() == [[[2, 1, 5, 3, 2]]]


@pytest.mark.parametrize("name", ["numpy", "numba", "triton"])
def test_slices(name: str) -> None:
    backend = load(name, "cpu")[1]
    x, y = np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([[1, 0, 1], [0, 2, 0]])
    rows, columns = Slices(np.array([3]), strided=False), Slices(np.array([2]), strided=True)
    table = Table([[x.reshape(-1), y.reshape(-1)]])
    assert backend.gram_of_slices(table, False, rows, np.array([[0, 0, 2]])).tolist() == [
        [[14, 4], [4, 2]],
        [[77, 10], [10, 4]],
    ]
    grams = backend.gram_of_slices(table, False, columns, np.array([[0, 0, 1], [0, 1, 3]]))
    assert grams.tolist() == [[[17, 1], [1, 1]], [[29, 10], [10, 4]], [[45, 3], [3, 1]]]
    assert backend.gram_of_slices(table, True, columns, np.array([[0, 0, 3]])).tolist() == [[[16]], [[13]], [[40]]]
    out = np.zeros(6, np.float32)
    # columns: 2 x + y; y about x with weight 1/4: 3/4 x + 1/4 y; nothing but y
    weights, references = np.float32([[2, 1], [0.75, 0.25], [0, 1]]), np.array([-1, 0, -1])
    backend.weighted_sum_of_slices(
        Table([[x.reshape(-1), y.reshape(-1), out]]), weights, references, columns, np.array([[0, 0, 3]])
    )
    assert out.tolist() == [3, 1.5, 1, 8, 4.25, 0]
