"""The judges of the moving shapes: they look at the pixels of a clip, and know nothing of prompts or models.

- `recognize` names colour, shape and motion of a clip as a whole; each frame has a vote.
- `best_fits` compares each frame with every clip that there is: all colours, shapes and sizes at all positions. A video
  whose shape changes, swells, splits or vanishes does not pass it.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from data.examples.shapes import BACKGROUND, COLOURS, SHAPES, SIZES, ShapeClip, coverage


class Answer(NamedTuple):
    """Attributes of a clip, each one of the names in `data.examples.shapes` or "nothing"."""

    colour: str
    shape: str
    direction: str

    @classmethod
    def of(cls, clip: ShapeClip) -> "Answer":
        """Return what is true of a clip."""
        return cls(clip.colour, clip.shape, clip.direction)


NOTHING = Answer("nothing", "nothing", "nothing")
"""The answer for a clip in which no shape is found."""
MIN_PIXELS = 30
"""Smallest patch of colour that counts as a shape; the smallest triangle has about 128 pixels."""
MIN_TRAVEL = 8.0
"""Smallest motion from the first to the last frame, in pixels; every moving shape travels at least 28."""

MARGIN = 6
"""Pixels around a shape that are compared too."""
MIN_PSNR = 22.0
"""Smallest similarity of a frame to the shape that it shows, in dB."""
MIN_FRAMES = 0.8
"""Smallest fraction of a clip's frames that must show the shape."""


class Fit(NamedTuple):
    """The shape that is most similar to a frame."""

    colour: str
    shape: str
    psnr: float
    """In the box around the shape with a margin of `MARGIN` pixels, in dB."""


def passes(video: UInt8[np.ndarray, "t height width 3"], truth: Answer) -> bool:
    """Return whether most frames show the right shape, by `shows`, and the motion has the right direction."""
    return recognize(video).direction == truth.direction and shows(video, truth.colour, truth.shape)


def shows(video: UInt8[np.ndarray, "t height width 3"], colour: str, shape: str) -> bool:
    """Return whether a shape is the best fit of most frames, each with a PSNR of at least `MIN_PSNR`.

    Args:
        video: The clip.
        colour: One of `COLOURS`.
        shape: One of `SHAPES`.
    """
    fits = best_fits(video)
    good = [fit.psnr >= MIN_PSNR and (fit.colour, fit.shape) == (colour, shape) for fit in fits]
    return sum(good) >= MIN_FRAMES * len(fits)


def best_fits(video: UInt8[np.ndarray, "t height width 3"]) -> list[Fit]:
    """Return the shape, of any colour and size and at any position, that is most similar to each frame."""
    frames = (torch.from_numpy(video).float() - torch.tensor(BACKGROUND)).permute(0, 3, 1, 2)
    colours = torch.tensor(list(COLOURS.values())).float() - torch.tensor(BACKGROUND)
    errors = []
    for size in SIZES.values():
        box = size + 2 * MARGIN
        padded = F.pad(frames, [MARGIN] * 4)  # beyond the picture there is background
        energy = _box_sums(padded.square().sum(1, keepdim=True), box)
        pixels = _box_sums(F.pad(torch.ones_like(frames[:1, :1]), [MARGIN] * 4), box)
        masks = torch.stack([torch.from_numpy(coverage(shape, size)).float() for shape in SHAPES])
        products = F.conv2d(frames.flatten(0, 1)[:, None], masks[:, None]).unflatten(0, frames.shape[:2])
        products = torch.einsum("tcsyx,kc->tskyx", products, colours)
        drawn = masks.square().sum((1, 2))[:, None] * colours.square().sum(1)  # the energy of each shape and colour
        squares = energy[:, :, None] - 2 * products + drawn[..., None, None]
        errors.append((squares / (3 * pixels)).flatten(3).amin(3).flatten(1))
    mse, best = torch.cat(errors, dim=1).min(1)
    names = [(colour, shape) for _ in SIZES for shape in SHAPES for colour in COLOURS]
    psnr = 10 * (255**2 / mse.clamp(min=1e-6)).log10()
    return [
        Fit(colour, shape, value)
        for (colour, shape), value in zip((names[index] for index in best.tolist()), psnr.tolist(), strict=True)
    ]


def _box_sums(x: Float[Tensor, "t 1 height width"], box: int) -> Float[Tensor, "t 1 rows columns"]:
    """Return the sum of each square of `box` × `box` pixels."""
    columns = F.avg_pool2d(x, (box, 1), stride=1, divisor_override=1)
    return F.avg_pool2d(columns, (1, box), stride=1, divisor_override=1)


def recognize_file(path: str | Path) -> Answer:
    """Return the attributes of the shape in an mp4 file."""
    return recognize(read_file(path))


def read_file(path: str | Path) -> UInt8[np.ndarray, "t height width 3"]:
    """Return all frames of an mp4 file."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def recognize(video: UInt8[np.ndarray, "t height width 3"]) -> Answer:
    """Return the attributes of the shape in a video.

    Colour and shape are those of most frames; the direction is that of the shape's centre over the clip.
    """
    masks = [_patch(frame.astype(float)) for frame in video]
    found = [(frame, mask) for frame, mask in zip(video, masks, strict=True) if mask.sum() >= MIN_PIXELS]
    if len(found) * 2 < len(video):
        return NOTHING
    colours = Counter(_colour(frame[mask]) for frame, mask in found)
    shapes = Counter(_shape(mask) for _, mask in found)
    centres = np.array([np.argwhere(mask).mean(0)[::-1] for _, mask in found])  # (x, y)
    return Answer(colours.most_common(1)[0][0], shapes.most_common(1)[0][0], _direction(centres))


def _patch(frame: Float64[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    """Return the pixels whose colour is closer to the shape's than to the background's."""
    distance = np.sqrt(((frame - np.array(BACKGROUND, float)) ** 2).sum(-1))
    peak = np.quantile(distance, 1 - 2 * MIN_PIXELS / distance.size)
    return distance > max(0.5 * peak, 40.0)


def _colour(pixels: UInt8[np.ndarray, "pixels 3"]) -> str:
    """Return the name of the palette's colour closest to the median."""
    palette = np.array(list(COLOURS.values()), float)
    distances = ((palette - np.median(pixels.astype(float), axis=0)) ** 2).sum(1)
    return list(COLOURS)[int(distances.argmin())]


def _shape(mask: Bool[np.ndarray, "height width"]) -> str:
    """Return circle, square or triangle, by the fraction of its bounding box that the patch fills (0.79, 1, 0.5)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    fill = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    if fill < 0.68:
        return "triangle"
    return "circle" if fill < 0.9 else "square"


def _direction(centres: Float64[np.ndarray, "frames 2"]) -> str:
    """Return left, right, up, down or still, from the centres (x, y) of the patch in pixels.

    The first and the last quarter of the frames are averaged, and their distance extrapolated to the whole clip.
    """
    quarter = max(len(centres) // 4, 1)
    dx, dy = (centres[-quarter:].mean(0) - centres[:quarter].mean(0)) * len(centres) / (len(centres) - quarter)
    if np.hypot(dx, dy) < MIN_TRAVEL:
        return "still"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"
