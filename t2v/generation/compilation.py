"""Whether `torch.compile` works on this machine."""

from functools import cache

import torch


@cache
def compile_error() -> str | None:
    """Why nothing can be compiled for the CPU, such as that there is no C++ compiler; None where it works."""
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except Exception as error:
        return type(error).__name__
    return None
