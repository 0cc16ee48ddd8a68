"""Device and type of the weights with which models are loaded."""

import torch
from torch import nn

from t2v.errors import UserError


def find_device(name: str | torch.device | None, argument: str = "device") -> torch.device:
    """Return the named device, or the first GPU if there is one, else the CPU.

    Args:
        name: Such as "cpu" or "cuda:0"; None for the default.
        argument: What the user gave it as.

    Raises:
        UserError: If the device does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"{argument}={name} cannot be used ({reason}): give cpu, or leave {argument} out.") from error


def find_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return the type of the weights on a device, None for the stored one.

    Args:
        name: "auto" is the stored type, but float32 on CPUs without bfloat16 units, where bfloat16 is slow.
        device: Where the weights will be.

    Raises:
        UserError: If the type is not known.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    key = str(name).removeprefix("torch.")
    if key == "auto":
        return torch.float32 if device.type == "cpu" and not cpu_has_bfloat16() else None
    if key not in dtypes:
        raise UserError(f"dtype={key} is not known: choose auto, {' or '.join(dtypes)}.")
    return dtypes[key]


def cpu_has_bfloat16() -> bool:
    """Return whether PyTorch uses instructions of this CPU for products in bfloat16.

    It does not on x86 without AVX-512, or if the environment variable ATEN_CPU_CAPABILITY limits it to AVX2.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def float_type(model: nn.Module) -> torch.dtype:
    """Return the type of the weights that are not quantized."""
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
