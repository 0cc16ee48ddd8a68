"""A training step that takes no memory, and what it would have taken.

The model's own code runs, forward and backward, on tensors without data (PyTorch's meta device). Every storage that
appears is counted once until nothing refers to it any more, so that what is saved for the backward pass, what is
computed again and what comes and goes in between are the model's, and no formula can be out of date.

Three things differ by the device and are answered here: which way `is_cpu` sends the layers, what autocast casts, and
that fused kernels for attention and RMSNorm keep no scores and no squares.
"""

import copy
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Device = Literal["cuda", "cpu"]
aten = torch.ops.aten
_attention = aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
_IS_CPU = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_PRODUCTS = {
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
"""What autocast computes in 16 bits, as far as our models use it."""


class Step(NamedTuple):
    """Bytes that a step holds beside weights and the optimizer's state, and its work."""

    saved: int
    """What the forward pass keeps for the backward pass."""
    forward: int
    """Most in the forward pass, gradients of the step before left out."""
    backward: int
    """Most in the backward pass, gradients included as they come."""
    backward_alone: int
    """Most in the backward pass without gradients."""
    flops: int
    """Floating-point operations of all products, those computed again included."""


_seen: dict[Any, tuple[list[Any], int, bool]] = {}
"""Shapes of what operations made, and their work, by the operation and the shapes of its inputs."""


@cache
def _makes_new(func: Any) -> bool:
    """Whether its outputs share memory with nothing."""
    return all(each.alias_info is None for each in (*func._schema.arguments, *func._schema.returns))


def _shape_of(value: Any) -> Any:
    """What the outputs of an operation follow from."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(_shape_of, value))
    if isinstance(value, dict):
        return tuple((name, _shape_of(each)) for name, each in value.items())
    return type(value), value


class Meter(TorchDispatchMode):
    """Counts the bytes of all new storages that are alive, and the operations of matrix products."""

    def __init__(self, *known: nn.Module) -> None:
        """
        Args:
            known: modules whose weights, gradients and buffers are not counted.
        """
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_alone = self.flops = 0
        self._storages: dict[int, weakref.ref | None] = {
            tensor.untyped_storage()._cdata: None
            for module in known
            for each in (*module.parameters(), *module.buffers())
            for tensor in (each, each.grad)
            if tensor is not None
        }

    def restart(self) -> None:
        """Measures peaks from here on."""
        self.peak, self.peak_alone = self.live, self.live - self.gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return 1  # there is no value; a token, a step and a truth may all be one
        key = (func, _shape_of((args, kwargs))) if _makes_new(func) else None
        if key in _seen:  # what comes out follows from the shapes, and finding it takes PyTorch long
            shapes, flops, single = _seen[key]
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype, _ in shapes
            ]
            out: Any = made[0] if single else tuple(made)
        else:
            out, flops = func(*args, **kwargs), 0
            packet = func.overloadpacket
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=out)
            elif packet in (_attention, _attention_backward):
                q, k = args[:2] if packet is _attention else args[1:3]
                flops = (4 if packet is _attention else 10) * q.numel() * k.shape[2]
        tensors = out if isinstance(out, tuple | list) else (out,)
        if key is not None and key not in _seen and all(map(self._is_new, tensors)):
            _seen[key] = [_shape_of(each) for each in tensors], flops, isinstance(out, Tensor)
        self.flops += flops
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _is_new(self, value: Any) -> bool:
        """Whether it is a tensor without data, on a storage of its own: `_unsafe_view` does not say that it shares."""
        return isinstance(value, Tensor) and value.is_meta and value.untyped_storage()._cdata not in self._storages

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_alone = max(self.peak_alone, self.live - self.gradients)

        def gone(_: weakref.ref) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)


class _Elsewhere(TorchFunctionMode):
    """Answers as the device and the precision would that a plan is for."""

    def __init__(self, device: Device, half: torch.dtype | None):
        super().__init__()
        self.on_cpu, self.half = device == "cpu", half
        self.casts: dict[int, Tensor] | None = {}
        """Autocast's 16-bit weights, kept until the forward pass ends; then None."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CPU:
            return self.on_cpu
        if self.half is not None and func in _PRODUCTS:
            args = tuple(self._cast(each) for each in args)
        elif self.half is not None and not self.on_cpu and func in (torch.rms_norm, torch.layer_norm):
            args = tuple(each.float() if isinstance(each, Tensor) else each for each in args)
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is torch.rms_norm and not self.on_cpu:
            return aten._fused_rms_norm(*args, **kwargs)[0]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self.casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.half)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.half)
        return self.casts[id(value)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """A fused kernel; all of them keep their inputs, their output and one number a row, and a mask as numbers."""
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
    return _attention(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


def without_data(module: nn.Module, dtype: torch.dtype | None = None, device: str = "meta") -> Any:
    """A copy whose tensors have no data.

    Args:
        module: with data or without.
        dtype: of its weights and buffers; as they are by default.
        device: "meta", or any under `FakeTensorMode`.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(module, memo)


def measure(model: nn.Module, loss: Callable[[], Tensor], device: Device, half: torch.dtype | None) -> Step:
    """Runs a step without memory.

    Lightning drops the gradients of the step before between the forward and the backward pass.

    Args:
        model: on the meta device.
        loss: the forward pass, inputs included.
        device: what it shall be planned for.
        half: what autocast casts to; None where there is no autocast.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter, elsewhere = Meter(model), _Elsewhere(device, half)
    with ExitStack() as stack:
        stack.enter_context(meter)
        stack.enter_context(elsewhere)
        objective = loss()
        elsewhere.casts = None
        saved, forward = meter.live, meter.peak
        for weight in weights:
            weight.grad = None
            hook = weight.register_post_accumulate_grad_hook(lambda weight: _arrived(weight, meter, seen))
            stack.callback(hook.remove)
        seen: set[int] = set()
        meter.restart()
        # The public functions switch modes off, and what is computed again in the backward pass must meet them.
        _engine_run_backward((objective,), (torch.ones_like(objective),), False, False, (), True, True)
    return Step(saved, forward, meter.peak, meter.peak_alone, meter.flops)


def _arrived(weight: Tensor, meter: Meter, seen: set[int]) -> None:
    if id(weight) not in seen and weight.grad is not None:
        seen.add(id(weight))
        meter.gradients += weight.grad.untyped_storage().nbytes()
