"""The plan of a run as text, which `python cli.py plan` prints."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from t2v.errors import UserError
from t2v.generation.parallel import most_positions
from t2v.training.planner.budget import decoding_bytes, generation_budget, parameter_counts
from t2v.training.planner.run import Layout, PlannedRun, Setting
from t2v.training.planner.step import Device
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE

GB = 1e9


def report(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    trainer: Trainer | None = None,
    memory: float = 80.0,
    tflops: float | None = None,
    device: Device = "cuda",
) -> str:
    """Return the memory and FLOPs of a run, and the settings that fit.

    Args:
        model: The LightningModule of either stage, its model on the meta device or with data.
        datamodule: Sets batch size and frames; it is not set up.
        trainer: Sets precision, strategy and number of devices.
        memory: Memory of one device in GB (10⁹ bytes).
        tflops: TFLOP/s that one device reaches; without it no times are given.
        device: The kind of device to plan for.

    Raises:
        UserError: If the model is none of the two stages, or memory or tflops are not above zero.
    """
    if not 0 < memory < math.inf or (tflops is not None and not 0 < tflops < math.inf):
        raise UserError(f"memory={memory} and tflops={tflops} must be greater than 0: GB and TFLOP/s of one device.")
    run = PlannedRun(model, datamodule, trainer, device)
    sections = [_head(run), _parameters(run.trained), _memory(run, memory), _work(run, tflops), _settings(run, memory)]
    if isinstance(run.model, VideoTransformer):
        sections.append(_generation(run.model, run, memory))
    return "\n\n".join(sections)


def _head(run: PlannedRun) -> str:
    setting, grid, tp_size = run.setting, run.model.grid_size, run.setting.layout.tp_size
    parameters = sum(parameter_counts(run.trained).values())
    plugin = f" ({run.plugin})" if run.plugin else ""
    average = ", moving average of the weights" if run.averaged else ""
    group = "device" if tp_size == 1 else f"tensor-parallel group of {tp_size} devices"
    step_tokens = run.tokens * run.batches * setting.dp_size
    lines = [
        f"Plan         {type(run.model).__name__}, {_short(parameters)} parameters",
        f"setting      {_describe(setting, plugin)}{average}",
        f"batch        {run.clips} clips × {run.frames} frames × {grid}×{grid} = {run.tokens:,} tokens per {group}",
        f"step         {run.batches} batches × data-parallel size {setting.dp_size} = {step_tokens:,} tokens",
    ]
    if run.is_extrapolated:
        lines.append("measured     two smaller batches, extrapolated beyond")
    if tp_size > 1:
        lines.append("activations  are an upper bound: those without tensor parallelism")
    return "\n".join(lines)


def _parameters(model: nn.Module) -> str:
    counts = parameter_counts(model)
    total = sum(counts.values())
    rows = [(name, f"{count:,}", f"{count / max(total, 1):.1%}") for name, count in counts.items()]
    return _table(("parameters", "number", "fraction"), [*rows, ("total", f"{total:,}", "100.0%")])


def _memory(run: PlannedRun, memory: float) -> str:
    budgets = [run.budget(run.setting._replace(checkpointing=level), run.clips) for level in run.levels]
    lines = {
        "weights": [budget.weights for budget in budgets],
        "gradients": [budget.gradients for budget in budgets],
        f"optimizer state ({run.setting.optimizer})": [budget.optimizer_state for budget in budgets],
        "moving average (EMA)": [budget.ema for budget in budgets],
        "communication buffers": [budget.communication for budget in budgets],
        "activations and temporaries": [budget.activations for budget in budgets],
        "peak": [budget.peak for budget in budgets],
        "  saved for the backward pass": [budget.saved for budget in budgets],
    }
    if isinstance(run.model, VideoTransformer):
        width = 4 if run.setting.precision == "32-true" else 2
        lines["  logits, then their gradient"] = [run.tokens * run.model.vocab_size * width] * len(budgets)
    rows = [(name, *_gigabytes(values)) for name, values in lines.items() if any(values)]
    rows.append((f"fits in {memory:g} GB", *_fits([budget.peak for budget in budgets], memory)))
    return _table(("GB per device, by activation checkpointing", *_level_names(run)), rows)


def _work(run: PlannedRun, tflops: float | None) -> str:
    flops = [run.step(run.setting.precision, level, run.clips).flops for level in run.levels]
    batches = run.batches * run.setting.dp_size
    rows: list[tuple[str, ...]] = [
        ("TFLOP per batch", *(f"{each / 1e12:,.2f}" for each in flops)),
        ("  relative to no recomputation", *(f"{each / flops[0]:.0%}" for each in flops)),
        ("TFLOP per step, all devices", *(f"{batches * each / 1e12:,.1f}" for each in flops)),
    ]
    if tflops is not None:
        seconds = [each * run.batches / (tflops * 1e12 * run.setting.layout.tp_size) for each in flops]
        rows.append((f"seconds per step at {tflops:g} TFLOP/s", *(f"{each:,.2f}" for each in seconds)))
        rows.append(("tokens/s, all devices", *(f"{run.tokens * batches / each:,.0f}" for each in seconds)))
    return _table(("work, by activation checkpointing", *_level_names(run)), rows)


def _settings(run: PlannedRun, memory: float) -> str:
    """Return the peaks and the largest batches of other settings, and the recommended one."""
    precisions = [run.setting.precision]
    own_fits = any(run.largest_batch(run.setting._replace(checkpointing=level), memory * GB) for level in run.levels)
    if not own_fits and "bf16-true" not in precisions:
        precisions.append("bf16-true")
    largest: dict[Setting, int] = {}
    rows = []
    for precision in precisions:
        for layout in run.layouts():
            for optimizer in run.optimizers_for(layout):
                cells = []
                for level in run.levels:
                    setting = Setting(precision, level, optimizer, layout)
                    largest[setting] = run.largest_batch(setting, memory * GB)
                    cells.append(f"{run.budget(setting, run.clips).peak / GB:.1f} ({largest[setting]})")
                rows.append((precision, optimizer, _describe_layout(layout), *cells))
    title = f"Peak GB at {run.clips} clips per device (largest batch that fits in {memory:g} GB)"
    table = _table(("precision", "optimizer", "devices", *run.levels), rows, text_columns=3)
    return f"{title}\n{table}\nrecommended  {_recommendation(run, largest, memory)}"


def _recommendation(run: PlannedRun, largest: dict[Setting, int], memory: float) -> str:
    """Return the cheapest setting that fits the batch; without one, what would help."""
    fitting = [setting for setting, clips in largest.items() if clips >= run.clips]
    if not fitting:
        least = min(largest, key=lambda setting: run.budget(setting, 1).peak)
        missing = run.budget(least, 1).peak / GB - memory
        if missing > 0:
            return f"more devices or memory: one clip with {_describe(least)} needs {missing:.1f} GB more"
        return (
            f"a smaller batch: {largest[least]} clips fit with {_describe(least)}; keep the global batch by "
            "trainer.accumulate_grad_batches"
        )
    own, optimizers = run.setting, list(run.optimizers)

    def cost(setting: Setting) -> tuple[int, ...]:
        """Order by other devices, then weights without a float32 copy, then another optimizer, then recomputation."""
        return (
            int(setting.layout != own.layout),
            int(setting.precision != own.precision),
            optimizers.index(setting.optimizer),
            run.levels.index(setting.checkpointing),
        )

    best = min(fitting, key=cost)
    text = f"{_describe(best)}: up to {largest[best]} clips per device"
    if best.precision == "bf16-true":
        text += "; bf16-true keeps no float32 weights, so small updates are lost"
    return text


def _generation(model: VideoTransformer, run: PlannedRun, memory: float) -> str:
    guided = run.generation is not None and run.generation.guidance != 1.0
    candidates = run.generation.candidates if run.generation else 1
    kinds: list[tuple[str, Any, torch.dtype]] = [
        ("float32", "full", torch.float32),
        ("bf16", "full", torch.bfloat16),
        ("fp8", "fp8", torch.bfloat16),
        ("int8", "int8", torch.bfloat16),
        ("nf4", "nf4", torch.bfloat16),
    ]
    batch = 2 * candidates if guided else candidates
    positions = most_positions(run.generation.parallel if run.generation else "auto", batch)
    budgets = [
        generation_budget(model, weights, dtype, candidates, run.text_length, guided, positions)
        for _, weights, dtype in kinds
    ]
    guidance = ", with guidance" if guided else ""
    lines = {
        "weights": [budget.weights for budget in budgets],
        f"KV cache of {model.attention.window} frames{guidance}": [budget.cache for budget in budgets],
        f"KV cache of {run.text_length} text tokens": [budget.text_cache for budget in budgets],
        f"temporaries of a pass of {positions} tokens": [budget.temporary for budget in budgets],
    }
    notes = ["not included: the text encoder, if it is on the same device"]
    path = getattr(run.module, "tokenizer_path", "")
    vqvae = _load_vqvae(path)
    if vqvae is None:
        notes.append(f"not included: the VQ-VAE, which does not exist yet at {path}")
    else:
        decoding = [decoding_bytes(vqvae, dtype, 1) for _, _, dtype in kinds]
        lines["VQ-VAE"] = [weights for weights, _ in decoding]
        lines["decoding a frame"] = [temporary for _, temporary in decoding]
    totals = [sum(column) for column in zip(*lines.values(), strict=True)]
    rows = [(name, *_gigabytes(values)) for name, values in lines.items()]
    rows.append(("total, for one video", *_gigabytes(totals)))
    rows.append((f"fits in {memory:g} GB", *_fits(totals, memory)))
    table = _table(("GB for generation, by weights", *(name for name, _, _ in kinds)), rows)
    return "\n".join([table, *notes])


def _load_vqvae(path: str) -> VQVAE | None:
    try:
        return load_vqvae(path)
    except UserError:  # it may not be trained yet
        return None


def _describe(setting: Setting, plugin: str = "") -> str:
    return (
        f"{setting.precision}{plugin}, {setting.optimizer}, {_describe_layout(setting.layout)}, "
        f"activation checkpointing {setting.checkpointing}"
    )


def _describe_layout(layout: Layout) -> str:
    text: str = layout.strategy
    if layout.world_size > 1:
        text += f" × {layout.world_size}"
    if layout.tp_size > 1:
        text += f", tensor-parallel size {layout.tp_size}"
    return text


def _level_names(run: PlannedRun) -> list[str]:
    """Return the levels of activation checkpointing, the run's own in brackets."""
    return [f"[{level}]" if level == run.setting.checkpointing else level for level in run.levels]


def _gigabytes(sizes: Sequence[int]) -> list[str]:
    return [f"{size / GB:.2f}" for size in sizes]


def _fits(sizes: Sequence[int], memory: float) -> list[str]:
    return ["yes" if size <= memory * GB else "no" for size in sizes]


def _short(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a table with its first columns aligned left and the others, which hold numbers, right."""
    lines = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells))
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
