"""The checkpoint at the end of training."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class FinalCheckpoint(Callback):
    """Brings ``last.ckpt`` up to the last step of ``fit``.

    A `ModelCheckpoint` with ``every_n_train_steps`` leaves it at the last multiple of that.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that this step is saved."""
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step where that has not been done."""
        begun = any(callback.last_model_path for callback in _keepers(trainer))  # else ModelCheckpoint saves it now
        if begun and self._saved_step != trainer.global_step:
            save_last(trainer)


def save_last(trainer: Trainer) -> bool:
    """Brings ``last.ckpt`` up to this step, and says whether the run keeps one."""
    for callback in _keepers(trainer):
        version = 0
        while not callback.last_model_path:  # ModelCheckpoint has saved none yet; it names them like this
            path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST, version or None)
            if not callback.file_exists(path, trainer):
                callback.last_model_path = path
            version += 1
        trainer.save_checkpoint(callback.last_model_path)
    return bool(_keepers(trainer))


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.save_last]
