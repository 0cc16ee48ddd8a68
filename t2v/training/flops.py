"""Floating-point operations (FLOPs) of matrix products, convolutions and fused attention, by torch's formulas.

A multiplication and an addition count as two. The executed FLOPs of a step contain what its backward pass computes a
second time; the FLOPs of the model (https://arxiv.org/abs/2204.02311), by which utilization is defined, do not.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from t2v.torch_private import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, GPU_ATTENTION_BACKWARDS, TorchDispatchMode


def executed_flops(operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Return the FLOPs of a call of an ATen operator; 0 for operators that are no products."""
    return _flops(_EXECUTED, operator, args, kwargs, output)


class ModelFlopCounter(TorchDispatchMode):
    """Counts the FLOPs of the model from its construction until `stop`.

    torch's `FlopCounterMode` decomposes some operators while it counts, so that a counted training step would not be
    bit-equal to an uncounted one; this class uses only its formulas. While it counts, compiled code runs uncompiled,
    since the operators inside compiled kernels cannot be seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._tracker = ModuleTracker()
        self._recomputing = 0
        """Number of nested modules that are called in the backward pass: activation checkpointing."""
        self._stack = ExitStack()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.callback(register_module_forward_pre_hook(self._enter).remove)
        self._stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        self._stack.enter_context(self)

    def stop(self) -> int:
        """Stop counting and return the FLOPs."""
        self._stack.close()
        return self.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # called again with the local tensors of this device
        output = func(*args, **(kwargs or {}))
        if not self._recomputing:
            self.flops += _flops(_MODEL, func, args, kwargs or {}, output)
        return output

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._tracker.is_bw:
            self._recomputing += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._tracker.is_bw:
            self._recomputing -= 1


def _flops(formulas: dict[Any, Callable[..., int]], operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    formula = formulas.get(getattr(operator, "overloadpacket", operator))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


def _attention_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count two products for each of the forward pass, without the second computation of the scores."""
    return 2 * _attention(query, key, value)


_EXECUTED: dict[Any, Callable[..., int]] = {
    **flop_registry,
    CPU_ATTENTION: _attention,
    CPU_ATTENTION_BACKWARD: _attention_backward,
}
_MODEL: dict[Any, Callable[..., int]] = {
    **_EXECUTED,
    **dict.fromkeys((CPU_ATTENTION_BACKWARD, *GPU_ATTENTION_BACKWARDS), _attention_gradients),
}
