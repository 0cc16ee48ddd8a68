"""How fast a run trains, and how much of the device that takes.

- Lightning's `ThroughputMonitor` waits for the device at every step and asks the module for its FLOPs; this takes its
  parts instead. The host waits for the device only where figures are due, every `trainer.log_every_n_steps` steps.
- FLOPs are the model's (https://arxiv.org/abs/2204.02311): the products of matrices and the convolutions of a batch,
  counted while it is trained on, without what activation checkpointing and fused attention compute again.
"""

import resource
import sys
import time
from collections import Counter
from typing import Any, Literal

import torch
from lightning.fabric.utilities.throughput import Throughput as Rates
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from t2v.batch import TokenBatch, VideoBatch
from t2v.errors import UserError
from t2v.training.flops import ModelFlopCounter
from t2v.training.lightning_private import FETCH_ACTION

_TERA = 1e12
_SIDE = {"cuda": 8192}
"""Rows of the matrices that the peak is measured with; elsewhere 2,048."""


class Throughput(Callback):
    """Logs the speed of training under `throughput/`; what the progress bar has too stands in brackets.

    - `clips_per_second`, and `tokens_per_second` (tokens/s) in stage 2 or `frames_per_second` (frames/s) in stage 1:
      of all ranks.
    - `tflop_per_step`: 10¹² FLOPs of the model in a step of all ranks. `tflops_per_second`: of one device.
      `utilisation` (mfu): the share of the device's peak that this is.
    - `data_wait` (wait): the share of the time in which the next batch was not there yet. It is left out where
      `trainer.profiler` is set, which tells the same.
    - `memory` (GiB): the most that was allocated on the GPU, or that the process held where there is none.

    Each is over the time since it was last logged, validation left out. Also left out are the first batch of a shape,
    which may compile, and those whose FLOPs are counted, uncompiled: the second of a shape, the third, the fifth, the
    ninth and so on, since losses that begin later add to them.

    Args:
        peak: TFLOP a second that a device can do; or whether to measure that at the start, by a product of large
            matrices in the precision of the run, or to take it from the data sheet, where Lightning knows it.
    """

    def __init__(self, peak: float | Literal["measured", "known"] = "measured") -> None:
        if not isinstance(peak, str) and not peak > 0:
            raise UserError(f"peak={peak} of Throughput must be above 0 TFLOP a second, or `measured` or `known`.")
        self.peak = peak
        self._fetching = _FetchClock()
        self._met: Counter[tuple[int, ...]] = Counter()
        self._flops: dict[tuple[int, ...], int] = {}
        self._counting: ModelFlopCounter | None = None
        self._running_since: tuple[float, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put a clock where Lightning waits for batches."""
        if stage == "fit" and type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            trainer.profiler = self._fetching  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak."""
        self._step = trainer.global_step
        self._seconds = self._waited = 0.0
        self._batches = self._clips = self._items = self._done = 0
        self._logged = (0, 0.0, 0.0)
        if trainer.is_global_zero:
            self._rates = Rates(_peak(trainer, self.peak), trainer.world_size, window_size=2)
            self._rates.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop the clock for a batch that is not like the others."""
        if not trainer.is_global_zero:
            return
        shape, _ = _shape(batch)
        seen = self._met[shape]
        self._met[shape] += 1
        if seen.bit_count() <= 1:
            self._pause(trainer)
        if seen.bit_count() == 1:
            self._counting = ModelFlopCounter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch to the figures, and log them where that is due."""
        if not trainer.is_global_zero:
            return
        shape, unit = _shape(batch)
        if self._counting is not None:
            self._flops[shape] = self._counting.stop()
            self._counting = None
        if self._running_since is None:
            self._resume()
        else:
            self._batches += 1
            self._clips += shape[0]
            self._items += batch.tokens.numel() if unit == "tokens" else shape[0] * shape[1]
            self._done += self._flops[shape]
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        due = stepped and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and self._batches > self._logged[0]:
            self._log(trainer, pl_module, unit)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        if self._met and trainer.is_global_zero:
            self._resume()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no counter behind."""
        if self._counting is not None:
            self._counting.stop()
            self._counting = None

    def _pause(self, trainer: Trainer) -> None:
        if self._running_since is None:
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start, waited = self._running_since
        self._seconds += time.perf_counter() - start
        self._waited += self._fetching.seconds - waited
        self._running_since = None

    def _resume(self) -> None:
        self._running_since = time.perf_counter(), self._fetching.seconds

    def _log(self, trainer: Trainer, pl_module: LightningModule, unit: str) -> None:
        self._pause(trainer)
        batches, seconds, waited = self._logged
        self._rates.update(
            time=self._seconds, batches=self._batches, samples=self._clips, lengths=self._items, flops=self._done
        )
        found, ranks = self._rates.compute(), trainer.world_size
        shares = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        figures = {
            "clips_per_second": found["device/samples_per_sec"] * shares,
            f"{unit}_per_second": found["device/items_per_sec"] * shares,
            "tflop_per_step": self._done / (self._batches - batches) * trainer.accumulate_grad_batches * ranks / _TERA,
            "tflops_per_second": found["device/flops_per_sec"] / _TERA,
            "utilisation": found["device/mfu"],
            "memory": _memory(trainer.strategy.root_device),
        }
        if trainer.profiler is self._fetching:  # type: ignore[attr-defined]
            figures["data_wait"] = (self._waited - waited) / (self._seconds - seconds)
        short = {f"{unit}_per_second": f"{unit}/s", "utilisation": "mfu", "data_wait": "wait", "memory": "GiB"}
        bar = {label: figures[name] for name, label in short.items() if name in figures}
        logged = {f"throughput/{name}": value for name, value in figures.items()}
        pl_module.log_dict(logged, batch_size=1, rank_zero_only=True)
        pl_module.log_dict(bar, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
        self._done, self._logged = 0, (self._batches, self._seconds, self._waited)
        self._resume()


class _FetchClock(PassThroughProfiler):
    """Adds up how long the training loop waits for its next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name == FETCH_ACTION:
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == FETCH_ACTION:
            self.seconds += time.perf_counter() - self._since


def _shape(batch: VideoBatch | TokenBatch) -> tuple[tuple[int, ...], str]:
    """What the FLOPs go by, and what is counted."""
    if isinstance(batch, TokenBatch):
        return tuple(batch.tokens.shape), "tokens"
    return tuple(batch.video.shape), "frames"


def _peak(trainer: Trainer, peak: float | str) -> float:
    """FLOPs a second that the device can do."""
    if not isinstance(peak, str):
        return peak * _TERA
    device = trainer.strategy.root_device
    side = _SIDE.get(device.type, 2048)
    with trainer.precision_plugin.forward_context():
        matrix = torch.rand(side, side, device=device)
        matrix = matrix.to((matrix[:1] @ matrix[:, :1]).dtype)
    if peak == "known" and (known := get_available_flops(device, matrix.dtype)):
        return known
    from torch.utils import benchmark  # which looks for compilers

    timer = benchmark.Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.blocked_autorange(min_run_time=0.2).times)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
