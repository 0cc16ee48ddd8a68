"""`torch.compile`: whether it works on this machine, its settings, and compilation of layers in place."""

from functools import cache

import torch
from einops import rearrange
from torch import nn
from torch.distributed.fsdp import FSDPModule

from t2v.torch_private import configure_compiler


@cache
def compile_error(device: str = "cpu") -> str | None:
    """Return why nothing can be compiled for a type of device, or None if it works.

    The cause is usually a missing C++ compiler, or for GPUs a missing Triton.
    """
    configure_compiler()
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:
        return type(error).__name__
    return None


def prepare_compilation(shapes: int) -> None:
    """Let layers be compiled for a number of input shapes, and trace a call of einops as one node.

    Tracing through the Python code of einops takes two thirds of the time until a decoding step is traced.
    """
    configure_compiler(shapes)
    torch.compiler.allow_in_graph(rearrange)


def compile_layer(layer: nn.Module) -> None:
    """Compile a layer for each shape of its inputs; FSDP2 must have sharded it before, if it does.

    The names of its weights do not change. `Module.compile` may trace hooks too, and those of FSDP2, which gather the
    weights, split the graph. Of a sharded layer only `forward` is compiled.

    Args:
        layer: A layer that is compiled already stays unchanged.
    """
    configure_compiler()
    if not isinstance(layer, FSDPModule):
        layer.compile(dynamic=False)
    elif "forward" not in vars(layer):
        layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
