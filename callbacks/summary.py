"""What a run is, printed at its start, and its best checkpoint, printed at its end."""

import math
import os
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.early_stopping import ARGUMENTS


class RunSummary(Callback):
    """Prints a few lines at the start of every command, and the best checkpoint at the end of ``fit``."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``fit``, when the data is loaded and the checkpoint is restored."""
        self._trained = True
        schedules = (config.scheduler for config in trainer.lr_scheduler_configs)
        changes = [change for schedule in schedules for change in getattr(schedule, "changes", ())]
        changed = f"since the checkpoint: {', '.join(changes)}" if changes else ""
        start = {"batch": _batch(trainer), "start": _start(trainer), "changed": changed}
        _print({**_header(trainer, pl_module), **start})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _print({**_header(trainer, pl_module), "checkpoint": _checkpoint(trainer)})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``test``."""
        _print({**_header(trainer, pl_module), "checkpoint": _checkpoint(trainer)})

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``predict``."""
        _print({**_header(trainer, pl_module), "checkpoint": _checkpoint(trainer)})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print why training ended, the best score and the paths of the checkpoints."""
        what, advice = end_of_training(trainer)
        if self._trained:
            total = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
            _print({"stopped": f"at step {trainer.global_step}{total}: {what}; {advice}"})
        else:
            _print({"not trained": f"{_start(trainer)}, no steps are left: {advice} ({what})"})
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint):
            return
        best = ""
        if checkpoint.best_model_score is not None:
            best = f"{checkpoint.monitor} {checkpoint.best_model_score:.4g} in {_shorten(checkpoint.best_model_path)}"
        _print({"best": best, "last": _shorten(checkpoint.last_model_path)})


def ended_by_time(trainer: Trainer) -> bool:
    """Return whether ``trainer.max_time`` ended training."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((timer.time_remaining() or 1) <= 0 for timer in timers)


def end_of_training(trainer: Trainer) -> tuple[str, str]:
    """Return what ended training, and what to do to train longer."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "trainer.fast_dev_run is a test, which saves nothing", "remove it to train"
    if trainer.limit_train_batches == 0:  # type: ignore[attr-defined]
        return "trainer.limit_train_batches=0 leaves no batch", "raise it to train"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} is reached", "raise trainer.max_steps to train longer"
    if ended_by_time(trainer):
        advice = "raise trainer.max_time, which counts all runs since step 0, or set it to null to train longer"
        return "trainer.max_time has passed", advice
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason in ARGUMENTS:
            why = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.").rstrip(".")
            advice = f"change its {ARGUMENTS[callback.stopping_reason]} or remove it to train longer"
            return f"EarlyStopping: {why or callback.monitor}", advice
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs={trainer.max_epochs} is reached", "raise trainer.max_epochs to train longer"
    return "a callback set trainer.should_stop", "remove that callback to train longer"


@rank_zero_only
def _print(values: dict[str, str]) -> None:
    """Print a line for each value that is not empty."""
    lines = [f"{name.capitalize():<12} {text}" for name, text in values.items() if text]
    if lines:
        print("\n".join(lines), flush=True)


def _header(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    devices = f"{trainer.strategy.root_device.type} x {trainer.world_size}"
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    total = sum(p.numel() for p in module.parameters())
    by_part = ", ".join(f"{name} {_count(n)}" for name, n in parts.items() if n)
    return {
        "run folder": _shorten(trainer.log_dir or trainer.default_root_dir),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
        "device": f"{devices}, precision {trainer.precision}",
        "parameters": f"{by_part} (total {_count(total)})",
    }


def _batch(trainer: Trainer) -> str:
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
    dp_size = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    steps = f"{batches / accumulated if math.isinf(batches) else math.ceil(batches / accumulated)} steps per epoch"
    accumulated = min(accumulated, int(min(batches, accumulated)))
    if not isinstance(size, int):
        return steps
    return f"{size * dp_size * accumulated} samples per step, {steps}"


def _start(trainer: Trainer) -> str:
    """Describe whether the run resumes a checkpoint, and what is in the folder if it does not."""
    if trainer.ckpt_path:
        return f"Resuming from {_shorten(trainer.ckpt_path)} at step {trainer.global_step}"
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        return "No checkpoints are saved, starting at step 0"
    if any(Path(folder).glob("*.ckpt")):
        return (
            f"Starting at step 0, with an earlier run in {_shorten(folder)}; --ckpt_path last would resume it. It is "
            "moved to a folder earlier-1 or higher when the first checkpoint is saved"
        )
    return f"No checkpoint in {_shorten(folder)}, starting at step 0"


def _checkpoint(trainer: Trainer) -> str:
    return _shorten(trainer.ckpt_path) if trainer.ckpt_path else "none: the weights are newly initialized"


def _shorten(path: str | os.PathLike[str] | None) -> str:
    """Return a path relative to the working directory if it is inside."""
    text = os.fspath(path or "")
    return text.removeprefix(f"{Path.cwd()}{os.sep}")


def _count(n: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)
