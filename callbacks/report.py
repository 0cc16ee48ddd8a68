"""The metrics of ``validate`` and ``test`` as a file, with everything needed to compare them."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from t2v.files import atomic_path, is_writable
from t2v.metrics.distances import missing_from_report
from t2v.metrics.frechet import ClipSetDistance

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
"""Packages on which a metric may depend; the report has the version of each that is installed."""


class MetricsReport(Callback):
    """Writes a JSON file after ``validate`` and ``test``; writes nothing during training.

    - `metrics`: Every logged metric by its name; null if it is not finite.
    - `protocol`: The checkpoint and its step, whether its weights are a moving average, the precision, the seed, the
      clips and how they were cut, the model's fingerprint, and how each metric is computed. A distance between two sets
      of clips whose network, clips, frame rate or seed are not known is null, since it cannot be compared.
    - `versions`: The versions of Python and of packages on which the metrics depend.

    Args:
        path: The file; an older one is replaced. With `trainer.fast_dev_run`, or where its folder cannot be written to,
            the metrics are only printed.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._checkpoint: dict[str, Any] = {"step": None, "averaged_weights": None}
        self._printed_only = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn before anything is computed if the file cannot be written."""
        is_dry_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        is_refused = stage in ("validate", "test") and not is_writable(self.path.parent)
        self._printed_only = is_dry_run or is_refused
        if is_refused and not is_dry_run:
            rank_zero_warn(
                f"'{self.path.parent}' cannot be written to: the metrics are printed and {self.path.name} is not "
                f"written; set the path of {type(self).__name__} to another folder to have it."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step, and whether the weights are a moving average: then the trained ones are stored too."""
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
        if not trainer.is_global_zero or self._printed_only:
            return
        protocol = {**self._describe_run(trainer), **_describe_parts(trainer, pl_module, sum(batches))}
        _complete_distances(metrics, protocol, pl_module)
        report = {
            "metrics": metrics,
            **self.details(),
            "protocol": protocol,
            "versions": _versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as partial:
            partial.write_text(json.dumps(_to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"Wrote        {self.path}", flush=True)

    def details(self) -> dict[str, Any]:
        """Return further parts of the report."""
        return {}

    def _describe_run(self, trainer: Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "command": trainer.state.fn.value if trainer.state.fn else None,
            "checkpoint": trainer.ckpt_path,
            **self._checkpoint,
            "precision": trainer.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": trainer.world_size,
            "seed": int(seed) if seed else None,
        }


def _describe_parts(trainer: Trainer, pl_module: LightningModule, batches: int | float) -> dict[str, Any]:
    """Return the descriptions that data, model and metrics give, if they give one."""
    parts: dict[str, Any] = {}
    if (protocol := getattr(trainer.datamodule, "protocol", None)) is not None:  # type: ignore[attr-defined]
        parts["data"] = protocol(batches)
    if (fingerprint := getattr(pl_module, "fingerprint", None)) is not None:
        parts["model"] = fingerprint() if callable(fingerprint) else fingerprint
    parts["metrics"] = {metric.name: metric.protocol() for metric in getattr(pl_module, "metrics", ())}
    return parts


def _complete_distances(metrics: dict[str, float], protocol: dict[str, Any], pl_module: LightningModule) -> None:
    """Add the split, the frame rate and the seed to the protocol of distances, and refuse those that lack any."""
    for metric in getattr(pl_module, "metrics", ()):
        if not isinstance(metric, ClipSetDistance):
            continue
        entry, data = protocol["metrics"][metric.name], protocol.get("data", {})
        known = {"split": data.get("shards"), "fps": data.get("fps"), "seed": protocol["seed"]}
        entry |= {name: value for name, value in known.items() if value is not None}
        if missing := missing_from_report(entry):
            entry["refused"] = f"not comparable without {', '.join(missing)}"
            metrics |= {name: math.nan for name in metrics if name.rpartition("/")[2] == metric.name}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _to_json(value: Any) -> Any:
    """Return a value that JSON can represent: null in place of NaN and infinity, strings in place of other types."""
    if isinstance(value, dict):
        return {str(name): _to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
