"""The resolved config of a training run."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class SaveConfig(SaveConfigCallback):
    """Saves the config as ``config.yaml`` in the run folder when training starts.

    Lightning's own callback saves it in `setup`, so that a run which is refused later would overwrite the config of the
    run before.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No-op; saved in `on_train_start`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``config.yaml`` in the run folder."""
        super().setup(trainer, pl_module, "fit")
