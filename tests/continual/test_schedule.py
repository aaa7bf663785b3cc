"""MergeSchedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl import MergeError
from mergekit_cl.continual.schedule import MergeSchedule


@given(st.floats(0.001, 1), st.integers(1, 500))
def test_merges_every_k_steps_and_once_at_the_end(p: float, total: int) -> None:
    schedule = MergeSchedule.from_fraction(p, total)
    assert schedule.every == max(1, round(p * total))
    points = [step for step in range(1, total + 50) if schedule.due(step)]
    assert points == sorted({*range(schedule.every, total + 1, schedule.every), total})


def test_bad_values() -> None:
    for every, total in ((0, 5), (-1, 5), (2.0, 5), (True, 5), (1, 0)):
        with pytest.raises(MergeError):
            MergeSchedule(every, total)
