"""Exact selection of the k-th largest by counting: arithmetic on histograms, for many selections at once.

What is selected among are *patterns*, the bits of magnitudes as integers. A selection knows an interval that holds the
pattern it looks for. In each round it is given the histogram of a window of that interval, and so a smaller one, until a
single pattern is left. A first window that is taken from a sample saves most of the rounds; where it misses, those that
follow find the pattern all the same.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

SAMPLED = 1 << 15
"""Entries from which on a sample tells where to look."""

RUN = 32
"""Neighbours that are sampled together: they lie in one or two lines of a cache."""

_SAMPLE = (1 << 12, 1 << 18)
_SIGMAS = 4.0
_MOST = np.iinfo(np.int64).max


class Selection:
    """The search for the patterns of given ranks; every array is int64 [selections].

    Args:
        ranks: From 1 (the largest) to the number of entries.
        bits: Bits of a pattern: 31 or 63.

    """

    def __init__(self, ranks: Integers, bits: int) -> None:
        self.ranks = ranks
        self.low = np.zeros_like(ranks)
        self.high = np.full_like(ranks, 2**bits - 1)
        self.before = np.zeros_like(ranks)
        """Entries larger than the interval, where the last histogram had it inside its window."""
        self.equal = np.full_like(ranks, -1)
        """Entries in the interval where it is a single pattern; -1 where that is not known."""

    @property
    def open(self) -> npt.NDArray[np.bool_]:
        """Which selections are not finished."""
        return self.equal < 0

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Of the entries that equal the selected patterns, the part that makes the rank, in (0, 1]."""
        return (self.ranks - self.before) / self.equal

    def narrow(self, which: Integers, low: Integers, shift: Integers, counts: Integers) -> None:
        """Use the histograms of some selections.

        Args:
            which: The selections.
            low: Where their windows start.
            shift: The binary logarithm of the width of a bin.
            counts: int64 [len(which), bins + 1]: what is in each bin, and last what is above the window.

        """
        ranks = self.ranks[which]
        bins = counts.shape[1] - 1
        at_least = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # entries in a bin or above it
        # the highest bin in which, or above which, the rank is reached: -1 below the window, `bins` above it
        found = np.count_nonzero(at_least >= ranks[:, None], axis=1) - 1
        inside = (found >= 0) & (found < bins)
        at = np.where(inside, found, 0)
        start = low + (at << shift)
        rows = np.arange(len(which))
        last = low + np.minimum(((bins - 1) << shift) + ((1 << shift) - 1), _MOST - low)  # of the window
        above, below = found == bins, found < 0
        end = start + np.minimum((1 << shift) - 1, _MOST - start)  # of the bin
        self.low[which] = np.where(inside, start, np.where(above, last + 1, self.low[which]))
        narrowed = np.where(inside, end, np.where(below, low - 1, _MOST))
        self.high[which] = np.minimum(narrowed, self.high[which])
        self.before[which] = at_least[rows, at + 1]
        self.equal[which] = np.where(inside & (shift == 0), counts[rows, at], -1)


def shift_for(low: Integers, high: Integers, bins: int) -> Integers:
    """Return the least shift with which ``bins`` bins cover the patterns from ``low`` to ``high``."""
    widths = [width.bit_length() for width in ((high - low) // bins).reshape(-1).tolist()]
    return np.array(widths, np.int64).reshape(low.shape)


def sample_step(elements: Integers) -> Integers:
    """Return how far apart the runs are that are sampled: a 256th of the entries, in runs of `RUN`, or some thousands."""
    return RUN * np.maximum(1, elements // np.clip(elements // 256, *_SAMPLE))


def guess_ranks(ranks: Integers, elements: Integers, sampled: Integers) -> tuple[Integers, Integers]:
    """Return two ranks in a sample, between which the given rank of all elements lies almost surely."""
    part = ranks / elements
    spread = _SIGMAS * np.sqrt(sampled * part * (1 - part)) + 1
    first, last = np.floor(part * sampled - spread), np.ceil(part * sampled + spread)
    return first.astype(np.int64), last.astype(np.int64)
