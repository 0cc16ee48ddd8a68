"""Flaws of a whole video that its header does not state: interlaced frames without the flag, and black bars.

Both are looked for in a few pairs of consecutive frames, spread over the video.

- Interlaced: rows of even and odd number show different moments. So where the picture moves, a pixel differs from the
  rows above and below it in the same direction (a comb), but not from the next rows of its own field. Noise and fine
  texture do both.
- Bars: rows, or columns, of one dark colour at two opposite edges, in all frames that are not dark as a whole.

Axis letters: t frames, h w pixels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from t2v.video import DecodeError, VideoInfo, read_at

INTERLACED, BLACK_BARS = "interlaced frames", "black bars"
"""Names of the flaws."""
_PAIRS = 8
"""Pairs of frames that are looked at."""
_MOVES, _COMB = 16, 12
"""Grey levels by which a pixel that moves differs from the frame before, and one of a comb from its neighbours."""
_MIN_COMBED, _MIN_EXCESS = 0.08, 1.4
"""Least fraction of the moving pixels that are in combs, and how often as many as within a field, if interlaced."""
_MIN_MOVING = 2e-4
"""Least fraction of the pixels that move; with fewer nothing can be said."""
_DARK, _EVEN = 24, 4
"""Highest mean grey level of a bar, that of FFmpeg's cropdetect, and largest standard deviation in it."""
_MIN_PICTURE = 24
"""Least mean grey level of a frame in which bars are looked for."""
_MIN_BAR = 0.02
"""Least part of the height or width that a bar takes."""


class Bars(NamedTuple):
    """Pixels of black bars at the edges of the picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{size} pixels at the {side}" for side, size in self._asdict().items() if size)

    def crop(self, frame: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c h_inside w_inside"]:
        """Return a frame without the bars."""
        return frame[:, self.top : frame.shape[1] - self.bottom, self.left : frame.shape[2] - self.right]

    def inside(self, info: VideoInfo) -> VideoInfo:
        """Return the properties of a video without the bars."""
        return info._replace(height=info.height - self.top - self.bottom, width=info.width - self.left - self.right)


class Flaws(NamedTuple):
    """What was found in a video."""

    interlaced: bool = False
    bars: Bars = Bars()

    @property
    def names(self) -> list[str]:
        """The flaws in words."""
        return [INTERLACED] * self.interlaced + [BLACK_BARS] * any(self.bars)


def find_flaws(path: Path, info: VideoInfo, timeout: float) -> Flaws:
    """Return the flaws of a video; none if it is too short, too dark, does not move, or cannot be decoded.

    Args:
        path: The video.
        info: Its length, rate and size.
        timeout: Seconds that this may take.
    """
    if info.frames < 4:
        return Flaws()
    firsts = np.linspace(0, info.frames - 2, min(_PAIRS, info.frames // 2)).astype(int)
    times = (np.stack([firsts, firsts + 1], 1).ravel() / info.fps).tolist()
    try:
        grey = read_at(path, times, transform=_to_grey, timeout=timeout).numpy()
    except DecodeError:  # cutting reports it
        return Flaws()
    return Flaws(_is_interlaced(grey), _find_bars(grey))


def _to_grey(frames: UInt8[Tensor, "t c h w"]) -> UInt8[Tensor, "t h w"]:
    return torch.stack([frame.float().mean(0).byte() for frame in frames])


def _is_interlaced(grey: UInt8[np.ndarray, "t h w"]) -> bool:
    """Return whether moving pixels are in combs; the frames are pairs of consecutive ones."""
    moving = combed = in_field = 0
    for before, frame in grey.reshape(-1, 2, *grey.shape[1:]).astype(np.int16):
        moves = (np.abs(frame - before) > _MOVES)[2:-2]
        moving += int(moves.sum())
        combed += int((_is_extreme(frame, 1) & moves).sum())
        in_field += int((_is_extreme(frame, 2) & moves).sum())
    enough = moving > _MIN_MOVING * grey.size / 2
    return enough and combed > _MIN_COMBED * moving and combed > _MIN_EXCESS * in_field


def _is_extreme(frame: np.ndarray, distance: int) -> np.ndarray:
    """Return where a pixel is brighter, or darker, than those so many rows above and below it; without two rows."""
    rows = len(frame)
    above = frame[2:-2] - frame[2 - distance : rows - 2 - distance]
    below = frame[2:-2] - frame[2 + distance : rows - 2 + distance]
    return (np.minimum(above, below) > _COMB) | (np.maximum(above, below) < -_COMB)


def _find_bars(grey: UInt8[np.ndarray, "t h w"]) -> Bars:
    bright = grey[grey.mean((1, 2)) > _MIN_PICTURE]
    if len(bright) < 2:
        return Bars()
    top, bottom = _find_pair(bright.transpose(1, 0, 2))
    left, right = _find_pair(bright[:, top : bright.shape[1] - bottom].transpose(2, 0, 1))
    return Bars(top, bottom, left, right)


def _find_pair(lines: np.ndarray) -> tuple[int, int]:
    """Return how many of the lines, first axis, form a bar at the start and at the end; 0 if not both do."""
    values = lines.reshape(len(lines), -1).astype(np.float32)
    is_bar = (values.mean(1) < _DARK) & (values.std(1) < _EVEN)
    picture = np.flatnonzero(~is_bar)
    if not len(picture):
        return 0, 0
    start, end = int(picture[0]), int(len(lines) - 1 - picture[-1])
    same = abs(start - end) <= max(4, 0.25 * max(start, end))
    return (start, end) if same and min(start, end) >= max(2, _MIN_BAR * len(lines)) else (0, 0)
