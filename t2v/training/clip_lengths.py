"""A check of the lengths of training clips against the videos that a run generates."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


def warn_of_short_clips(trainer: Trainer, window: int, frames: int) -> None:
    """Warn if generated videos need distances between frames, and text gates, that no training clip contains.

    Args:
        trainer: Nothing is checked unless it trains. The `buckets` of its DataModule, or else its `frames`, are the
            lengths of training clips; a DataModule may have neither.
        window: Frames that a temporal layer attends to.
        frames: Length of generated videos.
    """
    if trainer.state.fn != "fit":
        return
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    buckets = getattr(datamodule, "buckets", None)
    longest = max(bucket.frames for bucket in buckets) if buckets else getattr(datamodule, "frames", None)
    needed = min(window, frames)
    if longest is not None and longest < needed:
        rank_zero_warn(
            f"The longest training clips have {longest} frames, but generation.frames={frames} and "
            f"attention.window={window}: frames after the first {longest} attend over distances in time that training "
            f"never sees, so train on clips of {needed} frames (data.frames or data.buckets), or lower "
            f"generation.frames or attention.window to {longest}."
        )
