"""What each part of a model, of training it and of generating with it takes, in bytes."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2v.batch import TextEmbedding
from t2v.generation.quantization import Weights, convert, stored_bytes
from t2v.losses.tokens import token_loss
from t2v.training.optimization import parameter_groups
from t2v.training.planner.step import Device, Meter, Step, measure, without_data
from t2v.transformer.model import Block, VideoTransformer
from t2v.vqvae.model import VQVAE

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]
Strategy = Literal["one device", "DDP", "FSDP2"]
Optimize = Callable[[Any], torch.optim.Optimizer]


class OptimizerBytes(NamedTuple):
    """What an optimizer takes."""

    state: int
    temporary: int
    """Most that a step holds beside its state."""


class Budget(NamedTuple):
    """Bytes on one device of a training run at its fullest; all but `logits` and `saved` sum to `peak`."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """A moving average of the weights."""
    exchange: int
    """Buckets of gradients of DDP; layers that FSDP2 has gathered."""
    activations: int
    """And temporaries: what else is there when most is."""
    saved: int
    """Of which the forward pass leaves to the backward pass."""

    @property
    def peak(self) -> int:
        return sum(self) - self.saved


def parts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; every parameter is counted once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(model, name)] += parameter.numel()
    return dict(counts.most_common())


def _part(model: nn.Module, name: str) -> str:
    if not isinstance(model, VideoTransformer):
        return name.split(".")[0]
    if "norm" in name:
        return "norms"
    if not name.startswith("blocks."):
        return {"head": "head", "gate": "text gate", "pooled": "text gate"}.get(name.split(".")[0], "embeddings")
    _, number, layer, *_ = name.split(".")
    kind = "temporal" if model.blocks[int(number)].temporal else "spatial"
    return {"attention": f"{kind} attention", "text_attention": "text attention", "mlp": "feed-forward"}[layer]


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share memory counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def types(precision: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Of weights, and what autocast casts to, by the name of Lightning's precision."""
    if precision.endswith("-mixed"):
        return torch.float32, torch.bfloat16
    return (torch.float32, None) if precision == "32-true" else (torch.bfloat16, None)


def transformer_step(
    model: VideoTransformer,
    clips: int,
    frames: int,
    words: int,
    precision: str = "bf16-mixed",
    checkpointing: str = "none",
    device: Device = "cuda",
) -> Step:
    """A training step of the transformer.

    Args:
        model: with weights or without.
        clips: batch size.
        frames: length of a clip.
        words: length of the longest caption.
        precision: as Lightning names it.
        checkpointing: as `VideoTransformer` names it.
        device: the kind of device to plan for.
    """
    dtype, half = types(precision)
    model = without_data(model, dtype)
    model.checkpointing = checkpointing  # type: ignore[assignment]
    for block in model.modules():
        if isinstance(block, Block):
            block.recompute_attention = checkpointing == "attention"
    dims, grid = model.text_dim, model.grid_size

    def loss() -> Tensor:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        tokens = empty(clips, frames, grid, grid, dtype=torch.long)
        text = TextEmbedding(empty(clips, words, dims), empty(clips, words, dtype=torch.bool), empty(clips, dims))
        return token_loss(model(tokens, text, empty(clips, dtype=torch.bool)), tokens, z_loss=1e-4).objective

    return measure(model, loss, device, half)


def vqvae_step(
    model: VQVAE,
    clips: int,
    frames: int,
    precision: str = "bf16-mixed",
    frames_at_once: int | None = None,
    device: Device = "cuda",
) -> Step:
    """A training step of the VQ-VAE: reconstruction by L1, without quantization, perceptual terms or discriminators."""
    dtype, half = types(precision)
    model = without_data(model, dtype).train()
    model.frames_at_once = frames_at_once

    def loss() -> Tensor:
        video = torch.empty(clips, frames, 3, model.image_size, model.image_size, dtype=dtype, device="meta")
        return (model(video, quantize=False).reconstruction.float() - video).abs().mean()

    return measure(model, loss, device, half)


def optimizer_bytes(model: nn.Module, optimize: Optimize, precision: str, device: Device = "cuda") -> OptimizerBytes:
    """What an optimizer keeps, and what a step of it takes meanwhile; both by taking a step without memory.

    Args:
        model: what is trained.
        optimize: builds the optimizer from parameter groups.
        precision: as Lightning names it.
        device: on "cuda" PyTorch's own optimizers go through all parameters at once, which takes more.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # without memory, on a device that optimizers know
    with mode:
        model = without_data(model, types(precision)[0], "cpu")
    optimizer, own = build(model, optimize)
    make_state = getattr(optimizer, "init_state", None)  # of bitsandbytes, whose kernels need data
    with mode:
        for index, group in enumerate(optimizer.param_groups):
            if device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
            group["params"] = [own[id(small)] for small in group["params"]]
            for place, parameter in enumerate(group["params"]):
                parameter.grad = torch.empty_like(parameter)
                if make_state is not None:
                    make_state(group, parameter, index, place)
        if make_state is not None:
            return OptimizerBytes(_state(optimizer), 0)
        with Meter(model) as meter:
            optimizer.step()  # makes the state
            kept = meter.live
            meter.restart()
            optimizer.step()
    return OptimizerBytes(_state(optimizer), meter.peak - kept)


def build(model: nn.Module, optimize: Optimize) -> tuple[torch.optim.Optimizer, dict[int, nn.Parameter]]:
    """An optimizer of parameters of one number each, since some look at them, and whose place each of these takes."""
    own: dict[int, nn.Parameter] = {}
    groups = parameter_groups(model)
    for group in groups:
        small = [nn.Parameter(torch.zeros([1] * parameter.ndim, device="cpu")) for parameter in group["params"]]
        own |= {id(one): parameter for one, parameter in zip(small, group["params"], strict=True)}
        group["params"] = small
    return optimize(groups), own


def _state(optimizer: torch.optim.Optimizer) -> int:
    return size(value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))


def train(
    model: nn.Module,
    step: Step,
    optimizer: OptimizerBytes,
    precision: str,
    strategy: Strategy = "one device",
    devices: int = 1,
    together: int = 1,
    averaged: bool = False,
) -> Budget:
    """What one device holds at the fullest moment of a step.

    Args:
        model: all that is trained.
        step: measured at its batch size on each device.
        optimizer: of the whole model.
        precision: as Lightning names it.
        strategy: how devices share the work.
        devices: how many.
        together: how many of them share the work on a clip. Activations are told as if each did all of it.
        averaged: whether a moving average of the weights is kept, as by `callbacks.EMA`.
    """
    width = types(precision)[0].itemsize
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * width
    weights = size(without_data(model, types(precision)[0]).state_dict().values())
    share = devices if strategy == "FSDP2" else 1
    layers, total = sum(_layers(model)), max(sum(parameter.numel() for parameter in model.parameters()), 1)
    repeated = 1 + (together - 1) * (total - layers) / total  # those that share a clip all have what is in no layer
    weights, gradients, state = (math.ceil(each * repeated / share) for each in (weights, trained, optimizer.state))
    average = weights if averaged else 0
    exchange = 0
    if strategy == "DDP" and devices > 1:
        exchange = trained
    elif share > 1:
        exchange = 2 * gathered(model, together) * width
    backward = step.backward_alone + gradients if share > 1 else step.backward
    most = max(gradients + step.forward, backward, gradients - (-optimizer.temporary // share))
    return Budget(weights, gradients, state, average, exchange, most - gradients, step.saved)


def gathered(model: nn.Module, together: int = 1) -> int:
    """Parameters that FSDP2 has whole at a time: what is in no layer, the layer at work and the next one.

    Args:
        model: with weights or without.
        together: how many devices share the work on a clip, and so a layer.
    """
    layers = _layers(model)
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    return rest + sum(sorted(layers)[-2:]) // together


def _layers(model: nn.Module) -> list[int]:
    """Parameters of each layer."""
    return [sum(p.numel() for p in block.parameters()) for block in model.modules() if isinstance(block, Block)]


class Generation(NamedTuple):
    """Bytes that generation takes."""

    weights: int
    cache: int
    """Keys and values: a frame for spatial layers, the window for temporal ones."""
    text: int
    """Keys and values of the words, which every layer has."""
    temporary: int
    """Most that a step of one token takes meanwhile."""


def generate(
    model: VideoTransformer, weights: Weights, dtype: torch.dtype, videos: int, words: int, guided: bool
) -> Generation:
    """What the transformer takes to generate.

    Args:
        model: with weights or without.
        weights: how the large layers are stored.
        dtype: of everything else, the cache included.
        videos: made together.
        words: length of the longest prompt.
        guided: whether classifier-free guidance runs a second branch.
    """
    model = without_data(model, dtype).eval().requires_grad_(False)
    rows = videos * (1 + guided)
    convert(model, weights)
    text = TextEmbedding(
        torch.empty(rows, words, model.text_dim, dtype=dtype, device="meta"),
        torch.empty(rows, words, dtype=torch.bool, device="meta"),
        torch.empty(rows, model.text_dim, dtype=dtype, device="meta"),
    )
    with torch.no_grad(), Meter(model) as meter:
        state = model.start_decoding(text, 2)
        kept = meter.live
        meter.restart()
        model.step(torch.empty(rows, dtype=torch.long, device="meta"), state)
    cache = size(tensor for each in state.caches for tensor in (each.keys, each.values))
    words_read = size(tensor for pair in state.text for tensor in pair)
    return Generation(stored_bytes(model), cache, words_read, meter.peak - kept)


def decode(model: VQVAE, dtype: torch.dtype, videos: int) -> tuple[int, int]:
    """Weights of the VQ-VAE, and the most that decoding a frame of each video takes meanwhile."""
    model = without_data(model, dtype).eval().requires_grad_(False)
    grid = model.grid_size
    with torch.no_grad(), Meter(model) as meter:
        model._decode(torch.empty(videos, 1, grid, grid, model.quantizer.dim, dtype=dtype, device="meta"))
    return stored_bytes(model), meter.peak
