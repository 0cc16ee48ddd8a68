"""Wrappers of generators whose outputs are computed when they are read, after the trainer's own contexts have ended."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def in_context(context: Callable[[], AbstractContextManager[Any]], outputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield outputs, each computed in a new context.

    Args:
        context: Returns the context, such as the `forward_context` of a precision plugin.
        outputs: Computed lazily.
    """
    while True:
        with context():
            output = next(outputs, None)
        if output is None:
            return
        yield output


def unsharded(model: nn.Module, outputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield outputs while the model's sharded parameters are gathered on every device.

    FSDP2 gathers parameters in `forward` only; this is for a model that computes by other methods.

    Args:
        model: Sharded or not.
        outputs: Computed lazily by the model.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield from outputs
    finally:
        for part in parts:
            part.reshard()
