"""Whether `torch.compile` works on this machine."""

from functools import cache

import torch


@cache
def compile_error() -> str | None:
    """Return why nothing can be compiled for the CPU (usually a missing C++ compiler), or None if it works."""
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except Exception as error:
        return type(error).__name__
    return None
