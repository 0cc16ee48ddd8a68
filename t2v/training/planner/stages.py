"""Training steps of the two stages, measured without memory."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from t2v.losses.tokens import token_loss_
from t2v.training.planner.step import (
    Device,
    Numbers,
    Step,
    empty_text,
    extrapolate,
    measure_step,
    precision_dtypes,
    without_data,
)
from t2v.transformer.attention import CHUNK
from t2v.transformer.block import Block
from t2v.transformer.layers import TextGate
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE

_MEASURED_LAYERS = 4
"""Least number of layers from which on the bytes of a step grow linearly with them."""
_LARGEST_GROUP = 12
"""Most layers that make up a group. Models of larger ones are extrapolated kind by kind, which is exact but for the
peak of the backward pass with checkpointing, which may differ by about 1 %."""
_MOST_CHUNKS = 32
"""Most parts in which attention over a long clip is measured. Larger parts take more temporary memory, but each is a
small fraction of the clip."""


def transformer_step(
    model: VideoTransformer,
    clips: int,
    frames: int,
    text_length: int,
    precision: str = "bf16-mixed",
    checkpointing: str = "none",
    device: Device = "cuda",
) -> Step:
    """Measure a training step of the transformer.

    A deep model is measured with fewer layers of both kinds, since layers of a kind take equal memory and work.

    Args:
        model: With or without data.
        clips: Batch size.
        frames: Length of a clip.
        text_length: Text tokens of the longest caption.
        precision: Name of a Lightning precision.
        checkpointing: Activation checkpointing, as in `VideoTransformer`.
        device: The kind of device to plan for.
    """
    dtype, autocast_dtype = precision_dtypes(precision)

    def measure(few: VideoTransformer) -> Step:
        few = without_data(few, dtype)
        few.checkpointing = checkpointing  # type: ignore[assignment]
        for block in few.modules():
            if isinstance(block, Block):
                block.recompute_attention = checkpointing == "attention"
                block.attention.chunk = max(CHUNK, math.ceil(frames * few.grid_size**2 / _MOST_CHUNKS))

        def forward() -> tuple[Tensor, Tensor]:
            tokens = torch.empty(clips, frames, few.grid_size, few.grid_size, dtype=torch.long, device="meta")
            text = empty_text(clips, text_length, few.text.dim, dtype)
            drop = torch.empty(clips, dtype=torch.bool, device="meta")
            return few(tokens, text, drop), tokens

        def loss(output: tuple[Tensor, Tensor]) -> Tensor:
            return token_loss_(*output, z_loss=1e-4).objective

        return measure_step(few, forward, loss, device, autocast_dtype, _last_of_each_kind(few))

    return measure_with_few_layers(model, measure)


def vqvae_step(
    model: VQVAE,
    clips: int,
    frames: int,
    precision: str = "bf16-mixed",
    frames_at_once: int | None = None,
    device: Device = "cuda",
) -> Step:
    """Measure a training step of the VQ-VAE, with L1 reconstruction and without quantizer and other loss terms.

    Args:
        model: With or without data.
        clips: Batch size.
        frames: Length of a clip.
        precision: Name of a Lightning precision.
        frames_at_once: Activation checkpointing, as in `VQVAE`.
        device: The kind of device to plan for.
    """
    dtype, autocast_dtype = precision_dtypes(precision)
    model = without_data(model, dtype).train()
    model.frames_at_once = frames_at_once

    def forward() -> tuple[Tensor, Tensor]:
        video = torch.empty(clips, frames, 3, model.image_size, model.image_size, dtype=dtype, device="meta")
        return model(video, quantize=False).reconstruction, video

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        reconstruction, video = output
        return (reconstruction.float() - video).abs().mean()

    return measure_step(model, forward, loss, device, autocast_dtype)


def measure_with_few_layers(model: VideoTransformer, measure: Callable[[VideoTransformer], Numbers]) -> Numbers:
    """Return the measurement of a model; that of a deep one is extrapolated from those of some of its layers.

    Args:
        model: With or without data.
        measure: Returns numbers that grow by the same amount with each spatial and with each temporal layer.
    """
    total = len(model.blocks)
    group = total // math.gcd(_temporal(model).count(True), total)  # layers with the fraction of temporal ones
    if group > _LARGEST_GROUP:
        return _measure_by_kind(model, measure)
    small = math.ceil(_MEASURED_LAYERS / group) * group
    large = small + group
    if total <= small + large:
        return measure(model)
    first, second = (measure(_with_layers(model, range(layers))) for layers in (small, large))
    return extrapolate(first, second, large - small, total - large)


def _measure_by_kind(model: VideoTransformer, measure: Callable[[VideoTransformer], Numbers]) -> Numbers:
    """Return the measurement of a model from that of its first and last layers of each kind, and those of one less."""
    numbers_of = {
        kind: [n for n, temporal in enumerate(_temporal(model)) if temporal == kind] for kind in (False, True)
    }
    few = {kind: [*numbers[:2], *numbers[2:][-2:]] for kind, numbers in numbers_of.items()}
    result = base = measure(_with_layers(model, sorted(few[False] + few[True])))
    for kind, numbers in numbers_of.items():
        if beyond := len(numbers) - len(few[kind]):
            fewer = measure(_with_layers(model, sorted(few[kind][1:] + few[not kind])))
            numbers_with_all = (a + (b - c) * beyond for a, b, c in zip(result, base, fewer, strict=True))
            result = type(base)(*numbers_with_all)  # type: ignore[arg-type]
    return result


def _temporal(model: VideoTransformer) -> list[bool]:
    """Return for each layer whether it is temporal."""
    return [bool(block.temporal) for block in model.blocks]


def _last_of_each_kind(model: VideoTransformer) -> Sequence[torch.nn.Module]:
    """Return the last layers, from the last one of the kind that ends first."""
    ends = {temporal: number for number, temporal in enumerate(_temporal(model))}
    return list(model.blocks)[min(ends.values(), default=0) :]


def _with_layers(model: VideoTransformer, layers: Sequence[int]) -> VideoTransformer:
    """Return a model that consists of some layers and the other parts of a model, whose tensors it shares."""
    kept = torch.nn.ModuleList(model.blocks[number] for number in layers)
    others = [child for name, child in model.named_children() if child is not model.blocks]
    parts: dict[int, Any] = {id(model.blocks): kept}
    for part in (kept, *others):
        parts |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    parts |= {id(parameter): parameter for parameter in model.parameters(recurse=False)}
    if model.gate is not None:
        with torch.device("meta"):
            parts[id(model.gate)] = TextGate(len(layers), model.attention.heads, model.attention.window)
    return copy.deepcopy(model, parts)
