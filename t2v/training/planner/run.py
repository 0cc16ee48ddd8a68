"""A training run as the planner sees it: what it trains, its settings, and their measured steps."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from t2v.errors import UserError
from t2v.generation.settings import GenerationSettings
from t2v.training.planner.budget import (
    OptimizerBytes,
    OptimizerFactory,
    Strategy,
    TrainingBudget,
    build_optimizer,
    model_sizes,
    optimizer_bytes,
    training_budget,
)
from t2v.training.planner.stages import transformer_step, vqvae_step
from t2v.training.planner.step import Device, Step, extrapolate
from t2v.training.sharding import check_tensor_parallel_size
from t2v.training.tensor_parallel import check_heads
from t2v.training.vqvae import LitVQVAE
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE

_LINEAR_FRAMES = 128
"""Frames from which on the bytes of a step of the VQ-VAE grow linearly, so that larger batches are not measured."""
_LINEAR_TOKENS = 16_384
"""The same of the transformer, in tokens. With them, clips of 300 frames are planned exactly, but for the peak of the
backward pass with full checkpointing, which is up to 3 % too small in shallow models."""
_LINEAR_GROUPS = 16
"""Groups of frames from which on the bytes of activation checkpointing grow linearly."""
DEFAULT_TEXT_LENGTH = 256
"""Text tokens of the longest caption, if the text encoder has no limit."""


class Layout(NamedTuple):
    """How devices share the work."""

    strategy: Strategy
    world_size: int
    tp_size: int = 1
    """Tensor-parallel size."""


class Setting(NamedTuple):
    """The settings that decide how much memory a training run takes."""

    precision: str
    checkpointing: str
    """Activation checkpointing: "none", "attention" or "full" of `VideoTransformer`; "none" or "frames" of `VQVAE`."""
    optimizer: str
    layout: Layout

    @property
    def dp_size(self) -> int:
        """Data-parallel size: the number of batches that are computed at the same time."""
        return self.layout.world_size // self.layout.tp_size


class PlannedRun:
    """What a run trains, with the budgets of any setting.

    Args:
        module: The LightningModule of either stage, its model on the meta device or with data.
        datamodule: Sets batch size and frames; one clip without it.
        trainer: Sets precision, strategy and devices; 32-true on one device without it.
        device: The kind of device to plan for.

    Raises:
        UserError: If the model is none of the two stages, or the strategy cannot train it.
    """

    def __init__(
        self, module: LightningModule, datamodule: LightningDataModule | None, trainer: Trainer | None, device: Device
    ) -> None:
        model = module.model
        if not isinstance(model, VideoTransformer | VQVAE):
            raise UserError(
                f"A plan can be made for a VideoTransformer or a VQVAE, but model.model is a {type(model).__name__}."
            )
        self.module = module
        self.model: VideoTransformer | VQVAE = model
        self.trained: nn.Module = model if isinstance(model, VideoTransformer) else _trained_parts(module)
        self.sizes = model_sizes(self.trained)
        self.device = device
        self.generation: GenerationSettings | None = getattr(module, "generation", None)
        buckets = getattr(datamodule, "buckets", None) or []
        largest = max(buckets, key=lambda bucket: bucket.frames * bucket.batch_size, default=datamodule)
        default_frames = self.generation.frames if self.generation else 1
        self.clips: int = getattr(largest, "batch_size", 1)
        self.frames: int = getattr(largest, "frames", 0) or default_frames
        self.tokens = self.clips * self.frames * model.grid_size**2
        """Tokens of a batch."""
        self.text_length: int = getattr(getattr(module, "text_encoder", None), "max_length", DEFAULT_TEXT_LENGTH)
        self.batches = trainer.accumulate_grad_batches if trainer else 1
        """Batches of a step on each device."""
        callbacks: list[Any] = trainer.callbacks if trainer else []  # type: ignore[attr-defined]
        self.averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        self.plugin = _precision_plugin(trainer)
        own: OptimizerFactory = module.optimizer  # type: ignore[assignment]
        self.optimizers = {_name(build_optimizer(self.trained, own)[0]): own}
        """The run's own optimizer first, then alternatives."""
        for name, factory in alternative_optimizers().items():
            self.optimizers.setdefault(name, factory)
        self.levels: tuple[str, ...]
        if isinstance(model, VideoTransformer):
            self.levels, level = ("none", "attention", "full"), str(model.checkpointing)
        else:
            self.levels, level = ("none", "frames"), "none" if model.frames_at_once is None else "frames"
            self.frames_at_once: int = model.frames_at_once or self.frames
        precision = str(trainer.precision) if trainer else "32-true"
        self.setting = Setting(precision, level, next(iter(self.optimizers)), _layout(trainer))
        if self.setting.layout.strategy == "FSDP2":
            self._check_sharding()
        self.step = cache(self._step)
        self.measure = cache(self._measure)
        self.optimizer = cache(self._optimizer)

    def budget(self, setting: Setting, clips: int) -> TrainingBudget:
        """Return the bytes on one device at a batch size."""
        return training_budget(
            self.sizes,
            self.step(setting.precision, setting.checkpointing, clips),
            self.optimizer(setting.optimizer, setting.precision),
            setting.precision,
            *setting.layout,
            averaged=self.averaged,
        )

    def largest_batch(self, setting: Setting, memory: float) -> int:
        """Return the largest batch size of a device that fits, extrapolated from two batch sizes phase by phase.

        Args:
            setting: The setting.
            memory: Bytes of one device.
        """
        linear = self._measured_batches(setting.checkpointing)[0][0]
        pairs = [(linear, linear + 1), (1, linear)]
        if self.clips <= linear and self.budget(setting, self.clips).peak > memory:  # which is measured already
            pairs = [(1, self.clips)]
        for small, large in pairs:
            if small == large:
                continue
            phases = zip(self.budget(setting, small).peaks, self.budget(setting, large).peaks, strict=True)
            fitting = min(
                math.floor((memory - first) * (large - small) / max(last - first, 1)) for first, last in phases
            )
            if fitting >= 0:
                return small + fitting
        return 0

    def layouts(self) -> list[Layout]:
        """Return the run's own layout, one device, and FSDP2 over at least eight devices."""
        own = self.setting.layout
        eight = Layout("FSDP2", max(own.world_size, 8), own.tp_size)
        return _unique([own, Layout("one device", 1), eight])

    def optimizers_for(self, layout: Layout) -> list[str]:
        """Return the optimizers that can be combined with a layout; torchao's are alternatives under FSDP2 only."""
        if layout.strategy == "FSDP2":
            return [name for name in self.optimizers if takes_sharded_parameters(name)]
        own, *others = self.optimizers
        return [own, *(name for name in others if not name.startswith("torchao"))]

    @property
    def is_extrapolated(self) -> bool:
        """Whether the run's batch has more frames than are measured."""
        return self.clips * self.frames > math.prod(self._measured_batches(self.setting.checkpointing)[1])

    def _check_sharding(self) -> None:
        _, world_size, tp_size = self.setting.layout
        check_tensor_parallel_size(tp_size, world_size)
        if isinstance(self.model, VideoTransformer):
            check_heads(self.model, tp_size)
        elif isinstance(self.module, LitVQVAE):
            self.module.check_sharding(tp_size)

    def _measured_batches(self, checkpointing: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the clips and frames of two batches; bytes and operations grow linearly from the first one on."""
        first, more = _LINEAR_FRAMES, _LINEAR_FRAMES
        if isinstance(self.model, VideoTransformer):
            first = max(math.ceil(_LINEAR_TOKENS / self.model.grid_size**2), 2 * self.model.attention.window)
            more = math.ceil(first / 4)
        elif checkpointing == "frames":
            first, more = _LINEAR_GROUPS * self.frames_at_once, self.frames_at_once
        if self.frames > first:  # parts of a clip
            return (1, first), (1, first + more)
        clips = math.ceil(first / self.frames)
        return (clips, self.frames), (clips + 1, self.frames)

    def _step(self, precision: str, checkpointing: str, clips: int) -> Step:
        """Measure a training step; that of a large batch is extrapolated from two smaller ones."""
        shapes = self._measured_batches(checkpointing)
        frames, (first, last) = clips * self.frames, map(math.prod, shapes)
        if frames <= last:
            return self.measure(precision, checkpointing, clips, self.frames)
        small, large = (self.measure(precision, checkpointing, *shape) for shape in shapes)
        return extrapolate(small, large, last - first, frames - last)

    def _measure(self, precision: str, checkpointing: str, clips: int, frames: int) -> Step:
        if isinstance(self.model, VideoTransformer):
            return transformer_step(self.model, clips, frames, self.text_length, precision, checkpointing, self.device)
        frames_at_once = None if checkpointing == "none" else self.frames_at_once
        return vqvae_step(self.model, clips, frames, precision, frames_at_once, self.device)

    def _optimizer(self, name: str, precision: str) -> OptimizerBytes:
        return optimizer_bytes(self.trained, self.optimizers[name], precision, self.device)


def _unique(layouts: Iterable[Layout]) -> list[Layout]:
    return list(dict.fromkeys(layouts))


def _trained_parts(module: LightningModule) -> nn.ModuleDict:
    """Return the VQ-VAE and its discriminators, without the metrics and frozen networks that the module holds too."""
    parts = {"model": module.model, "adversarial": getattr(module, "adversarial", None)}
    return nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})


def alternative_optimizers() -> dict[str, OptimizerFactory]:
    """Return the optimizers that are compared with a run's own; those with 8-bit state, if they are installed."""
    found: list[OptimizerFactory] = [torch.optim.AdamW]
    for package in ("bitsandbytes", "torchao"):
        with suppress(ImportError), _without_compiler():
            found.append(import_module(f"{package}.optim").AdamW8bit)
    return {_name(factory([nn.Parameter(torch.zeros(1))])): factory for factory in found} | {
        "SGD": partial(torch.optim.SGD, momentum=0.9)
    }


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Let `torch.compile` return functions as they are, without importing the compiler, which takes two seconds."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def takes_sharded_parameters(optimizer: str) -> bool:
    """Return whether an optimizer can update FSDP2's parameters, which bitsandbytes' kernels cannot."""
    return not optimizer.startswith("bitsandbytes")


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer, with its package if that is neither PyTorch nor ours."""
    kind = type(optimizer)
    package = kind.__module__.split(".")[0]
    return kind.__name__ if package in ("torch", "t2v") else f"{package} {kind.__name__}"


def _precision_plugin(trainer: Trainer | None) -> str:
    """Return the name of a precision plugin that is more than Lightning's mixed precision, as for FP8, or ""."""
    plugin = trainer.precision_plugin if trainer else None
    is_own = isinstance(plugin, MixedPrecision) and type(plugin) is not MixedPrecision
    return type(plugin).__name__ if is_own else ""


def _layout(trainer: Trainer | None) -> Layout:
    world_size = trainer.num_devices * trainer.num_nodes if trainer else 1
    if trainer is None or world_size == 1:
        return Layout("one device", 1)
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
        return Layout("FSDP2", world_size, getattr(trainer.strategy, "tensor_parallel_size", 1))
    return Layout("DDP", world_size) if isinstance(trainer.strategy, DDPStrategy) else Layout("one device", 1)
