"""Resuming of runs with Lightning's `EarlyStopping`."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from callbacks.checkpoint import save_last

ARGUMENTS = {
    EarlyStoppingReason.PATIENCE_EXHAUSTED: "patience",
    EarlyStoppingReason.STOPPING_THRESHOLD: "stopping_threshold",
    EarlyStoppingReason.DIVERGENCE_THRESHOLD: "divergence_threshold",
    EarlyStoppingReason.NON_FINITE_METRIC: "check_finite",
}
"""The argument of `EarlyStopping` that each reason to stop is about."""


class ResumedEarlyStopping(Callback):
    """Corrects what each `EarlyStopping` saves in a checkpoint and restores from it.

    - Its patience is that of the config, not that of the checkpoint.
    - A run whose patience was exhausted stops at once, unless the config has more now.
    - A run that it stops saves last.ckpt again if that was written at the last step, before the check.
    - A run that resumes at the end of an epoch does not know the epoch's metrics, and goes on without a check.
    """

    def __init__(self) -> None:
        self._unchecked: list[EarlyStopping] = []
        self._first_step = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the patience that the callbacks will load."""
        for stopping in _find(trainer):
            state = checkpoint.get("callbacks", {}).get(stopping.state_key)
            if state:
                state["patience"] = stopping.patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a run that had been stopped, or let it go on."""
        self._first_step = trainer.global_step
        if not trainer.ckpt_path:
            return
        for stopping in _find(trainer):
            if stopping.wait_count >= stopping.patience:
                trainer.should_stop = True
                continue
            stopping.stopping_reason, stopping.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
            if stopping.strict:
                stopping.strict = False
                self._unchecked.append(stopping)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let a metric that is missing be an error again."""
        while self._unchecked:
            self._unchecked.pop().strict = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save that the run was stopped."""
        reasons = {stopping.stopping_reason for stopping in _find(trainer)}
        if trainer.global_step > self._first_step and reasons - {EarlyStoppingReason.NOT_STOPPED}:
            save_last(trainer)


def _find(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
