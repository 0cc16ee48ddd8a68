"""What a run is, told at its start, and what came of it, told at its end."""

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
        """Print the header, once the data is there and the checkpoint is restored."""
        self._trained = True
        _print({**_header(trainer, pl_module), "batch": _batch(trainer), "start": _start(trainer)})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _print({**_header(trainer, pl_module), "checkpoint": _loaded(trainer)})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``test``."""
        _print({**_header(trainer, pl_module), "checkpoint": _loaded(trainer)})

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the header of ``predict``."""
        _print({**_header(trainer, pl_module), "checkpoint": _loaded(trainer)})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the best score and where the checkpoints are, or that nothing was left to do."""
        if not self._trained:
            _print({"nothing done": f"{_start(trainer)}, which is the end: raise trainer.max_steps to train longer"})
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint):
            return
        best = ""
        if checkpoint.best_model_score is not None:
            best = f"{checkpoint.monitor} {checkpoint.best_model_score:.4g} in {_shorten(checkpoint.best_model_path)}"
        _print({"best": best, "last": _shorten(checkpoint.last_model_path)})


@rank_zero_only
def _print(lines: dict[str, str]) -> None:
    if told := [f"{name.capitalize():<12} {text}" for name, text in lines.items() if text]:
        print("\n".join(told), flush=True)


def _header(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    devices = f"{trainer.strategy.root_device.type} x {trainer.world_size}"
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    total = sum(p.numel() for p in module.parameters())
    return {
        "run folder": _shorten(trainer.log_dir or trainer.default_root_dir),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
        "device": f"{devices}, precision {trainer.precision}",
        "parameters": ", ".join(f"{name} {_count(n)}" for name, n in parts.items() if n) + f" (all {_count(total)})",
    }


def _batch(trainer: Trainer) -> str:
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
    ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    steps = f"{trainer.num_training_batches / trainer.accumulate_grad_batches:.0f} steps an epoch"
    if not isinstance(size, int):
        return steps
    return f"{size * ranks * trainer.accumulate_grad_batches} samples a step, {steps}"


def _start(trainer: Trainer) -> str:
    """Whether the run continues one, and what it found if it does not."""
    if trainer.ckpt_path:
        return f"Resuming from {_shorten(trainer.ckpt_path)} at step {trainer.global_step}"
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        return "No checkpoints are kept, starting at step 0"
    if any(Path(folder).glob("last*.ckpt")):
        return f"Starting at step 0 beside an earlier run in {_shorten(folder)}; --ckpt_path last would continue it"
    return f"No checkpoint in {_shorten(folder)}, starting at step 0"


def _loaded(trainer: Trainer) -> str:
    return _shorten(trainer.ckpt_path) if trainer.ckpt_path else "none: the weights are those of a new model"


def _shorten(path: str | os.PathLike[str] | None) -> str:
    """Relative to here where that is shorter to read."""
    text = os.fspath(path or "")
    return text.removeprefix(f"{Path.cwd()}{os.sep}")


def _count(n: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)
