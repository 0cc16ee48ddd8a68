"""Rotary position embedding over time, row and column (https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2409.12191).

Each pair of dimensions of a head is rotated by the position along one axis. Attention then depends only on differences
of positions, so that frame 300 is computed like frame 16.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines that rotate queries and keys, a row per position; dimensions i and i + d/2 are a pair."""

    cos: Float[Tensor, "*b n d"]
    sin: Float[Tensor, "*b n d"]
    """Negative in the first half, so that a rotation is one product and one fused multiply-add."""

    def at(self, positions: slice) -> "Rotation":
        """Return the rotation of a range of positions."""
        return Rotation(self.cos[positions], self.sin[positions])

    def __call__(self, x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b heads n d"]:
        """Rotate queries or keys."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Split an even head width over (time, row, column): about a third each, all even, the rest goes to time."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def raster_positions(start: int, stop: int, height: int, width: int, device: torch.device) -> Int[Tensor, "n 3"]:
    """Return frame, row and column of the raster positions from `start` to `stop`."""
    n = torch.arange(start, stop, device=device)
    return torch.stack([n // (height * width), n % (height * width) // width, n % width], dim=-1)


def rotation_at(positions: Int[Tensor, "*b n 3"], dims: tuple[int, int, int], theta: float) -> Rotation:
    """Return the rotation at each position.

    Args:
        positions: Frame, row and column.
        dims: Dimensions of a head that rotate with each axis, all even.
        theta: Base of the wavelengths, which run from 2π to 2π·theta positions.
    """
    angles = []
    for axis, dim in enumerate(dims):
        frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / max(dim, 1))
        angles.append(positions[..., axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
