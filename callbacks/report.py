"""The figures of ``validate`` and ``test`` with all that is needed to compare them, as a file."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

PACKAGES = (
    "t2v",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "lpips",
    "numpy",
    "av",
    "decord",
    "opencv-python",
)
"""What a figure may depend on; the report has the version of each that is installed."""


class MetricsReport(Callback):
    """Writes a JSON file after ``validate`` and ``test``; while training it writes nothing.

    - `metrics`: every logged figure by its name; null where it is not a number.
    - `protocol`: the checkpoint and its step, whether its weights are a moving average, the precision, the seed, the
      clips and how they were cut, the model's fingerprint, and how each metric is computed.
    - `versions`: of Python and the packages that figures depend on.

    Args:
        path: The file; it is replaced where it exists.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._checkpoint: dict[str, Any] = {"step": None, "averaged_weights": None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how the weights came about: Lightning's `WeightAveraging` keeps the others beside the average."""
        self._checkpoint = {
            "step": checkpoint["global_step"],
            "averaged_weights": "current_model_state" in checkpoint,
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, trainer.num_val_batches)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of ``test``."""
        self._write(trainer, pl_module, trainer.num_test_batches)

    def _write(self, trainer: Trainer, pl_module: LightningModule, batches: list[int | float]) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not trainer.is_global_zero:
            return
        report = {
            "metrics": metrics,
            "protocol": {**self._run(trainer), **_parts(trainer, pl_module, sum(batches))},
            "versions": _versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
        print(f"Wrote        {self.path}", flush=True)

    def _run(self, trainer: Trainer) -> dict[str, Any]:
        device, seed = trainer.strategy.root_device, os.environ.get("PL_GLOBAL_SEED")
        return {
            "command": str(trainer.state.fn and trainer.state.fn.value),
            "checkpoint": trainer.ckpt_path,
            **self._checkpoint,
            "precision": trainer.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": trainer.world_size,
            "seed": seed and int(seed),
        }


def _parts(trainer: Trainer, pl_module: LightningModule, batches: float) -> dict[str, Any]:
    """What the data, the model and the metrics say of themselves."""
    told: dict[str, Any] = {}
    if (protocol := getattr(trainer.datamodule, "protocol", None)) is not None:  # type: ignore[attr-defined]
        told["data"] = protocol(batches)
    if (fingerprint := getattr(pl_module, "fingerprint", None)) is not None:
        told["model"] = fingerprint()
    told["metrics"] = {metric.name: metric.protocol() for metric in getattr(pl_module, "metrics", ())}
    return told


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """The same as JSON has it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
