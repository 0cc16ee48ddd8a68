"""An oracle for moving shapes: what colour, shape and motion a clip shows, judged from its pixels alone.

It knows the palette and the three outlines, nothing of prompts or models. `read` of an mp4's frames gives one answer an
attribute; a clip in which no shape can be found answers "nothing".
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from data.examples.shapes import BACKGROUND, COLOURS


class Answer(NamedTuple):
    """What the oracle sees; each is a word of `data.examples.shapes` or "nothing"."""

    colour: str
    shape: str
    direction: str


NOTHING = Answer("nothing", "nothing", "nothing")
MIN_PIXELS = 30
"""A smaller patch of colour is no shape: the smallest triangle covers about 128 pixels."""
MIN_TRAVEL = 8.0
"""Pixels between the first and the last frame; every moving shape travels at least 28."""


def read_clip(path: str | Path) -> Answer:
    """Reads an mp4 and names what moves in it."""
    with av.open(str(path)) as container:
        return read(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))


def read(video: np.ndarray) -> Answer:
    """Names what moves in `video`, uint8 of shape (t, h, w, 3).

    Colour and shape are what most frames show; the motion is that of the patch's centre over the clip.
    """
    background, palette = np.array(BACKGROUND, float), np.array(list(COLOURS.values()), float)
    frames = [_patch(frame.astype(float), background) for frame in video]
    seen = [(frame.astype(float), mask) for frame, mask in zip(video, frames, strict=True) if mask.sum() >= MIN_PIXELS]
    if len(seen) * 2 < len(video):
        return NOTHING

    colours: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for frame, mask in seen:
        core = np.median(frame[mask], axis=0)
        colours[list(COLOURS)[int(((palette - core) ** 2).sum(1).argmin())]] += 1
        shapes[_outline(mask)] += 1
    centres = np.array([np.argwhere(mask).mean(0)[::-1] for _, mask in seen])  # (x, y)
    return Answer(colours.most_common(1)[0][0], shapes.most_common(1)[0][0], _motion(centres))


def _patch(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The pixels (h, w) that are nearer to the shape's own colour than to the ground."""
    distance = np.sqrt(((frame - background) ** 2).sum(-1))
    peak = np.quantile(distance, 1 - 2 * MIN_PIXELS / distance.size)
    return distance > max(0.5 * peak, 40.0)


def _outline(mask: np.ndarray) -> str:
    """Circle, square or triangle, by how much of its bounding box the patch fills (0.79, 1, 0.5)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    fill = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return "triangle" if fill < 0.68 else "circle" if fill < 0.9 else "square"


def _motion(centres: np.ndarray) -> str:
    """Left, right, up, down or still, from the centres (n, 2) of the patch over the clip, in pixels."""
    quarter = max(len(centres) // 4, 1)
    dx, dy = (centres[-quarter:].mean(0) - centres[:quarter].mean(0)) * len(centres) / (len(centres) - quarter)
    if np.hypot(dx, dy) < MIN_TRAVEL:
        return "still"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"
