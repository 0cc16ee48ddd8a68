"""Compilation of layers in place, so that the names of the weights do not change."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from t2v.torch_private import configure_compiler


def compile_layer(layer: nn.Module) -> None:
    """Compile a layer for each shape of its inputs; FSDP2 must have sharded it before, if it does.

    `Module.compile` may trace hooks too, and those of FSDP2, which gather the weights, split the graph. Of a sharded
    layer only `forward` is compiled.

    Args:
        layer: A layer that is compiled already stays unchanged.
    """
    configure_compiler()
    if not isinstance(layer, FSDPModule):
        layer.compile(dynamic=False)
    elif "forward" not in vars(layer):
        layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
