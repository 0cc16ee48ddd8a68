"""Values of schedules at each frame."""

import pytest

from t2v.errors import UserError
from t2v.generation import Cosine, Interval, Linear, Schedule
from t2v.generation.schedules import value_at


def values(schedule: float | Schedule, frames: int) -> list[float]:
    return [value_at(schedule, frame, frames) for frame in range(frames)]


def test_a_number_is_constant():
    assert values(2.5, 3) == [2.5, 2.5, 2.5]


def test_linear_takes_equal_steps_from_start_to_stop():
    assert values(Linear(4.0, 1.0), 4) == [4.0, 3.0, 2.0, 1.0]
    assert values(Linear(1.0, 2.0), 2) == [1.0, 2.0]


def test_cosine_is_slow_at_both_ends():
    assert values(Cosine(3.0, 1.0), 5) == pytest.approx([3.0, 2.70710678, 2.0, 1.29289322, 1.0])


def test_an_interval_includes_both_ends():
    assert values(Interval(5.0, 0.25, 0.5), 5) == [1.0, 5.0, 5.0, 1.0, 1.0]
    assert values(Interval(5.0, 0.0, 1.0), 3) == [5.0, 5.0, 5.0]
    assert values(Interval(0.2, 0.0, 0.0, outside=0.9), 3) == [0.2, 0.9, 0.9]


@pytest.mark.parametrize("schedule", [Linear(3.0, 1.0), Cosine(3.0, 1.0), Interval(3.0, 0.0, 0.5)])
def test_a_video_of_one_frame_has_the_first_value(schedule):
    assert values(schedule, 1) == [3.0]


@pytest.mark.parametrize(("first", "last"), [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.5)])
def test_an_interval_outside_the_video_is_refused(first, last):
    with pytest.raises(UserError, match=f"first={first} and last={last}"):
        Interval(2.0, first, last)
