"""Everything of PyTorch's private API that this project uses; `tests/test_private_api.py` fails if it changes."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DisableTorchFunction", "TorchDispatchMode"]

_aten = torch.ops.aten
ITEM = _aten._local_scalar_dense.default
"""The operator of `Tensor.item()`."""
TO_COPY = _aten._to_copy.default
"""The operator of copies to another device or type."""
CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
GPU_ATTENTION_BACKWARDS = (
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)
"""The operators of fused attention on the CPU and on GPUs."""


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operator, for code that is not compiled.

    PyTorch wraps `__torch_dispatch__` so that it is not compiled, which takes a third of the time of a small operator.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def onednn_linear(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """Return `F.linear(x, weight)` for float32 on the CPU, computed by oneDNN on all cores; it has no gradient."""
    if torch.compiler.is_compiling():
        output: Tensor = _compiled_onednn_linear(x, weight)
    else:
        output = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return output


@torch.library.custom_op("t2v::onednn_linear", mutates_args=())
def _compiled_onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return the same in compiled code, which takes oneDNN's operator for constant weights only."""
    return onednn_linear(x, weight)


@_compiled_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Let compiled code take any size of a dimension, where the code itself does not fix it."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def configure_compiler(shapes: int = 1) -> None:
    """Prepare `torch.compile` for this processor; called before anything is compiled.

    The cache of compiled code, in a folder of the computer or of a cluster, does not tell instruction sets apart unless
    one is set: code for AVX-512 that a run with AVX2 finds there is wrong, or never ends (torch 2.14).

    Args:
        shapes: Number of input shapes for which a function is at least compiled before it runs uncompiled.
    """
    limits, inductor, cpp = torch._dynamo.config, torch._inductor.config, torch._inductor.config.cpp
    limits.recompile_limit = max(limits.recompile_limit, shapes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, shapes)
    inductor.size_asserts = False  # Dynamo's guards check all inputs already; 0.4 ms for the 170 of a decoding pass
    cpp.simdlen = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability(), cpp.simdlen)


def storage_id(tensor: Tensor) -> int:
    """Return a number that identifies the tensor's storage while it exists, also without data (meta device)."""
    return int(tensor.untyped_storage()._cdata)


@cache
def makes_new_storage(operator: Any) -> bool:
    """Return whether the outputs of an operator share memory with no input, according to its schema."""
    schema = operator._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


@cache
def changes_lists_in_place(operator: Any) -> bool:
    """Return whether an operator changes the values of all tensors of its first argument and returns nothing."""
    return operator.name().startswith("aten::_foreach_") and not operator._schema.returns


def backward_under_modes(objective: Float[Tensor, ""]) -> None:
    """Run `objective.backward()` with dispatch and function modes kept on.

    The public functions turn modes off, so that a mode would not see what activation checkpointing computes again.
    """
    _engine_run_backward((objective,), (torch.ones_like(objective),), False, False, (), True, True)


def quantized_moments(optimizer: Any, parameter: Tensor) -> list[Tensor]:
    """Return what torchao's 8-bit Adam keeps for a parameter, without data: codes, scales and tables, or floats."""
    like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    moments: list[Any] = [optimizer._new_buffer(like, signed) for signed in (True, False)]
    return [part for moment in moments for part in quantized_parts(moment)]


def quantized_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the data of one of torchao's optimizer states, or a tensor itself."""
    return [getattr(tensor, name) for name in getattr(tensor, "tensor_attrs", ())] or [tensor]


def fused_rms_norm(*args: Any, **kwargs: Any) -> Tensor:
    """Compute RMSNorm by the GPU's fused operator, which saves less for the backward pass than the composed one."""
    output: Tensor = _aten._fused_rms_norm(*args, **kwargs)[0]
    return output


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Return whether a module's own buffer is part of its state dict."""
    return buffer not in module._non_persistent_buffers_set


def add_summary(writer: Any, summary: Any, step: int) -> None:
    """Write a TensorBoard summary that was built elsewhere by a `torch.utils.tensorboard.SummaryWriter`.

    Its public methods build their own summaries, and TensorBoard does not read the file of a second writer.
    """
    writer._get_file_writer().add_summary(summary, step)
