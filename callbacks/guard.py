"""Skips training steps with a non-finite loss or gradient, and refuses weights that are not finite."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from t2v.batch import TokenBatch, VideoBatch
from t2v.checkpoints.storage import check_finite
from t2v.errors import UserError, check_range
from t2v.training.lightning_private import skip_average_update
from t2v.training.optimization import split_discriminators

_DECAY = 0.98
"""Decay of the running mean and variance of the loss: they average over about 50 steps."""


class _Batch(NamedTuple):
    """A batch of the current step."""

    number: int
    keys: list[str]
    loss: Float[Tensor, ""]


class NaNGuard(Callback):
    """Skips training steps whose loss or gradient is not finite, and records them and loss spikes.

    - A skipped step changes no weight, no buffer (a codebook is one), no optimizer state and no moving average. The
      learning-rate schedule and the step count continue, so that the run ends at the same step.
    - All ranks skip together. With gradient accumulation, one non-finite batch skips the whole step.
    - For each responsible batch, a line is added to `anomalies.jsonl` in the run folder: time, kind (`loss`, `gradient`
      or `spike`), step, epoch, batch, data-parallel rank, loss, gradient norm before clipping, and the keys of the
      samples. If no batch of the step can be singled out, there is a line for each.
    - Weights that are NaN or infinite are not saved, so that the last good checkpoint stays, and not used.
    - It does nothing during training if the precision has a loss scaler (16-mixed), which skips steps itself.
    - `train/gradient_norm` is logged; that of discriminators, which are clipped separately, as
      `train/discriminator_gradient_norm`.

    Args:
        budget: Maximum number of skipped steps of the whole run, including the runs it was resumed from; one more stops
            it.
        spike: Number of standard deviations above the running mean from which a loss is recorded as a spike. Spikes
            are not skipped.
        warmup: Number of steps at the beginning in which no spikes are recorded, at least 2.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(self, budget: int = 10, spike: float = 6.0, warmup: int = 100) -> None:
        check_range(self, "[0, inf)", budget=budget)
        check_range(self, "(0, inf]", spike=spike)
        check_range(self, "[2, inf)", warmup=warmup)
        self.budget, self.spike, self.warmup = budget, spike, warmup
        self.skipped = 0
        self.spikes = 0
        self._steps = 0
        self._mean = 0.0
        self._variance = 0.0
        self._batches: list[_Batch] = []
        self._current: tuple[int, list[str]] = (0, [])
        self._buffers: dict[str, Tensor] = {}
        self._path = Path()
        self._active = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights, and find the run folder; `log_dir` is a collective call on all ranks."""
        self._check_weights(trainer, pl_module)
        self._active = getattr(trainer.precision_plugin, "scaler", None) is None
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / "anomalies.jsonl"
        self._batches.clear()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_weights(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights."""
        self._check_weights(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights."""
        self._check_weights(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the weights; if they are not finite, the older checkpoint stays."""
        step = f"The weights at step {trainer.global_step}"
        _check_on_all_ranks(trainer, pl_module, f"{step} are not saved, so that the last checkpoint stays. They")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the keys of the batch, and copy the buffers, which the forward pass may change."""
        if not self._active:
            return
        self._current = (batch_idx, batch.keys if isinstance(batch, VideoBatch | TokenBatch) else [])
        if not self._batches:
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Float[Tensor, ""]) -> None:
        """Remember the loss, without synchronizing with the device."""
        if not self._active:
            return
        index, keys = self._current
        self._batches.append(_Batch(index, keys, loss.detach() * trainer.accumulate_grad_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Skip the step if its loss or gradient is not finite, by removing the gradients."""
        batches, self._batches = self._batches, []
        if not batches:
            return
        norms, loss = self._measure(trainer, optimizer, batches)
        for name, each in zip(("train/gradient_norm", "train/discriminator_gradient_norm"), norms, strict=False):
            pl_module.log(name, each, batch_size=1)
        pl_module.log("gradient", norms[0], prog_bar=True, logger=False, batch_size=1)
        norm = math.hypot(*norms)
        if math.isfinite(norm) and math.isfinite(loss):
            self._update_statistics(trainer, loss, norm, batches)
            return
        self.skipped += 1
        self._undo(trainer, pl_module, optimizer)
        kind = "gradient" if math.isfinite(loss) else "loss"
        self._record(trainer, kind, norm, batches, limit=math.inf)
        rank_zero_warn(f"Step {trainer.global_step} is skipped, its {kind} is not finite: see {self._path}")
        self._check_budget(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the statistics of the loss."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "steps": self._steps,
            "mean": self._mean,
            "variance": self._variance,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and the statistics of a checkpoint."""
        self.skipped, self.spikes = state_dict["skipped"], state_dict["spikes"]
        self._steps, self._mean, self._variance = state_dict["steps"], state_dict["mean"], state_dict["variance"]

    def _check_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_on_all_ranks(trainer, pl_module, f"{trainer.ckpt_path or 'The model'}")

    def _measure(self, trainer: Trainer, optimizer: Optimizer, batches: list[_Batch]) -> tuple[list[float], float]:
        """Return gradient norms and loss, the mean over the ranks; the only synchronization with the device.

        The norms are those of the model and, if there are any, of its discriminators.
        """
        loss = torch.stack([batch.loss.float() for batch in batches]).mean()
        model, discriminators = split_discriminators(optimizer)
        parts = [model, discriminators] if discriminators else [model]
        sums = torch.stack([*(_gradient_norm(part).to(loss.device) for part in parts), loss])
        if trainer.world_size > 1:
            dist.all_reduce(sums)
        *mean_norms, mean_loss = (sums / trainer.world_size).tolist()
        return mean_norms, mean_loss

    def _undo(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Remove the gradients, so that the optimizer changes no weight, and restore the buffers."""
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, before in self._buffers.items():
                pl_module.get_buffer(name).copy_(before)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                skip_average_update(callback, trainer.global_step + 1)

    def _update_statistics(self, trainer: Trainer, loss: float, norm: float, batches: list[_Batch]) -> None:
        """Record a spike of the loss, and update the running mean and variance."""
        limit = self._mean + self.spike * math.sqrt(self._variance)
        if self._steps >= self.warmup and loss > limit:
            self.spikes += 1
            self._record(trainer, "spike", norm, batches, limit)
            loss = limit  # so that a spike does not hide the next one
        self._steps += 1
        weight = max(1 - _DECAY, 1 / self._steps)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)

    def _record(self, trainer: Trainer, kind: str, norm: float, batches: list[_Batch], limit: float) -> None:
        """Write a line for every batch of any rank whose loss is above `limit` or not finite; if none is, for all."""
        dp_rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
        lines: list[dict[str, Any]] = [
            {"batch": batch.number, "rank": dp_rank, "loss": float(batch.loss), "keys": batch.keys} for batch in batches
        ]
        if trainer.world_size > 1:
            of_ranks: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_ranks, lines)
            # Tensor-parallel ranks have the same batches.
            unique = {(line["rank"], line["batch"]): line for of_rank in of_ranks for line in of_rank}
            lines = list(unique.values())
        if not trainer.is_global_zero:
            return
        step = {
            "kind": kind,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "gradient_norm": _to_json(norm),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        responsible = [line for line in lines if not math.isfinite(line["loss"]) or line["loss"] > limit]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for line in responsible or lines:
                file.write(json.dumps({**step, **line, "loss": _to_json(line["loss"])}) + "\n")

    def _check_budget(self, trainer: Trainer) -> None:
        if self.skipped > self.budget:
            raise UserError(
                f"{self.skipped} training steps had a non-finite loss or gradient, the last at step "
                f"{trainer.global_step}, and the budget of NaNGuard is {self.budget}: {self._path} lists the samples; "
                "if they are not corrupt, lower the learning rate, use a higher precision (bf16-mixed, 32-true), or "
                "raise budget."
            )


def _check_on_all_ranks(trainer: Trainer, module: LightningModule, source: str) -> None:
    """Raise an error on all ranks if weights of any rank are not finite."""
    message = ""
    try:
        check_finite(module.state_dict(), source)
    except UserError as error:
        message = str(error)
    if trainer.world_size > 1:
        messages: list[Any] = [""] * trainer.world_size
        dist.all_gather_object(messages, message)
        message = next(filter(None, messages), "")
    if message:
        raise UserError(message)


def _gradient_norm(parameters: list[nn.Parameter]) -> Float[Tensor, ""]:
    """Return the norm of norms, so that gradients in bfloat16 are summed in float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [each.float() if each.dtype == torch.float64 else each for each in gradients]
    norm = torch.nn.utils.get_total_norm(
        [g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _to_json(value: float) -> float | str:
    """Return a float, or a string if it is NaN or infinite, which JSON does not have; Python's `float` reads both."""
    return value if math.isfinite(value) else str(value)
