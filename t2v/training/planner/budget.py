"""Bytes that models, training and generation take on a device, by part."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from t2v.generation.quantization import Weights, convert, stored_bytes
from t2v.torch_private import quantized_moments, storage_id
from t2v.training.optimization import parameter_groups
from t2v.training.planner.stages import measure_with_few_layers
from t2v.training.planner.step import Device, Meter, Step, empty_text, precision_dtypes, without_data
from t2v.transformer.block import Block
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE

Strategy = Literal["one device", "DDP", "FSDP2"]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
"""Builds an optimizer from parameter groups."""


class ModelSizes(NamedTuple):
    """Numbers that a model consists of."""

    parameters: int
    trained: int
    """Parameters that have a gradient."""
    layers: list[int]
    """Parameters of each transformer layer."""
    floating: int
    """Floating-point numbers of its state dict."""
    other_bytes: int
    """Bytes of the rest of its state dict."""

    @property
    def outside_layers(self) -> int:
        """Parameters outside of transformer layers."""
        return self.parameters - sum(self.layers)


class OptimizerBytes(NamedTuple):
    """Bytes that an optimizer takes."""

    state: int
    temporary: int
    """Peak of a step in addition to the state."""


class TrainingBudget(NamedTuple):
    """Bytes on one device at the peak of a training step."""

    weights: int
    gradients: int
    optimizer_state: int
    ema: int
    """The moving average of the weights."""
    communication: int
    """Gradient buckets of DDP; unsharded layers of FSDP2."""
    phases: tuple[int, ...]
    """Peaks of activations and temporaries: in the forward pass, the loss, the backward pass (through the last layers,
    then the others), the optimizer's step."""
    saved: int
    """Activations that the forward pass saves for the backward pass."""

    @property
    def activations(self) -> int:
        """Activations and temporaries at the moment of the peak."""
        return max(self.phases)

    @property
    def peaks(self) -> tuple[int, ...]:
        """All bytes at the peak of each phase."""
        kept = self.weights + self.gradients + self.optimizer_state + self.ema + self.communication
        return tuple(kept + phase for phase in self.phases)

    @property
    def peak(self) -> int:
        """All bytes at the peak."""
        return max(self.peaks)


class GenerationBudget(NamedTuple):
    """Bytes of the transformer in generation."""

    weights: int
    cache: int
    """Keys and values of the video: one frame for spatial layers, the window for temporal layers."""
    text_cache: int
    """Keys and values of the text tokens, in every layer."""
    temporary: int
    """Peak of a pass in addition to the rest."""


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part, the largest part first; shared parameters count once."""
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
        return {"head": "head", "gate": "text gate"}.get(name.split(".")[0], "embeddings")
    _, number, layer, *_ = name.split(".")
    kind = "temporal" if model.blocks[int(number)].temporal else "spatial"
    return {"attention": f"{kind} attention", "text_attention": "text attention", "mlp": "feed-forward"}[layer]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; those that share memory count once."""
    storages = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def model_sizes(model: nn.Module) -> ModelSizes:
    """Count the numbers of a model, with or without data; those that share memory count once."""
    stored = {storage_id(tensor): tensor for tensor in model.state_dict().values()}.values()
    return ModelSizes(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        [sum(p.numel() for p in block.parameters()) for block in model.modules() if isinstance(block, Block)],
        sum(tensor.numel() for tensor in stored if tensor.is_floating_point()),
        sum(tensor.nbytes for tensor in stored if not tensor.is_floating_point()),
    )


def optimizer_bytes(
    model: nn.Module, factory: OptimizerFactory, precision: str, device: Device = "cuda"
) -> OptimizerBytes:
    """Return the bytes of an optimizer's state and of a step, measured by a step without memory.

    That of a deep transformer is measured with some of its layers.

    Args:
        model: The trained modules.
        factory: Builds the optimizer.
        precision: Name of a Lightning precision.
        device: On "cuda" PyTorch's own optimizers update all parameters at once, which takes more.
    """
    measure = partial(_measure_optimizer, factory=factory, dtype=precision_dtypes(precision)[0], device=device)
    return measure_with_few_layers(model, measure) if isinstance(model, VideoTransformer) else measure(model)


def _measure_optimizer(
    model: nn.Module, factory: OptimizerFactory, dtype: torch.dtype, device: Device
) -> OptimizerBytes:
    model = without_data(model, dtype)
    optimizer, parameter_of = build_optimizer(model, factory)
    if type(optimizer).__module__.startswith("torchao"):  # which compiles its step
        moments = [part for parameter in parameter_of.values() for part in quantized_moments(optimizer, parameter)]
        return OptimizerBytes(tensor_bytes(moments), 0)
    init_state = getattr(optimizer, "init_state", None)  # of bitsandbytes, whose kernels need data
    optimizer.is_paged = False  # type: ignore[attr-defined]  # paged state of bitsandbytes needs a GPU
    fused = all(group.get("fused") for group in optimizer.param_groups)
    for group_index, group in enumerate(optimizer.param_groups):
        if device == "cuda" and group.get("foreach", False) is None and not fused:
            group["foreach"] = True
        # These ask for tensors on a GPU. Fused kernels take no temporaries.
        group.update({name: False for name in ("fused", "capturable") if group.get(name)})
        group["params"] = [parameter_of[id(scalar)] for scalar in group["params"]]
        for index, parameter in enumerate(group["params"]):
            parameter.grad = torch.empty_like(parameter)
            if init_state is not None:
                init_state(group, parameter, group_index, index)
    if init_state is not None:
        return OptimizerBytes(_state_bytes(optimizer), 0)
    with Meter(model) as meter:
        optimizer.step()  # creates the state
        state = meter.live
        meter.restart()
        optimizer.step()
    return OptimizerBytes(_state_bytes(optimizer), 0 if fused else meter.peak - state)


def build_optimizer(
    model: nn.Module, factory: OptimizerFactory
) -> tuple[torch.optim.Optimizer, dict[int, nn.Parameter]]:
    """Build an optimizer on parameters with one element each, since some optimizers read the data.

    Returns:
        The optimizer, and for the `id` of each of its parameters the model's parameter that it stands for.
    """
    parameter_of: dict[int, nn.Parameter] = {}
    groups = parameter_groups(model)
    for group in groups:
        scalars = [nn.Parameter(torch.zeros([1] * parameter.ndim, device="cpu")) for parameter in group["params"]]
        parameter_of |= {id(scalar): own for scalar, own in zip(scalars, group["params"], strict=True)}
        group["params"] = scalars
    return factory(groups), parameter_of


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return tensor_bytes(value for value in values if isinstance(value, Tensor))


def training_budget(
    sizes: ModelSizes,
    step: Step,
    optimizer: OptimizerBytes,
    precision: str,
    strategy: Strategy = "one device",
    world_size: int = 1,
    tp_size: int = 1,
    averaged: bool = False,
) -> TrainingBudget:
    """Return the bytes on one device at the peak of a training step.

    Args:
        sizes: Of the trained modules.
        step: Measured at the batch size of a device.
        optimizer: Of the unsharded model.
        precision: Name of a Lightning precision.
        strategy: How devices share the work.
        world_size: Number of devices.
        tp_size: Tensor-parallel size. Activations are an upper bound: they are those without tensor parallelism.
        averaged: Whether a moving average of the weights is kept, as by `callbacks.EMA`.
    """
    dtype, autocast_dtype = precision_dtypes(precision)
    shards = world_size if strategy == "FSDP2" else 1
    # Tensor parallelism divides the layers only; each of its devices has all other parameters.
    replication = 1 + (tp_size - 1) * sizes.outside_layers / max(sizes.parameters, 1)

    def sharded(size: int) -> int:
        return math.ceil(size * replication / shards)

    trained = sizes.trained * dtype.itemsize
    weights = sharded(sizes.floating * dtype.itemsize + sizes.other_bytes)
    gradients = sharded(trained)
    communication = 0
    if strategy == "DDP" and world_size > 1:
        communication = trained
    elif shards > 1:
        layers, outside = unsharded_parameters(sizes, tp_size)
        gathered = layers * (autocast_dtype or dtype).itemsize + outside * dtype.itemsize
        communication = gathered + (layers + outside) * torch.float32.itemsize  # in which gradients are summed
    backward = [step.first_backward - gradients, step.last_backward - gradients]
    if shards > 1:
        backward = [step.backward_activations]
    phases = (step.forward, step.loss, *backward, math.ceil(optimizer.temporary / shards))
    return TrainingBudget(
        weights,
        gradients,
        sharded(optimizer.state),
        weights if averaged else 0,
        communication,
        phases,
        step.saved,
    )


def unsharded_parameters(sizes: ModelSizes, tp_size: int = 1) -> tuple[int, int]:
    """Return the number of parameters that FSDP2 gathers at a time: those of two layers, and all outside of layers.

    Args:
        sizes: Of the trained modules.
        tp_size: Tensor-parallel size, which divides the layers.
    """
    return sum(sorted(sizes.layers)[-2:]) // tp_size, sizes.outside_layers


def generation_budget(
    model: VideoTransformer,
    weights: Weights,
    dtype: torch.dtype,
    videos: int,
    text_length: int,
    guided: bool,
    positions: int,
) -> GenerationBudget:
    """Return the bytes that the transformer takes to generate.

    Args:
        model: With or without data.
        weights: How the weights of the large layers are stored.
        dtype: Type of everything else, the caches included.
        videos: Batch size.
        text_length: Text tokens of the longest prompt.
        guided: Whether classifier-free guidance doubles the batch.
        positions: Tokens of each video that a pass computes.
    """
    batch = 2 * videos if guided else videos

    def measure(few: VideoTransformer) -> GenerationBudget:
        few = without_data(few, dtype).eval().requires_grad_(False)
        convert(few, weights)
        text = empty_text(batch, text_length, few.text.dim, dtype)
        with torch.no_grad(), Meter(few) as meter:
            decoder = Decoder(few, text, positions=positions)
            kept = meter.live
            meter.restart()
            tokens = torch.empty(batch, 2 * few.grid_size**2, dtype=torch.long, device="meta")
            decoder.logits(tokens, tokens[:, 0], positions)
        cache = tensor_bytes(tensor for each in decoder.caches for tensor in (each.keys, each.values))
        text_cache = tensor_bytes(tensor for keys_and_values in decoder.text for tensor in keys_and_values)
        return GenerationBudget(stored_bytes(few), cache, text_cache, meter.peak - kept)

    return measure_with_few_layers(model, measure)


def decoding_bytes(model: VQVAE, dtype: torch.dtype, videos: int) -> tuple[int, int]:
    """Return the bytes of the VQ-VAE's weights, and the peak of decoding one frame of each video."""
    model = without_data(model, dtype).eval().requires_grad_(False)
    tokens = torch.empty(videos, 1, model.grid_size, model.grid_size, dtype=torch.long, device="meta")
    with torch.no_grad(), Meter(model) as meter:
        model.decode_stream(tokens)
    return stored_bytes(model), meter.peak
