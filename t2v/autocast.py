"""Autocast for operations that PyTorch's own does not treat as they need."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of `x`; it costs little where autocast is off."""
    return torch.autocast(x.device.type, enabled=False) if _is_enabled(x) else nullcontext()


def to_autocast_type(x: Tensor) -> Tensor:
    """Return `x` in the type in which autocast computes matrix products, unchanged where autocast is off."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _is_enabled(x) else x


def _is_enabled(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
