"""Rotary position embedding over the three axes of a video (https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2409.12191).

Each pair of dimensions of a head turns with one axis: time, row or column. Attention then depends on differences of
positions alone, so that frame 300 looks like frame 16.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines that turn queries and keys, a row a position; the pairs are dimension i and i + d/2."""

    cos: Float[Tensor, "n d"]
    sin: Float[Tensor, "n d"]
    """Negative in the first half, so that turning is one product and one fused sum."""

    def at(self, positions: slice) -> "Rotation":
        """The rotation of some of the positions."""
        return Rotation(self.cos[positions], self.sin[positions])

    def __call__(self, x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b heads n d"]:
        """Turns the heads of `x`."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def split_head(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head for (time, row, column): about a third each, all even, time takes the rest."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def raster(start: int, stop: int, height: int, width: int, device: torch.device) -> Int[Tensor, "n 3"]:
    """Frame, row and column of the raster places from `start` to `stop`."""
    place = torch.arange(start, stop, device=device)
    return torch.stack([place // (height * width), place % (height * width) // width, place % width], dim=-1)


def rotation(positions: Int[Tensor, "n 3"], dims: tuple[int, int, int], theta: float) -> Rotation:
    """The rotation at each position.

    Args:
        positions: frame, row and column.
        dims: dimensions of a head that turn with each axis, all even.
        theta: base of the wavelengths, which run from 2π to 2π·theta positions.
    """
    angles = []
    for axis, dim in enumerate(dims):
        frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / max(dim, 1))
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
