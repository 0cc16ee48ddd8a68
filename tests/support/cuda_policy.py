"""CUDA's rules without a GPU, so that mistakes that only a GPU shows fail on the CPU.

- `fake_cuda` runs code on tensors that have a device, "cuda", a type and a shape, but no data (PyTorch's
  `FakeTensorMode`): the real dispatcher and CUDA's real autocast decide types and devices. A tensor on the wrong
  device, or of a type that an operation refuses, raises as on a GPU. Copies of values between host and GPU, for which
  the host waits until the GPU has finished all its work, are recorded.
- `CudaAutocast` gives real CPU kernels CUDA's autocast policy (norms, losses and softmax in float32, matrix products in
  bfloat16), which differs from the CPU's. Values, gradients and optimizer steps are real.

A backward pass cannot run on fake CUDA tensors, since PyTorch's autograd engine asks CUDA's driver for its context.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # before `fake_cuda` replaces what it imports
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
LOWER_PRECISION = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.scaled_dot_product_attention,
}
FLOAT32 = {
    torch.cumsum,
    Tensor.cumsum,
    torch.cumprod,
    torch.exp,
    Tensor.exp,
    torch.log,
    Tensor.log,
    torch.log2,
    Tensor.log2,
    torch.log1p,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.prod,
    torch.reciprocal,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.softmax,
    Tensor.softmax,
    F.softmax,
    torch.log_softmax,
    Tensor.log_softmax,
    F.log_softmax,
    torch.sum,
    Tensor.sum,
    torch.norm,
    Tensor.norm,
    torch.linalg.vector_norm,
    F.normalize,
    torch.cosine_similarity,
    F.cosine_similarity,
    torch.layer_norm,
    F.layer_norm,
    torch.group_norm,
    F.group_norm,
    torch.rms_norm,
    F.rms_norm,
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.softplus,
    F.binary_cross_entropy_with_logits,
}


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast policy over CPU kernels, wherever autocast is enabled for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if func in LOWER_PRECISION:
            args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype("cpu"))
        elif func in FLOAT32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        else:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value


READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
"""Operations whose result a GPU must hand to the host."""


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
"""Operations whose kernels refuse different types, which their shapes-only versions do not check."""


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
        if func in READS and _is_cuda(args[0]):
            self.record()
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func in SAME_TYPE and args[0].dtype != args[-1].dtype:
            raise RuntimeError(f"{func}: self is {args[0].dtype} and source is {args[-1].dtype}, which CUDA refuses")
        if func is aten._to_copy.default and _is_cuda(args[0]) and str(kwargs.get("device", "cuda")) == "cpu":
            self.record()
        return func(*args, **kwargs)

    def record(self) -> None:
        """Note the line of this project that is being run."""
        frames = [
            frame for frame in traceback.extract_stack() if "/t2v/" in frame.filename or "/callbacks/" in frame.filename
        ]
        last = frames[-1] if frames else traceback.extract_stack()[-3]
        self.places.append(f"{last.filename.rpartition('/')[2]}:{last.lineno} {last.name}")


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class _Generator(torch.Generator):
    """A generator that needs no driver; without data any will do."""

    device = torch.device("cuda:0")  # type: ignore[assignment]

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, "cpu")


@contextmanager
def fake_cuda(autocast: torch.dtype | None = None, default: torch.dtype = torch.float32) -> Iterator[HostReads]:
    """Run code on CUDA tensors without data.

    Args:
        autocast: What CUDA's autocast casts to, such as torch.bfloat16 for `bf16-mixed`; None turns it off.
        default: The default type of new tensors: torch.bfloat16 for `bf16-true`.

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
            made = tensor(data, device="cpu", **options)
        return torch.empty(made.shape, dtype=made.dtype, device=target)

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    torch.set_autocast_enabled("cuda", autocast is not None)
    torch.set_autocast_dtype("cuda", autocast or torch.float16)
    try:
        with (
            patch("torch.Generator", _Generator),
            patch("torch.tensor", copied_tensor),
            FakeTensorMode(allow_non_fake_inputs=False),
            torch.device("cuda:0"),
            reads,
        ):
            yield reads
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_default_dtype(before)


def to_fake_cuda(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a module's weights and buffers, in place, the device of `fake_cuda` and no data.

    Args:
        module: Built outside or inside of `fake_cuda`; it is called inside.
        dtype: Of its floating-point weights and buffers; unchanged if not given.
    """
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cuda:0")
                tensors[name] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return module
