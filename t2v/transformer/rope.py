"""Rotary position embedding over the three axes of a video (https://arxiv.org/abs/2104.09864, https://arxiv.org/abs/2409.12191).

Each pair of dimensions of a head turns with one axis: time, row or column. Attention then depends on differences of
positions alone, so that frame 300 looks like frame 16.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation:
    """Cosines and sines that turn queries and keys; index it to pick positions."""

    def __init__(self, cos: Float[Tensor, "*n d"], sin: Float[Tensor, "*n d"]):
        self.cos, self.sin = cos, sin

    def __getitem__(self, item) -> "Rotation":
        return Rotation(self.cos[item], self.sin[item])

    def __call__(self, x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b heads n d"]:
        """Turns the heads of `x`; the pairs are dimension i and i + d/2."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def split_head(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head for (time, row, column): about a third each, all even, time takes the rest."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


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
    return Rotation(angle.cos(), angle.sin())
