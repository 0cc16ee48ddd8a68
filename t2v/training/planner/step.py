"""Memory and FLOPs of a training step, measured without allocating the memory.

The model's own code runs, forward and backward, on tensors without data (PyTorch's meta device). Every new storage is
counted from its creation to its release, so that saved activations, recomputed ones and temporaries are those of the
model, and no formula can become outdated.

The meta device answers three questions differently from the device that a step is planned for, so a function mode
answers them: what `is_cpu` is, what autocast casts, and which fused kernels run. Fused attention saves no scores, and
fused RMSNorm saves no squares.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from t2v.batch import TextEmbedding
from t2v.torch_private import (
    CPU_ATTENTION,
    ITEM,
    TO_COPY,
    DisableTorchFunction,
    DispatchMode,
    backward_under_modes,
    changes_lists_in_place,
    fused_rms_norm,
    makes_new_storage,
    storage_id,
)
from t2v.training.flops import executed_flops

Device = Literal["cuda", "cpu"]
Module = TypeVar("Module", bound=nn.Module)
Output = TypeVar("Output")
Numbers = TypeVar("Numbers", bound=tuple[int, ...])
_IS_CPU = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_GETTER = type(_IS_CPU)
"""The type of the functions that read or set an attribute of a tensor, which are half of all calls."""
_AUTOCAST = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose2d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    F.scaled_dot_product_attention,
}
"""The functions of our models that autocast computes in 16 bits."""


class Step(NamedTuple):
    """Bytes that a training step takes in addition to weights and optimizer state, and its FLOPs."""

    saved: int
    """Activations that the forward pass saves for the backward pass."""
    forward: int
    """Peak of the model's forward pass, without gradients of the previous step."""
    loss: int
    """Peak while the loss is computed from the model's output."""
    first_backward: int
    """Peak of the backward pass through the last layers, where it begins, with the gradients that exist at that moment.
    Activations dominate it, and gradients that of the rest: each grows linearly with the batch, their maximum does not.
    """
    last_backward: int
    """Peak of the rest of the backward pass, with the gradients that exist at that moment."""
    backward_activations: int
    """Peak of the backward pass without gradients."""
    flops: int
    """Executed FLOPs, recomputation included."""

    @property
    def backward(self) -> int:
        """Peak of the backward pass, with the gradients that exist at that moment."""
        return max(self.first_backward, self.last_backward)


def extrapolate(small: Numbers, large: Numbers, between: int, beyond: int) -> Numbers:
    """Return numbers on the straight lines through two measurements, as a `Step` of a larger batch.

    Args:
        small: A named tuple of numbers.
        large: The same for a size that is larger by `between`, in any unit.
        between: See above.
        beyond: How much larger than that of `large` the size of the returned numbers is.
    """
    line = (b + (b - a) * beyond // between for a, b in zip(small, large, strict=True))
    return type(large)(*line)  # type: ignore[arg-type]


class _Outputs(NamedTuple):
    """What a call of an operator returned, without the tensors themselves."""

    tensors: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    """Shape, strides and type of each output."""
    is_tuple: bool
    flops: int


_cache: dict[Any, _Outputs] = {}
"""Outputs by the operator and the shapes of its inputs: inferring them takes PyTorch long."""


class Meter(DispatchMode):
    """Counts the bytes of all new storages that are alive, and the executed FLOPs.

    Args:
        known: Modules whose weights, gradients and buffers are not counted.
    """

    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.peak = 0
        self.peak_activations = 0
        """Peak without gradients."""
        self.flops = 0
        self._storages: dict[int, weakref.ref[Any] | None] = {}
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                self._storages[storage_id(tensor)] = None
                if tensor.grad is not None:
                    self._storages[storage_id(tensor.grad)] = None

    def restart(self) -> None:
        """Measure the peaks from now on."""
        self.peak = self.live
        self.peak_activations = self.live - self.gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunction():  # the meter's own calls need no function mode
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # There are no values to read: 1 is valid as a token and a condition, 2.0 as a number of steps and a decay.
        if func is ITEM and args[0].is_meta:
            return 2.0 if args[0].is_floating_point() else 1
        if func is TO_COPY and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):  # `Tensor.tolist`
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype), device="cpu")
        if changes_lists_in_place(func) and args[0][0].is_meta:  # there are no values to change
            return None
        key = (func, *map(_signature, args), *map(_signature, kwargs.items())) if makes_new_storage(func) else None
        if (known := _cache.get(key)) is not None:
            output = _empty(known)
            self.flops += known.flops
        else:
            output = func(*args, **kwargs)
            flops = executed_flops(func, args, kwargs, output)
            self.flops += flops
            if key is not None and all(map(self._is_new, _as_tuple(output))):
                described = [(each.shape, each.stride(), each.dtype) for each in _as_tuple(output)]
                _cache[key] = _Outputs(described, not isinstance(output, Tensor), flops)
        for each in _as_tuple(output):
            if isinstance(each, Tensor):
                self._count(each)
        return output

    def _is_new(self, output: Any) -> bool:
        """Return whether it is a meta tensor on a storage of its own, which the schema of `_unsafe_view` hides."""
        return isinstance(output, Tensor) and output.is_meta and storage_id(output) not in self._storages

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_id(tensor)
        if key in self._storages:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_activations = max(self.peak_activations, self.live - self.gradients)

        self._storages[key] = weakref.ref(storage, partial(self._release, key, size))

    def _release(self, key: int, size: int, _: weakref.ref[Any]) -> None:
        self.live -= size
        del self._storages[key]


def _signature(value: Any) -> Any:
    """Return what the shapes and types of an operator's outputs depend on, as a dictionary key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    return type(value), value


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _empty(outputs: _Outputs) -> Any:
    """Return new meta tensors like the outputs."""
    tensors = tuple(
        torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in outputs.tensors
    )
    return tensors if outputs.is_tuple else tensors[0]


class _DeviceRules(TorchFunctionMode):
    """Lets functions behave on meta tensors as on the planned device, with its autocast.

    Args:
        device: The kind of device to plan for.
        autocast_dtype: Type that autocast casts to; None for no autocast.
    """

    def __init__(self, device: Device, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.on_cpu, self.autocast_dtype = device == "cpu", autocast_dtype
        self.weight_casts: dict[int, Tensor] | None = {}
        """Autocast's 16-bit copies of weights, which it keeps until the forward pass ends; then None."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is _GETTER:
            return self.on_cpu if func == _IS_CPU else func(*args)
        if self.autocast_dtype is not None:
            if func in _AUTOCAST:
                args = tuple(self._cast(each, self.autocast_dtype) for each in args)
            elif not self.on_cpu and func in (torch.rms_norm, torch.layer_norm):
                args = tuple(each.float() if isinstance(each, Tensor) else each for each in args)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is torch.rms_norm and not self.on_cpu:
            return fused_rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        is_weight = value.is_leaf and value.requires_grad
        if self.weight_casts is None or not is_weight:
            return value.to(dtype)
        if id(value) not in self.weight_casts:
            self.weight_casts[id(value)] = value.to(dtype)
        return self.weight_casts[id(value)]


def _fused_attention(
    query: Float[Tensor, "b heads n head_dim"],
    key: Float[Tensor, "b kv_heads m head_dim"],
    value: Float[Tensor, "b kv_heads m head_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Float[Tensor, "b heads n head_dim"]:
    """Attend as all fused kernels do: they save inputs, output and one number for each row, and a mask as numbers."""
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    output: Tensor = CPU_ATTENTION(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]
    return output


def precision_dtypes(precision: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the type of the weights and the type that autocast casts to, for the name of a Lightning precision."""
    if precision.endswith("-mixed"):
        return torch.float32, torch.bfloat16
    return (torch.float32, None) if precision == "32-true" else (torch.bfloat16, None)


def without_data(module: Module, dtype: torch.dtype | None = None) -> Module:
    """Return a copy of a module on the meta device.

    Args:
        module: With or without data.
        dtype: Type of its floating-point weights and buffers; unchanged by default.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=new_dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def empty_text(batch: int, length: int, dim: int, dtype: torch.dtype) -> TextEmbedding:
    """Return text embeddings without data."""
    return TextEmbedding(
        torch.empty(batch, length, dim, dtype=dtype, device="meta"),
        torch.empty(batch, length, dtype=torch.bool, device="meta"),
    )


def measure_step(
    model: nn.Module,
    forward: Callable[[], Output],
    loss: Callable[[Output], Float[Tensor, ""]],
    device: Device,
    autocast_dtype: torch.dtype | None,
    last_layers: Sequence[nn.Module] = (),
) -> Step:
    """Run a training step without memory.

    Lightning releases the gradients of the previous step between the forward and the backward pass.

    Args:
        model: On the meta device.
        forward: Makes the inputs and runs the model.
        loss: Computes the loss from what `forward` returns.
        device: The kind of device to plan for.
        autocast_dtype: Type that autocast casts to; None for no autocast.
        last_layers: The backward pass of these layers, which it begins with, is measured apart.
    """
    meter, rules = Meter(model), _DeviceRules(device, autocast_dtype)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    counted: set[int] = set()
    waits_for = {id(weight) for layer in last_layers for weight in layer.parameters() if weight.requires_grad}
    first_backward = 0

    def count_gradient(weight: Tensor) -> None:
        nonlocal first_backward
        if id(weight) not in counted and weight.grad is not None:
            counted.add(id(weight))
            meter.gradients += weight.grad.untyped_storage().nbytes()
            if waits_for and waits_for <= counted:
                first_backward, meter.peak = meter.peak, meter.live
                waits_for.clear()

    with ExitStack() as stack:
        stack.enter_context(meter)
        stack.enter_context(rules)
        output = forward()
        in_forward = meter.peak
        meter.restart()
        objective = loss(output)
        del output
        rules.weight_casts = None
        saved, in_loss = meter.live, meter.peak
        for weight in trained:
            weight.grad = None
            stack.callback(weight.register_post_accumulate_grad_hook(count_gradient).remove)
        meter.restart()
        backward_under_modes(objective)
    return Step(saved, in_forward, in_loss, first_backward, meter.peak, meter.peak_activations, meter.flops)
