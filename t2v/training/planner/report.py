"""The plan of a run as text: what `python cli.py plan` prints."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
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
    Budget,
    Optimize,
    OptimizerBytes,
    Strategy,
    build,
    decode,
    generate,
    optimizer_bytes,
    parts,
    train,
    transformer_step,
    vqvae_step,
)
from t2v.training.planner.step import Device, Step
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE

GB = 1e9
WORDS = 256
"""Of the longest caption, where the text encoder does not say where it cuts."""


class Setting(NamedTuple):
    """What decides how much memory a run takes."""

    precision: str
    recompute: str
    """What the backward pass computes again: a level of `VideoTransformer`'s checkpointing, or a group of frames."""
    optimizer: str
    strategy: Strategy
    devices: int
    together: int = 1
    """Devices that share the work on a clip."""

    @property
    def shares(self) -> int:
        """Batches that are worked on at a time."""
        return self.devices // self.together


class Run:
    """What a run trains, and measured steps of it under any setting."""

    def __init__(
        self, module: LightningModule, datamodule: LightningDataModule | None, trainer: Trainer | None, device: Device
    ):
        """
        Args:
            module: the LightningModule of either stage, its model on the meta device or a real one.
            datamodule: decides batch size and frames; without it, one clip.
            trainer: decides precision, strategy and devices; without it, 32-true on one device.
            device: the kind of device to plan for.
        """
        model, self.device = module.model, device
        if not isinstance(model, VideoTransformer | VQVAE):
            raise UserError(
                f"A plan can be made for a VideoTransformer or a VQVAE, but model.model is a {type(model).__name__}."
            )
        self.model: VideoTransformer | VQVAE = model
        self.trained: nn.Module = model if isinstance(model, VideoTransformer) else module
        self.generation: GenerationSettings | None = getattr(module, "generation", None)
        buckets = getattr(datamodule, "buckets", None) or []
        largest = max(buckets, key=lambda bucket: bucket.frames * bucket.batch_size, default=datamodule)
        self.clips: int = getattr(largest, "batch_size", 1)
        self.frames: int = getattr(largest, "frames", 0) or (self.generation.frames if self.generation else 1)
        self.tokens = self.clips * self.frames * model.grid_size**2
        self.words: int = getattr(getattr(module, "text_encoder", None), "max_length", WORDS)
        self.batches = trainer.accumulate_grad_batches if trainer else 1
        callbacks: list[Any] = trainer.callbacks if trainer else []  # type: ignore[attr-defined]
        self.averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        plugin = trainer.precision_plugin if trainer else None
        self.suffix = f" ({type(plugin).__name__})" if _is_own(plugin) else ""
        self.optimizers = _optimizers(module, self.trained)
        self.levels: tuple[str, ...]
        if isinstance(model, VideoTransformer):
            self.levels, level = ("none", "attention", "full"), str(model.checkpointing)
        else:
            self.levels, level = ("none", "frames"), "none" if model.frames_at_once is None else "frames"
        precision = str(trainer.precision) if trainer else "32-true"
        self.setting = Setting(precision, level, next(iter(self.optimizers)), *_spread(trainer))
        self.step = cache(self._step)
        self.optimizer = cache(self._optimizer)

    def budget(self, setting: Setting, clips: int) -> Budget:
        """What a device holds."""
        return train(
            self.trained,
            self.step(setting.precision, setting.recompute, clips),
            self.optimizer(setting.optimizer, setting.precision),
            setting.precision,
            setting.strategy,
            setting.devices,
            setting.together,
            self.averaged,
        )

    def most_clips(self, setting: Setting, memory: float) -> int:
        """Largest batch of a device that fits; every clip more takes the same."""
        some = max(self.clips, 2)
        one, many = (self.budget(setting, clips).peak for clips in (1, some))
        return 0 if one > memory else 1 + int((memory - one) * (some - 1) // max(many - one, 1))

    def _step(self, precision: str, recompute: str, clips: int) -> Step:
        if isinstance(self.model, VideoTransformer):
            return transformer_step(self.model, clips, self.frames, self.words, precision, recompute, self.device)
        at_once = None if recompute == "none" else self.model.frames_at_once or 1
        return vqvae_step(self.model, clips, self.frames, precision, at_once, self.device)

    def _optimizer(self, name: str, precision: str) -> OptimizerBytes:
        return optimizer_bytes(self.trained, self.optimizers[name], precision, self.device)


def report(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    trainer: Trainer | None = None,
    memory: float = 80.0,
    tflops: float | None = None,
    device: Device = "cuda",
) -> str:
    """What a run takes in memory and work, and which settings fit.

    Args:
        model: the LightningModule of either stage, its model on the meta device or a real one.
        datamodule: decides batch size and frames; it is not opened.
        trainer: decides precision, strategy and number of devices.
        memory: of one device, in GB (10⁹ bytes).
        tflops: TFLOP/s that one device reaches; without it no times are told.
        device: the kind of device to plan for.

    Raises:
        UserError: where the model is neither stage's, or memory or tflops are not above zero.
    """
    if memory <= 0 or (tflops is not None and tflops <= 0):
        raise UserError(f"memory={memory} and tflops={tflops} must be greater than 0: GB and TFLOP/s of one device.")
    run = Run(model, datamodule, trainer, device)
    sections = [_head(run), _parts(run.trained), _memory(run, memory), _work(run, tflops), _others(run, memory)]
    if isinstance(run.model, VideoTransformer):
        sections.append(_generation(run.model, model, run, memory))
    return "\n\n".join(sections)


def _head(run: Run) -> str:
    setting, grid = run.setting, run.model.grid_size
    every = run.tokens * run.batches * setting.shares
    average = ", with a moving average of the weights" if run.averaged else ""
    told = [
        f"Plan         {type(run.model).__name__}, {_count(sum(parts(run.trained).values()))} parameters",
        f"setting      {_say(setting, run.suffix)}{average}",
        f"batch        {run.clips} clips × {run.frames} frames × {grid}×{grid} = {run.tokens:,} tokens a device",
        f"a step       {run.batches} batches × {setting.shares} devices = {every:,} tokens",
    ]
    if (together := setting.together) > 1:
        told[2] = told[2].replace("a device", f"for {together} devices together")
        told[3] = told[3].replace("devices", f"times {together} devices")
        told.append("activations  as if each device did all the work on its clips: they take less")
    return "\n".join(told)


def _parts(model: nn.Module) -> str:
    counts = parts(model)
    total = sum(counts.values())
    rows = [(name, f"{count:,}", f"{count / max(total, 1):.1%}") for name, count in counts.items()]
    return _table(("parameters", "number", "share"), [*rows, ("all", f"{total:,}", "100.0%")])


def _memory(run: Run, memory: float) -> str:
    budgets = [run.budget(run.setting._replace(recompute=level), run.clips) for level in run.levels]
    optimizer = f"state of {run.setting.optimizer}"
    lines = {
        "weights": [each.weights for each in budgets],
        "gradients": [each.gradients for each in budgets],
        optimizer: [each.optimizer for each in budgets],
        "moving average": [each.average for each in budgets],
        "exchange between devices": [each.exchange for each in budgets],
        "activations and temporaries": [each.activations for each in budgets],
        "at the fullest": [each.peak for each in budgets],
        "  kept for the backward pass": [each.saved for each in budgets],
    }
    if isinstance(run.model, VideoTransformer):
        width = 4 if run.setting.precision == "32-true" else 2
        lines["  logits, then their gradient"] = [run.tokens * run.model.vocab_size * width] * len(budgets)
    rows = [(name, *(f"{value / GB:.2f}" for value in values)) for name, values in lines.items() if any(values)]
    rows.append((f"fits in {memory:g} GB", *("yes" if each.peak <= memory * GB else "no" for each in budgets)))
    header = ("GB on each device, recomputing", *(_mark(level, run) for level in run.levels))
    return _table(header, rows)


def _work(run: Run, tflops: float | None) -> str:
    plain = run.step(run.setting.precision, "none", run.clips).flops
    rows: list[tuple[str, ...]] = []
    levels = [run.step(run.setting.precision, level, run.clips).flops for level in run.levels]
    rows.append(("TFLOP a batch", *(f"{flops / 1e12:,.2f}" for flops in levels)))
    rows.append(("  beside the model's own", *(f"{flops / plain:.0%}" for flops in levels)))
    times = run.batches * run.setting.shares
    rows.append(("TFLOP a step, all devices", *(f"{times * flops / 1e12:,.1f}" for flops in levels)))
    if tflops is not None:
        seconds = [flops * run.batches / (tflops * 1e12 * run.setting.together) for flops in levels]
        rows.append((f"seconds a step at {tflops:g} TFLOP/s", *(f"{each:,.2f}" for each in seconds)))
        rows.append(("tokens/s, all devices", *(f"{run.tokens * times / each:,.0f}" for each in seconds)))
    return _table(("work, recomputing", *(_mark(level, run) for level in run.levels)), rows)


def _others(run: Run, memory: float) -> str:
    """Peaks of other settings, the most clips that fit in each, and the one to take."""
    precisions = [run.setting.precision]
    if not any(run.most_clips(run.setting._replace(recompute=level), memory * GB) for level in run.levels):
        precisions.append("bf16-true")
    settings = [
        Setting(precision, level, optimizer, *spread)
        for precision in dict.fromkeys(precisions)
        for spread in _spreads(run.setting)
        for optimizer in run.optimizers
        for level in run.levels
    ]
    most = {setting: run.most_clips(setting, memory * GB) for setting in settings}
    rows = []
    for setting in settings[:: len(run.levels)]:
        cells = []
        for level in run.levels:
            each = setting._replace(recompute=level)
            peak = run.budget(each, run.clips).peak / GB
            cells.append(f"{peak:.1f} ({most[each]})")
        rows.append((setting.precision, setting.optimizer, _devices(setting), *cells))
    title = f"GB at {run.clips} clips a device, and the most clips that fit in {memory:g} GB"
    table = _table(("precision", "optimizer", "devices", *run.levels), rows, left=3)
    return f"{title}\n{table}\n{_advice(run, most, memory)}"


def _advice(run: Run, most: dict[Setting, int], memory: float) -> str:
    """The first setting that takes the batch as it is, by what it costs: nothing, work, precision of the optimizer."""
    fitting = [setting for setting, clips in most.items() if clips >= run.clips]
    if not fitting:
        least = min(most, key=lambda setting: run.budget(setting, 1).peak)
        short = run.budget(least, 1).peak / GB - memory
        if short <= 0:
            return (
                f"recommended  a smaller batch: {most[least]} clips fit with {_say(least)}; keep the batch by "
                f"trainer.accumulate_grad_batches"
            )
        return f"recommended  more devices or memory: one clip with {_say(least)} lacks {short:.1f} GB"
    own, names = run.setting, list(run.optimizers)

    def cost(setting: Setting) -> tuple[int, ...]:
        """Other devices cost most, then weights without a float32 copy, then another optimizer, then work."""
        return (
            (setting.strategy, setting.devices, setting.together) != (own.strategy, own.devices, own.together),
            setting.precision != own.precision,
            names.index(setting.optimizer),
            run.levels.index(setting.recompute),
        )

    best = min(fitting, key=cost)
    return f"recommended  {_say(best)}: up to {most[best]} clips a device" + (
        "; bf16-true keeps no float32 weights, so small updates are lost" * (best.precision == "bf16-true")
    )


def _generation(model: VideoTransformer, module: LightningModule, run: Run, memory: float) -> str:
    dtype = torch.bfloat16
    guided = run.generation is not None and run.generation.guidance != 1.0
    kinds: list[tuple[str, Any, torch.dtype]] = [("float32", "full", torch.float32), ("bf16", "full", dtype)]
    kinds += [(name, name, dtype) for name in ("fp8", "int8", "nf4")]
    made = [generate(model, weights, kind, 1, run.words, guided) for _, weights, kind in kinds]
    lines = {
        "weights": [each.weights for each in made],
        f"keys and values, {model.attention.window} frames{', guided' * guided}": [each.cache for each in made],
        f"keys and values of {run.words} words": [each.text for each in made],
        "temporaries of a token": [each.temporary for each in made],
    }
    decoder = _decoder(module)
    if decoder is not None:
        decoders = [decode(decoder, kind, 1) for _, _, kind in kinds]
        lines["VQ-VAE"] = [weights for weights, _ in decoders]
        lines["decoding a frame"] = [temporary for _, temporary in decoders]
    totals = [sum(column) for column in zip(*lines.values(), strict=True)]
    rows = [(name, *(f"{value / GB:.2f}" for value in values)) for name, values in lines.items()]
    rows.append(("all, for one video", *(f"{total / GB:.2f}" for total in totals)))
    rows.append((f"fits in {memory:g} GB", *("yes" if total <= memory * GB else "no" for total in totals)))
    notes = ["on top: the text encoder, where it is on the same device"]
    if decoder is None:
        notes.append(f"and the VQ-VAE, of which there is none yet at {getattr(module, 'tokenizer_path', 'its path')}")
    table = _table(("GB to generate, by weights", *(name for name, _, _ in kinds)), rows)
    return "\n".join([table, *notes])


def _decoder(module: LightningModule) -> VQVAE | None:
    try:
        return load_vqvae(getattr(module, "tokenizer_path", ""))
    except UserError:  # it may not be trained yet
        return None


def _optimizers(module: LightningModule, trained: nn.Module) -> dict[str, Optimize]:
    """The run's own first, then what it could take."""
    own: Optimize = module.optimizer  # type: ignore[assignment]
    found: dict[str, Optimize] = {type(build(trained, own)[0]).__name__: own}
    found.setdefault("AdamW", torch.optim.AdamW)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        pass
    else:
        found.setdefault("AdamW8bit", AdamW8bit)
    found.setdefault("SGD", partial(torch.optim.SGD, momentum=0.9))
    return found


def _is_own(plugin: Any) -> bool:
    """Whether it is more than Lightning's mixed precision, as FP8 is."""
    return isinstance(plugin, MixedPrecision) and type(plugin) is not MixedPrecision


def _spread(trainer: Trainer | None) -> tuple[Strategy, int, int]:
    """How devices share the work, how many there are, and how many of them work on a clip."""
    devices = trainer.num_devices * trainer.num_nodes if trainer else 1
    if trainer is None or devices == 1:
        return "one device", 1, 1
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
        return "FSDP2", devices, getattr(trainer.strategy, "tensor_parallel_size", 1)
    return ("DDP", devices, 1) if isinstance(trainer.strategy, DDPStrategy) else ("one device", 1, 1)


def _spreads(own: Setting) -> Iterable[tuple[Strategy, int, int]]:
    """The run's own way over devices, one device, and shared among eight."""
    spreads: list[tuple[Strategy, int, int]] = [
        (own.strategy, own.devices, own.together),
        ("one device", 1, 1),
        ("FSDP2", max(own.devices, 8), own.together),
    ]
    return dict.fromkeys(spreads)


def _devices(setting: Setting) -> str:
    told = setting.strategy if setting.devices == 1 else f"{setting.strategy} × {setting.devices}"
    return told if setting.together == 1 else f"{told}, {setting.together} together"


def _say(setting: Setting, suffix: str = "") -> str:
    return f"{setting.precision}{suffix}, {setting.optimizer}, {_devices(setting)}, recomputing {setting.recompute}"


def _mark(level: str, run: Run) -> str:
    return f"[{level}]" if level == run.setting.recompute else level


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they must be, text to the left and numbers to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    fits: list[Callable[[str, int], str]] = [*[str.ljust] * left, *[str.rjust] * (len(header) - left)]
    text = ["  ".join(fit(cell, to) for fit, cell, to in zip(fits, row, widths, strict=True)) for row in lines]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
