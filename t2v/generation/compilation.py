"""Whether `torch.compile` works on this machine."""

from functools import cache

import torch

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
