"""CUDA's rules without a GPU, so that mistakes that only a GPU shows fail on the CPU.

- `fake_cuda` runs code on tensors that have a device, "cuda", a type and a shape, but no data (PyTorch's
  `FakeTensorMode`): the real dispatcher and CUDA's real autocast decide types and devices. A tensor on the wrong
  device, or of a type that an operation refuses, raises as on a GPU. Copies of values between host and GPU, for which
  the host waits until the GPU has finished all its work, are recorded.
- `cuda_autocast` gives real CPU kernels CUDA's autocast policy (norms, losses and softmax in float32, matrix products
  in bfloat16), which differs from the CPU's. Values, gradients and optimizer steps are real.

A backward pass cannot run on fake CUDA tensors, since PyTorch's autograd engine asks CUDA's driver for its context;
`FakeCudaStrategy` lets a Lightning trainer run without one.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo  # before `fake_cuda` replaces what it imports
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

aten = torch.ops.aten

LOWER_PRECISION = {
    *("_convolution", "_convolution.deprecated", "convolution", "cudnn_convolution", "cudnn_convolution_transpose"),
    *("conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
    *("addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "einsum", "linalg_multi_dot"),
    *("linalg_vecdot", "linear", "matmul", "mm", "mv", "prelu", "scaled_dot_product_attention"),
    *("_scaled_dot_product_flash_attention", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"),
    *("_cudnn_rnn", "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"),
}
"""Operators that CUDA's autocast computes in its lower precision (aten/src/ATen/autocast_mode.h)."""
WIDEST_TYPE = {
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "scatter_add"),
    *("tensordot", "vdot"),
}
"""Operators that it computes in the widest type of their inputs; it computes the others that it has in float32."""


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Give `torch.autocast("cpu")` CUDA's policy, in eager and in compiled code."""
    cuda, cpu = (
        {
            name.removeprefix("aten::")
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
            if name.startswith("aten::")
        }
        for key in ("AutocastCUDA", "AutocastCPU")
    )
    assert cuda >= LOWER_PRECISION | WIDEST_TYPE, "this version of PyTorch has another policy"
    library = Library("aten", "IMPL", "AutocastCPU")
    try:
        for name in cuda | cpu:
            kernel = _autocast_kernel(name) if name in cuda else fallthrough_kernel
            library.impl(name, kernel, allow_override=True)
        yield
    finally:
        library._destroy()


def _autocast_kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if name in LOWER_PRECISION:
            dtype = torch.get_autocast_dtype("cpu")
        elif name in WIDEST_TYPE and torch.float32 not in {each.dtype for each in _tensors((args, kwargs))}:
            dtype = None
        else:
            dtype = torch.float32
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*args, **kwargs) if dtype is None else operator(*_cast(args, dtype), **_cast(kwargs, dtype))

    return kernel


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(each: Any) -> Any:
        eligible = isinstance(each, Tensor) and each.is_floating_point() and each.dtype != torch.float64
        return each.to(dtype) if eligible else each

    return torch.utils._pytree.tree_map(cast, value)


READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
"""Operators whose result a GPU must hand to the host."""
SAME_TYPE = {
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.index_add.default,
    aten.index_add_.default,
    aten.scatter.src,
    aten.scatter_.src,
    aten.scatter_add.default,
    aten.scatter_add_.default,
}
"""Operators whose kernels refuse different types, which their shapes-only versions do not check."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class HostReads(TorchDispatchMode):
    """Records every copy of values between host and GPU that the host waits for; a value that it reads is 1.

    Attributes:
        places: Where each happened, as "file:line function", the innermost line of this project.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self.record(args[0])
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func in SAME_TYPE and args[0].dtype != args[-1].dtype:
            raise RuntimeError(f"{func}: self is {args[0].dtype} and source is {args[-1].dtype}, which CUDA refuses")
        if func is aten.bincount.default:  # its length depends on values
            self.record(args[0])
            return args[0].new_empty((args[2:] or (kwargs["minlength"],))[0], dtype=torch.long)
        if func is aten.nonzero.default:
            self.record(args[0])
            return args[0].new_empty(1, args[0].ndim, dtype=torch.long)
        if func in INDEXING:  # a mask is counted, indices of the host are copied
            index = [each for each in args[1] if each is not None]
            if any(each.dtype == torch.bool or not _is_cuda(each) for each in index):
                self.record(args[0])
        if func.overloadpacket is aten.to and func is not aten.to.other:  # under inference mode it is not decomposed
            names = [each.name for each in func._schema.arguments]
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, args[:1]
            del kwargs["self"]
        if func.overloadpacket in (aten.to, aten._to_copy) and not kwargs.get("non_blocking", False):
            target = torch.device(kwargs.get("device") or args[0].device)
            if target.type != args[0].device.type:
                self.record()
        if func is aten.copy_.default and args[0].device.type != args[1].device.type:
            self.record()
        return func(*args, **kwargs)

    def record(self, source: Tensor | None = None) -> None:
        """Note the line of this project that is being run, if `source` is on the GPU."""
        if source is not None and not _is_cuda(source):
            return
        stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [frame for frame in stack if "/t2v/" in frame.filename or "/callbacks/" in frame.filename]
        others = [frame for frame in stack if "/torch/" not in frame.filename]
        last = (ours or others)[-1]
        self.places.append(f"{last.filename.rpartition('/')[2]}:{last.lineno} {last.name}")


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class _Generator(torch.Generator):
    """A generator that needs no driver; without data any will do."""

    device = torch.device("cuda:0")  # type: ignore[assignment]

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, "cpu")


@contextmanager
def fake_cuda() -> Iterator[HostReads]:
    """Run code on CUDA tensors without data; new tensors are on the CPU, as ever, unless a device is given.

    Yields:
        The record of reads by the host.
    """
    reads = HostReads()
    tensor = torch.tensor

    def copied_tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
        """`torch.tensor` builds values on the host and copies them, for which the host waits."""
        target = torch.get_default_device() if device is None else torch.device(device)
        if target.type != "cuda":
            return tensor(data, device=target, **options)
        reads.record()
        with unset_fake_temporarily():
            built = tensor(data, device="cpu", **options)
        return torch.empty(built.shape, dtype=built.dtype, device=target)

    def no_data(self: Tensor) -> Any:
        assert self.device.type == "cpu", "NumPy cannot see a GPU's memory"
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def tolist(self: Tensor) -> Any:
        """One copy, whatever the number of values."""
        reads.record(self)
        return np.ones(tuple(self.shape), bool if self.dtype == torch.bool else int).tolist()

    replaced = {
        "torch.Generator": _Generator,
        "torch.tensor": copied_tensor,
        "torch.Tensor.numpy": no_data,
        "torch.cuda.is_available": lambda: False,  # asked for by every operator, and slow
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda: True,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.nn.Module._apply": _apply,
    }
    with ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(patch(name, replacement))
        stack.enter_context(patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copy))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(reads)
        yield reads


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a tensor without data, which has no storage that could be copied."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `nn.Module._apply` does, which cannot replace a tensor without data by one of another device."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or (moved := function(tensor)) is tensor:
                continue
            tensors[name] = (
                nn.Parameter(moved.detach(), tensor.requires_grad) if tensors is module._parameters else moved
            )
    return module


def to_fake_cuda(module: nn.Module, device: str = "cuda:0") -> nn.Module:
    """Give the weights, buffers and metrics of a module, built outside of `fake_cuda`, no data, in place.

    Args:
        module: It is called inside of `fake_cuda`.
        device: Of all its tensors.
    """

    def fake(value: Any, device: str = device) -> Any:
        if not isinstance(value, Tensor):
            return value
        new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items()})
        if isinstance(part, Metric):
            part._defaults = {name: fake(value, "cpu") for name, value in part._defaults.items()}
            for name in part._defaults:
                setattr(part, name, fake(getattr(part, name)))
    return module


class FakeCudaStrategy(SingleDeviceStrategy):
    """A trainer's single GPU in `fake_cuda`; gradients are set without a backward pass."""

    strategy_name = "fake_cuda"

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0), accelerator=CPUAccelerator())

    def setup_environment(self) -> None:
        """Do nothing: the accelerator would refuse the device."""

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert closure_loss.ndim == 0
        assert closure_loss.requires_grad
        assert _is_cuda(closure_loss)
        assert self.lightning_module is not None
        self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)
