"""The resolved config of a training run."""

from pathlib import Path

import fsspec
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from t2v.checkpoints.lookup import is_local
from t2v.files import atomic_path


class SaveConfig(SaveConfigCallback):
    """Saves the config as ``config.yaml`` in the run folder when training starts.

    Lightning's own callback saves it in `setup`, so that a run which is refused later would overwrite the config of the
    run before. It also writes over the old file, which a kill would leave incomplete, and fails with a logger that has
    no folder, such as MLflow's with a server; the config is then in `default_root_dir`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No-op; saved in `on_train_start`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``config.yaml`` in the run folder."""
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call on all ranks
        if not trainer.is_global_zero:
            return
        content = self.parser.dump(self.config, skip_unset=False, skip_validation=True)  # valid since it was parsed
        if is_local(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with atomic_path(Path(folder) / self.config_filename) as partial:
                partial.write_text(content, encoding="utf-8")
        else:
            with fsspec.open(f"{folder.rstrip('/')}/{self.config_filename}", "w", encoding="utf-8") as file:
                file.write(content)
