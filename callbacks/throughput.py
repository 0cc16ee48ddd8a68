"""Logs the speed of training and the fraction of the device's peak rate that it achieves.

- Lightning's `ThroughputMonitor` synchronizes with the device at every step and asks the module for its FLOPs; this
  callback uses only its computation of rates. It synchronizes every `trainer.log_every_n_steps` steps.
- FLOPs are those of the model (https://arxiv.org/abs/2204.02311): matrix products and convolutions, counted while a
  batch is trained on, without what activation checkpointing and fused attention recompute.
"""

import resource
import sys
import time
from collections import Counter
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.throughput import Throughput as Rates
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from t2v.batch import TokenBatch, VideoBatch
from t2v.errors import check_range
from t2v.training.flops import ModelFlopCounter
from t2v.training.lightning_private import FETCH_ACTION

_TERA = 1e12
_MATRIX_SIZE = {"cuda": 8192}
"""Rows of the matrices with which the peak is measured, by device type; 2,048 on other devices."""


class _Totals(NamedTuple):
    """Totals since training started, without what is left out."""

    batches: int = 0
    clips: int = 0
    items: int = 0
    """Tokens or frames."""
    flops: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds in which the training loop waited for a batch."""


class Throughput(Callback):
    """Logs the speed of training under `throughput/`; the names in brackets are shown in the progress bar.

    - `clips_per_second`, and `tokens_per_second` (tokens/s) in stage 2 or `frames_per_second` (frames/s) in stage 1:
      of all ranks.
    - `tflop_per_step`: 10¹² FLOPs of the model in a step of all ranks. `tflops_per_second`: of one device.
      `utilization` (mfu): `tflops_per_second` as a fraction of the device's peak.
    - `data_wait` (wait): fraction of the time spent waiting for the next batch. It is left out if `trainer.profiler` is
      set, which reports the same.
    - `memory` (GiB): maximum memory allocated on the GPU, or held by the process if there is no GPU.

    Each is measured since it was last logged, without validation. Also left out are the first batch of a shape, which
    may be compiled, and batches whose FLOPs are counted, which run uncompiled: the second, third, fifth, ninth, … of
    a shape; several, because losses that start later in training add FLOPs.

    Args:
        peak: Peak rate of a device in TFLOP/s; or `measured`, to measure it at the start by a product of large matrices
            in the precision of the run; or `known`, to use the data sheet if Lightning has it.

    Raises:
        UserError: If `peak` is not positive.
    """

    def __init__(self, peak: float | Literal["measured", "known"] = "measured") -> None:
        check_range(self, "(0, inf)", peak=peak)
        self.peak = peak
        self._clock = _FetchClock()
        self._seen: Counter[tuple[int, ...]] = Counter()
        """Number of batches by shape."""
        self._next_count: dict[tuple[int, ...], int] = {}
        """Number of seen batches at which FLOPs are counted next, by shape."""
        self._flops: dict[tuple[int, ...], int] = {}
        """FLOPs of a batch by shape."""
        self._counter: ModelFlopCounter | None = None
        self._running_since: tuple[float, float] | None = None
        """Time, and seconds waited for batches, when the measurement was last resumed; None while it is paused."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the clock that measures how long Lightning waits for batches."""
        if stage == "fit" and type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            trainer.profiler = self._clock  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the peak rate."""
        self._step = trainer.global_step
        self._totals = self._logged = _Totals()
        if trainer.is_global_zero:
            self._rates = Rates(_peak(trainer, self.peak), trainer.world_size, window_size=2)
            self._rates.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pause the measurement for the first batch of a shape and for batches whose FLOPs are counted."""
        if not trainer.is_global_zero:
            return
        shape, _ = _shape(batch)
        seen = self._seen[shape]
        self._seen[shape] += 1
        if seen == 0:
            self._pause(trainer)
        if seen == self._next_count.get(shape, 1):
            self._next_count[shape] = 2 * seen
            self._pause(trainer)
            self._counter = ModelFlopCounter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch to the totals, and log every `trainer.log_every_n_steps` steps."""
        if not trainer.is_global_zero:
            return
        shape, unit = _shape(batch)
        if self._counter is not None:
            self._flops[shape] = self._counter.stop()
            self._counter = None
        if self._running_since is None:
            self._resume()
        else:
            totals = self._totals
            items = batch.tokens.numel() if unit == "tokens" else shape[0] * shape[1]
            self._totals = totals._replace(
                batches=totals.batches + 1,
                clips=totals.clips + shape[0],
                items=totals.items + items,
                flops=totals.flops + self._flops[shape],
            )
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        due = stepped and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and self._totals.batches > self._logged.batches:
            self._log(trainer, pl_module, unit)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the measurement."""
        self._pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the measurement."""
        if self._seen and trainer.is_global_zero:
            self._resume()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting FLOPs."""
        if self._counter is not None:
            self._counter.stop()
            self._counter = None

    def _pause(self, trainer: Trainer) -> None:
        if self._running_since is None:
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start, waited = self._running_since
        self._totals = self._totals._replace(
            seconds=self._totals.seconds + time.perf_counter() - start,
            waited=self._totals.waited + self._clock.seconds - waited,
        )
        self._running_since = None

    def _resume(self) -> None:
        self._running_since = time.perf_counter(), self._clock.seconds

    def _log(self, trainer: Trainer, pl_module: LightningModule, unit: str) -> None:
        self._pause(trainer)
        new, old = self._totals, self._logged
        flops, batches = new.flops - old.flops, new.batches - old.batches
        self._rates.update(time=new.seconds, batches=new.batches, samples=new.clips, lengths=new.items, flops=flops)
        rates = self._rates.compute()
        dp_size = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        values = {
            "clips_per_second": rates["device/samples_per_sec"] * dp_size,
            f"{unit}_per_second": rates["device/items_per_sec"] * dp_size,
            "tflop_per_step": flops / batches * trainer.accumulate_grad_batches * trainer.world_size / _TERA,
            "tflops_per_second": rates["device/flops_per_sec"] / _TERA,
            "utilization": rates["device/mfu"],
            "memory": _memory(trainer.strategy.root_device),
        }
        if trainer.profiler is self._clock:  # type: ignore[attr-defined]
            values["data_wait"] = (new.waited - old.waited) / (new.seconds - old.seconds)
        labels = {f"{unit}_per_second": f"{unit}/s", "utilization": "mfu", "data_wait": "wait", "memory": "GiB"}
        progress_bar = {label: values[name] for name, label in labels.items() if name in values}
        logger = {f"throughput/{name}": value for name, value in values.items()}
        pl_module.log_dict(logger, batch_size=1, rank_zero_only=True)
        pl_module.log_dict(progress_bar, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
        self._logged = new
        self._resume()


class _FetchClock(PassThroughProfiler):
    """Profiler that sums up how long the training loop waits for its next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name == FETCH_ACTION:
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == FETCH_ACTION:
            self.seconds += time.perf_counter() - self._since


def _shape(batch: VideoBatch | TokenBatch) -> tuple[tuple[int, ...], str]:
    """Return the shape, which determines the FLOPs, and the name of the unit that is counted."""
    if isinstance(batch, TokenBatch):
        return tuple(batch.tokens.shape), "tokens"
    return tuple(batch.video.shape), "frames"


def _peak(trainer: Trainer, peak: float | str) -> float:
    """Return the peak rate of the device in FLOP/s."""
    if not isinstance(peak, str):
        return peak * _TERA
    device = trainer.strategy.root_device
    size = _MATRIX_SIZE.get(device.type, 2048)
    with trainer.precision_plugin.forward_context():
        matrix = torch.rand(size, size, device=device)
        matrix = matrix.to((matrix[:1] @ matrix[:, :1]).dtype)  # the dtype of products in this precision
    if peak == "known" and (known := get_available_flops(device, matrix.dtype)):
        return known
    from torch.utils import benchmark  # slow to import

    timer = benchmark.Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.2).times)


def _memory(device: torch.device) -> float:
    """Return the maximum memory in GiB so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
