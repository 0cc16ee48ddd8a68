"""Resuming in the middle of an epoch, with any world size.

Lightning counts steps and epochs in its checkpoints; a `PlanPosition` adds what the plan needs. Everything that touches
the private progress objects of Lightning's loops is in this file.
"""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from data.plan import TrainSampler


class PlanPosition(NamedTuple):
    """What a checkpoint stores, beside Lightning's counts, to continue with the next batch of the plan."""

    plan: str
    """Fingerprint of the plan."""
    world_size: int
    origin: tuple[int, int]
    """See `TrainSampler`."""
    epoch: int


def progress(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch of the plan and the number of its batches that are trained on, as Lightning counts them.

    With ``overfit_batches`` it is always the first epoch, so that all are of the same batches.
    """
    epoch = 0 if trainer.overfit_batches else trainer.current_epoch  # type: ignore[attr-defined]
    return epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


def resume(trainer: Trainer, sampler: TrainSampler, position: PlanPosition) -> None:
    """Continue the epoch of a checkpoint whose counts Lightning has restored.

    Args:
        trainer: The trainer.
        sampler: Batches of this rank in the same plan.
        position: The position stored in the checkpoint.
    """
    sampler.origin = position.origin
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if position.world_size != sampler.num_replicas:
        done = sampler.first_batch(position.epoch) + batches.processed * position.world_size
        extra = sampler.resume(position.epoch, done) - batches.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(batches, name, getattr(batches, name) + extra)
    _correct_epoch_counts(trainer, position.epoch, ended=batches.processed >= len(sampler))


def _correct_epoch_counts(trainer: Trainer, epoch: int, ended: bool) -> None:
    """Correct Lightning's counts of epochs.

    A run that resumes at the end of an epoch does not count the next one, and a run that ends in the middle of an epoch
    counts it as done; from their checkpoints the epochs would be counted wrongly.

    Args:
        trainer: The trainer.
        epoch: Epoch of the last batch.
        ended: Whether that batch was the epoch's last.
    """
    loop: Any = trainer.fit_loop
    for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
        counts.ready = counts.started = epoch + 1
        counts.processed = epoch + 1 if ended and counts.processed > epoch else epoch
        counts.completed = epoch + 1 if ended and counts.completed > epoch else epoch
    loop.restarting = True  # makes the loop use these counts
