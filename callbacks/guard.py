"""What stands between one bad batch and a ruined run."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from t2v.batch import TokenBatch, VideoBatch
from t2v.errors import UserError
from t2v.training.lightning_private import skip_average_update

_MEMORY = 0.98
"""Of the running mean and variance: they look back about 50 steps."""


class _Seen(NamedTuple):
    """One batch of the step being made, and what it gave."""

    batch: int
    keys: list[str]
    loss: Tensor


class NaNGuard(Callback):
    """Skips training steps whose loss or gradient is not finite, and records them and jumps of the loss.

    - A skipped step changes no weight, no buffer (a codebook is one), no state of the optimizer and no moving average.
      The schedule and the count of steps go on, so that the run ends where it would have ended.
    - All ranks skip together. With gradient accumulation one bad batch skips the whole step.
    - `anomalies.jsonl` in the run's folder gets a line for each batch that is to blame: the time, the kind (`loss`,
      `gradient` or `spike`), step, epoch, batch and rank, the loss, the norm of the gradient before clipping, and the
      keys of the samples. Where no batch stands out, each of the step has its line.
    - `train/gradient_norm` is logged.

    Args:
        budget: Skipped steps of the whole run, resumed parts included, after which one more stops it.
        spike: Standard deviations above the running mean from which on a loss is recorded as a jump; it is not skipped.
        warmup: Steps at the beginning that only teach what losses are usual.
    """

    def __init__(self, budget: int = 10, spike: float = 6.0, warmup: int = 100) -> None:
        if budget < 0 or warmup < 2 or not spike > 0:
            raise UserError(
                f"budget={budget}, spike={spike} and warmup={warmup} of NaNGuard must be at least 0, above 0 and at "
                "least 2."
            )
        self.budget, self.spike, self.warmup = budget, spike, warmup
        self.skipped = self.spikes = 0
        self._steps, self._mean, self._variance = 0, 0.0, 0.0
        self._seen: list[_Seen] = []
        self._batch: tuple[int, list[str]] = (0, [])
        self._buffers: dict[str, Tensor] = {}
        self._path = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a precision whose loss scaler skips steps itself."""
        if stage == "fit" and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                f"NaNGuard and the loss scaler of trainer.precision={trainer.precision} would both skip steps: take "
                "bf16-mixed, or leave NaNGuard out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's folder, which all ranks must ask for."""
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / "anomalies.jsonl"
        self._seen.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whose batch it is, and keep the buffers that the forward pass may change."""
        self._batch = (batch_idx, batch.keys if isinstance(batch, VideoBatch | TokenBatch) else [])
        if not self._seen:
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss, without waiting for it."""
        self._seen.append(_Seen(*self._batch, loss.detach() * trainer.accumulate_grad_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step, and take its gradients away if it is to be skipped: optimizers leave such weights alone."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        norm, loss = self._measure(trainer, optimizer, seen)
        pl_module.log("train/gradient_norm", norm, batch_size=1)
        pl_module.log("gradient", norm, prog_bar=True, logger=False, batch_size=1)
        if not math.isfinite(norm + loss):
            self.skipped += 1
            self._undo(trainer, pl_module, optimizer)
            self._record(trainer, "gradient" if math.isfinite(loss) else "loss", norm, seen, math.inf)
            self._require_budget(trainer)
        else:
            self._watch(trainer, loss, norm, seen)

    def state_dict(self) -> dict[str, Any]:
        """The counts, and what losses are usual."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "steps": self._steps,
            "mean": self._mean,
            "variance": self._variance,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        self.skipped, self.spikes = state_dict["skipped"], state_dict["spikes"]
        self._steps, self._mean, self._variance = state_dict["steps"], state_dict["mean"], state_dict["variance"]

    def _measure(self, trainer: Trainer, optimizer: Optimizer, seen: list[_Seen]) -> tuple[float, float]:
        """The gradient's norm and the mean loss of all ranks; the only place where the host waits for the device."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # The norm of norms, so that gradients in bfloat16 are summed in float32.
        norm = torch.nn.utils.get_total_norm(
            [g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        )
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        loss = torch.stack([batch.loss.float() for batch in seen]).mean()
        figures = torch.stack([norm.to(loss.device, loss.dtype), loss])
        if trainer.world_size > 1:
            dist.all_reduce(figures)
        norm_sum, loss_sum = figures.tolist()
        return norm_sum / trainer.world_size, loss_sum / trainer.world_size

    def _undo(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave everything as it was before the step."""
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, before in self._buffers.items():
                pl_module.get_buffer(name).copy_(before)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                skip_average_update(callback, trainer.global_step + 1)

    def _watch(self, trainer: Trainer, loss: float, norm: float, seen: list[_Seen]) -> None:
        """Record a jump of the loss, and learn what is usual."""
        limit = self._mean + self.spike * math.sqrt(self._variance)
        if self._steps >= self.warmup and loss > limit:
            self.spikes += 1
            self._record(trainer, "spike", norm, seen, limit)
            loss = limit  # one jump must not hide the next
        self._steps += 1
        share = max(1 - _MEMORY, 1 / self._steps)
        off = loss - self._mean
        self._mean += share * off
        self._variance = (1 - share) * (self._variance + share * off**2)

    def _record(self, trainer: Trainer, kind: str, norm: float, seen: list[_Seen], limit: float) -> None:
        """Write a line for every batch, of any rank, with a loss above `limit`, or for all where there is none."""
        told = {
            "kind": kind,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "gradient_norm": _plain(norm),
        }
        share = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]  # several devices may work on one
        lines: list[dict[str, Any]] = [
            {"batch": each.batch, "rank": share, "loss": float(each.loss), "keys": each.keys} for each in seen
        ]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, lines)
            lines = list({(line["rank"], line["batch"]): line for part in parts for line in part}.values())
        blamed = [line for line in lines if not math.isfinite(line["loss"]) or line["loss"] > limit] or lines
        if not trainer.is_global_zero:
            return
        told["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**told, **line, "loss": _plain(line["loss"])}) + "\n" for line in blamed)
        if kind != "spike":
            rank_zero_warn(f"Step {trainer.global_step} is skipped, its {kind} is not finite: see {self._path}")

    def _require_budget(self, trainer: Trainer) -> None:
        if self.skipped > self.budget:
            raise UserError(
                f"{self.skipped} training steps had a loss or a gradient that is not finite, the last at step "
                f"{trainer.global_step}, and the budget of NaNGuard is {self.budget}: {self._path} names the samples; "
                "where they are sound, lower the learning rate or the precision's risk (bf16-mixed, 32-true), or raise "
                "budget."
            )


def _plain(value: float) -> float | str:
    """The same as JSON has it, which knows no NaN and no infinity; Python's `float` reads both."""
    return value if math.isfinite(value) else str(value)
