"""Schedules: numbers that change in the course of a video, such as guidance or temperature.

Where one is taken, a plain number is the constant schedule. In a config, a schedule is a class:
`guidance: {class_path: t2v.generation.Linear, init_args: {start: 4.0, stop: 1.0}}`.
"""

import math
from abc import ABC, abstractmethod

from t2v.errors import UserError


class Schedule(ABC):
    """The base class of all schedules; an argument of `__init__` must be kept as an attribute of the same name."""

    @abstractmethod
    def __call__(self, frame: int, frames: int) -> float:
        """The value at a frame.

        Args:
            frame: counted from 0.
            frames: length of the whole video.
        """


class Linear(Schedule):
    """From one value at the first frame to another at the last, in equal steps."""

    def __init__(self, start: float, stop: float):
        """
        Args:
            start: the value at the first frame.
            stop: the value at the last frame.
        """
        self.start, self.stop = start, stop

    def __call__(self, frame: int, frames: int) -> float:
        return self.start + (self.stop - self.start) * share(frame, frames)


class Cosine(Schedule):
    """From one value at the first frame to another at the last, along half a cosine: slow at both ends."""

    def __init__(self, start: float, stop: float):
        """
        Args:
            start: the value at the first frame.
            stop: the value at the last frame.
        """
        self.start, self.stop = start, stop

    def __call__(self, frame: int, frames: int) -> float:
        return self.stop + (self.start - self.stop) * (1 + math.cos(math.pi * share(frame, frames))) / 2


class Interval(Schedule):
    """One value in a part of the video and another outside it (for guidance: https://arxiv.org/abs/2404.07724)."""

    def __init__(self, value: float, first: float, last: float, outside: float = 1.0):
        """
        Args:
            value: the value from `first` to `last`, both included.
            first: where the part begins, as a share of the video: 0 is its first frame, 1 its last.
            last: where the part ends, as a share of the video.
            outside: the value in the rest of the video.
        """
        if not 0 <= first <= last <= 1:
            raise UserError(f"first={first} and last={last} are shares of a video: they need 0 <= first <= last <= 1.")
        self.value, self.first, self.last, self.outside = value, first, last, outside

    def __call__(self, frame: int, frames: int) -> float:
        return self.value if self.first <= share(frame, frames) <= self.last else self.outside


def share(frame: int, frames: int) -> float:
    """How far into a video a frame is, from 0 at the first frame to 1 at the last."""
    return frame / max(frames - 1, 1)


def value_at(schedule: float | Schedule, frame: int, frames: int) -> float:
    """The value of a schedule or of a plain number at a frame."""
    return schedule(frame, frames) if isinstance(schedule, Schedule) else schedule
