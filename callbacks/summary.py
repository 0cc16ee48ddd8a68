"""What a run is, printed at its start, and its best checkpoint, printed at its end."""

import os
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class RunSummary(Callback):
    """Prints a few lines at the start of every command, and the best checkpoint at the end of ``fit``."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``fit``, when the data is loaded and the checkpoint is restored."""
        self._trained = True
        _print({**_header(trainer, pl_module), "batch": _batch(trainer), "start": _start(trainer)})

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
        """Print the best score and the paths of the checkpoints, or that no step was left to train."""
        if not self._trained:
            _print({"not trained": f"{_start(trainer)}, no steps are left: raise trainer.max_steps to train longer"})
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint):
            return
        best = ""
        if checkpoint.best_model_score is not None:
            best = f"{checkpoint.monitor} {checkpoint.best_model_score:.4g} in {_shorten(checkpoint.best_model_path)}"
        _print({"best": best, "last": _shorten(checkpoint.last_model_path)})


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
    steps = f"{trainer.num_training_batches / trainer.accumulate_grad_batches:.0f} steps per epoch"
    if not isinstance(size, int):
        return steps
    return f"{size * dp_size * trainer.accumulate_grad_batches} samples per step, {steps}"


def _start(trainer: Trainer) -> str:
    """Describe whether the run resumes a checkpoint, and what is in the folder if it does not."""
    if trainer.ckpt_path:
        return f"Resuming from {_shorten(trainer.ckpt_path)} at step {trainer.global_step}"
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        return "No checkpoints are saved, starting at step 0"
    if any(Path(folder).glob("last*.ckpt")):
        return f"Starting at step 0, with an earlier run in {_shorten(folder)}; --ckpt_path last would resume it"
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
