"""The checkpoint at the end of training."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class FinalCheckpoint(Callback):
    """Saves ``last.ckpt`` at the last step of ``fit``.

    A `ModelCheckpoint` with ``every_n_train_steps`` saves only multiples of it.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step that is saved."""
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if it is not saved yet."""
        # If there is no last checkpoint yet, ModelCheckpoint saves one itself at this point.
        exists = any(callback.last_model_path for callback in _savers_of_last(trainer))
        if exists and self._saved_step != trainer.global_step:
            save_last(trainer)


def save_last(trainer: Trainer) -> bool:
    """Save ``last.ckpt`` at the current step.

    Returns:
        Whether it was saved: False if no `ModelCheckpoint` has ``save_last``.
    """
    savers = _savers_of_last(trainer)
    for callback in savers:
        if not callback.last_model_path:
            callback.last_model_path = _unused_last_path(callback, trainer)
        trainer.save_checkpoint(callback.last_model_path)
    return bool(savers)


def _unused_last_path(callback: ModelCheckpoint, trainer: Trainer) -> str:
    """Return the path that `ModelCheckpoint` would choose for its first last checkpoint: last.ckpt, last-v1.ckpt, …"""
    path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)
    version = 1
    while callback.file_exists(path, trainer):
        path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST, ver=version)
        version += 1
    return path


def _savers_of_last(trainer: Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.save_last]
