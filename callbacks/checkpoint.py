"""``last.ckpt``, the newest state of a run."""

import os
import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging

from t2v.checkpoints.lookup import is_local
from t2v.checkpoints.storage import remove_checkpoint
from t2v.errors import UserError
from t2v.files import remove
from t2v.training.lightning_private import checkpoint_intervals


class LastCheckpoint(Callback):
    """Writes ``last.ckpt`` for every `ModelCheckpoint` with ``save_last``, which would do so less reliably itself.

    - It is written at the intervals of the `ModelCheckpoint`, whether or not its ``monitor`` has improved; after any
      other checkpoint is written; and at the last step. It always contains all that resuming needs.
    - It is the only one: a run that was moved or resumed does not begin a ``last-v1.ckpt``. Before the first
      checkpoint of a run is written, those of another run in the same folder are moved to ``earlier-1``.
    - Test runs (``fast_dev_run``, ``overfit_batches``) write no checkpoints, since another run might resume from them.
    """

    def __init__(self) -> None:
        self._savers: list[ModelCheckpoint] = []
        self._step = self._saved_step = 0
        self._saved_time = 0.0
        self._saving = False
        self._behind = False
        """Whether a checkpoint was written since last.ckpt."""
        self._owns_folders = False
        """Whether the folders hold no checkpoints of another run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over from the `ModelCheckpoint`s, and move behind them in the order of callbacks."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        if trainer.fast_dev_run or trainer.overfit_batches:  # type: ignore[attr-defined]
            trainer.callbacks = [each for each in others if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]
            return
        self._savers += [each for each in others if isinstance(each, ModelCheckpoint) and each.save_last]
        for saver in self._savers:
            saver.save_last = None
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the paths of other checkpoints in the state of `ModelCheckpoint` if their folder was moved.

        Raises:
            UserError: If training would go on from the moving average of another run's weights.
        """
        averaging = any(isinstance(each, WeightAveraging) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and "current_model_state" in checkpoint and not averaging:
            raise UserError(
                "The weights of the checkpoint are a moving average, and this run has no callbacks.EMA, without which "
                "it would not continue with the weights that were trained: add callbacks.EMA as in the run before, or "
                "begin a new run with the average by --model.init_from."
            )
        for saver in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(saver.state_key)
            if isinstance(saver, ModelCheckpoint) and state and trainer.ckpt_path:
                folder = os.fspath(saver.dirpath or "")
                if state["dirpath"] != folder and os.path.realpath(Path(trainer.ckpt_path).parent) == folder:
                    _move_paths(state, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the first step: a run without a step of its own saves nothing."""
        self._step = self._saved_step = trainer.global_step
        self._saved_time = time.monotonic()
        self._behind = self._owns_folders = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Move the checkpoints of another run away before the first of this run is written."""
        self._behind = not self._saving
        if self._savers and not self._owns_folders and trainer.is_global_zero:
            for saver in self._savers:
                _clear_folder(saver, trainer.ckpt_path)
        self._owns_folders = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if an interval of steps or time has passed."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step  # not while gradients accumulate
        if self._behind or (stepped and any(self._is_due(trainer, saver) for saver in self._savers)):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a `ModelCheckpoint` does, which may wait for the result of a validation."""
        if trainer.training or trainer.validating:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if an interval of epochs has passed."""
        epochs = [checkpoint_intervals(saver)[1] for saver in self._savers]
        due = any(each and (trainer.current_epoch + 1) % each == 0 for each in epochs)
        if self._behind or (due and trainer.global_step != self._saved_step):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self._behind or trainer.global_step != self._saved_step:
            self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give ``save_last`` back."""
        for saver in self._savers:
            saver.save_last = True
        self._savers.clear()

    def save(self, trainer: Trainer) -> bool:
        """Write last.ckpt at the current step, and return whether it was: not if no callback has ``save_last``."""
        savers = {saver.format_checkpoint_name({}, saver.CHECKPOINT_NAME_LAST): saver for saver in self._savers}
        for path, saver in savers.items():
            saver.last_model_path = path
            self._saving = True
            try:
                trainer.save_checkpoint(path, weights_only=False)
            finally:
                self._saving = False
            if trainer.is_global_zero and is_local(path):
                for other in Path(path).parent.glob("last-*.ckpt"):
                    if re.fullmatch(r"last-(v\d+|old)\.ckpt", other.name):  # the run was resumed from it
                        remove_checkpoint(other)
        self._saved_step, self._saved_time, self._behind = trainer.global_step, time.monotonic(), False
        return bool(savers)

    def _is_due(self, trainer: Trainer, saver: ModelCheckpoint) -> bool:
        steps, _, seconds = checkpoint_intervals(saver)
        if seconds is not None:  # the clocks of the ranks differ
            return trainer.strategy.broadcast(time.monotonic() - self._saved_time >= seconds)
        return steps > 0 and trainer.global_step % steps == 0


def save_last(trainer: Trainer) -> bool:
    """Write last.ckpt at the current step, and return whether it was."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    saved = [callback.save(trainer) for callback in callbacks if isinstance(callback, LastCheckpoint)]
    return any(saved)


def _clear_folder(saver: ModelCheckpoint, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Move the checkpoints of another run to a new folder ``earlier-N``, and remove what a killed run left.

    In a folder that the run was resumed from, these are the ``last*.ckpt`` that it was not resumed from.
    """
    folder = Path(saver.dirpath or "")
    if not is_local(folder) or not folder.is_dir():
        return
    for partial in folder.glob("*.ckpt.partial"):
        remove(partial)
    resumed = Path(ckpt_path).resolve() if ckpt_path else None
    pattern = "last*.ckpt" if resumed and resumed.parent == folder.resolve() else "*.ckpt"
    old = [path for path in folder.glob(pattern) if path.resolve() != resumed]
    if not old:
        return
    number = 1
    while (earlier := folder / f"earlier-{number}").exists():
        number += 1
    earlier.mkdir()
    for path in old:
        path.replace(earlier / path.name)
    print(f"Moved        {', '.join(sorted(path.name for path in old))} of an earlier run to {earlier}", flush=True)


def _move_paths(state: dict[str, Any], folder: str) -> None:
    """Replace the old folder by the new one in all paths in the state of a `ModelCheckpoint`."""

    def moved(path: str) -> str:
        return str(Path(folder) / os.path.relpath(path, state["dirpath"])) if path else path

    state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state[name])
    state["dirpath"] = folder
