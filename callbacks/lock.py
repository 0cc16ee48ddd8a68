"""Keeps two runs from writing to one folder."""

from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from t2v.checkpoints.lookup import is_local
from t2v.errors import UserError
from t2v.files import locked


class RunLock(Callback):
    """Refuses to train if another run is writing checkpoints to the same folder."""

    def __init__(self) -> None:
        self._locks = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock the folders of all checkpoints.

        Raises:
            UserError: If another run holds one of the locks.
        """
        if stage != "fit":
            return
        refused = ""
        if trainer.is_global_zero:
            folders = {each.dirpath for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)}
            advice = "give this run another folder, for example by --trainer.default_root_dir"
            try:
                for folder in folders:
                    if folder and is_local(folder):
                        self._locks.enter_context(locked(Path(folder), advice))
            except UserError as error:
                refused = str(error)
        if refused := trainer.strategy.broadcast(refused):
            self._locks.close()
            raise UserError(refused)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the locks, and remove their files."""
        self._locks.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the locks."""
        self._locks.close()
