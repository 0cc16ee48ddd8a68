"""Schedules: numbers that change over the frames of a video, such as the guidance scale or the temperature.

Arguments that take a schedule take a plain number too, for a constant. In a config, a schedule is a class:
`guidance: {class_path: t2v.generation.Linear, init_args: {start: 4.0, stop: 1.0}}`.
"""

import math
from abc import ABC, abstractmethod

from t2v.errors import UserError, check_range


class Schedule(ABC):
    """Base class of schedules. Every argument of `__init__` must be an attribute of the same name, to be saved."""

    @abstractmethod
    def __call__(self, frame: int, frames: int) -> float:
        """Return the value at a frame.

        Args:
            frame: Frame number, from 0.
            frames: Length of the whole video.
        """


class Linear(Schedule):
    """From one value at the first frame to another at the last, in equal steps.

    Args:
        start: Value at the first frame.
        stop: Value at the last frame.
    """

    def __init__(self, start: float, stop: float) -> None:
        check_range(self, "(-inf, inf)", start=start, stop=stop)
        self.start, self.stop = start, stop

    def __call__(self, frame: int, frames: int) -> float:
        return self.start + (self.stop - self.start) * relative_time(frame, frames)


class Cosine(Schedule):
    """From one value at the first frame to another at the last, along half a cosine: slow at both ends.

    Args:
        start: Value at the first frame.
        stop: Value at the last frame.
    """

    def __init__(self, start: float, stop: float) -> None:
        check_range(self, "(-inf, inf)", start=start, stop=stop)
        self.start, self.stop = start, stop

    def __call__(self, frame: int, frames: int) -> float:
        return self.stop + (self.start - self.stop) * (1 + math.cos(math.pi * relative_time(frame, frames))) / 2


class Interval(Schedule):
    """One value in a part of the video and another outside it (for guidance: https://arxiv.org/abs/2404.07724).

    Args:
        value: Value from `first` to `last`, both included.
        first: Begin of the part, as a fraction of the video: 0 is its first frame, 1 its last.
        last: End of the part, as a fraction of the video.
        outside: Value in the rest of the video.

    Raises:
        UserError: Unless 0 <= first <= last <= 1.
    """

    def __init__(self, value: float, first: float, last: float, outside: float = 1.0) -> None:
        if not 0 <= first <= last <= 1:
            raise UserError(
                f"first={first} and last={last} are fractions of a video and must satisfy 0 <= first <= last <= 1: "
                "change them."
            )
        check_range(self, "(-inf, inf)", value=value, outside=outside)
        self.value, self.first, self.last, self.outside = value, first, last, outside

    def __call__(self, frame: int, frames: int) -> float:
        return self.value if self.first <= relative_time(frame, frames) <= self.last else self.outside


def relative_time(frame: int, frames: int) -> float:
    """Return the position of a frame in the video, from 0 at the first frame to 1 at the last."""
    return frame / max(frames - 1, 1)


def value_at(schedule: float | Schedule, frame: int, frames: int) -> float:
    """Return the value of a schedule or of a constant at a frame."""
    return schedule(frame, frames) if isinstance(schedule, Schedule) else schedule
