"""Moving shapes: an example data set that needs no download, as mp4 files with captions.

`python -m data.examples.shapes runs/demo/clips` draws clips of one coloured shape on a dark background, which stands
still, or moves by whole pixels until it reaches the edge of the picture and stays there:

- 6 colours × 3 shapes × 5 directions (left, right, up, down, still) × 2 sizes × 2 speeds, starting at random positions
  on a lattice of 4 pixels, at least 28 pixels from the edge.
- 18 of the 90 (colour, shape, direction) combinations are **held out**: they make up `val/` and do not occur in
  `train/`, though each colour, shape and direction does. They test whether a model composes what it learned.
- Captions follow the templates below, such as "a small red circle moves left slowly", with paraphrases. Size and speed
  are not always mentioned.
- A training clip has several captions: those of other clips with the same attributes, since a caption that occurs once
  is memorized, and some that mention fewer attributes, such as "something moves left", so that the meaning of each word
  is learned separately.

`OUT/train` and `OUT/val` contain the mp4s and a `captions.csv` with the columns path, caption and the attributes, and
one row for each caption.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from data.examples import is_complete
from data.examples.writer import check_counts, write_split
from t2v.errors import run_tool

T = TypeVar("T")

FRAMES = 16
FPS = 8
IMAGE_SIZE = 64
BACKGROUND = (24, 24, 30)
COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 180, 75),
    "blue": (50, 90, 235),
    "yellow": (245, 215, 50),
    "purple": (165, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SIZES = {"small": 16, "large": 24}
"""Width and height of the shape in pixels."""
SPEEDS = {"slow": 2, "fast": 4}
"""Pixels per frame."""
LATTICE = 4
"""Coordinates of the shapes in the first frame are multiples of this number of pixels."""
MIN_DISTANCE = 28
"""Pixels between a moving shape in the first frame and the edge it moves to, at least."""
SHARED, VAGUE = 4, 4
"""Largest number of captions of a training clip: complete ones, and ones that leave out its colour or shape."""

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SPEED_WORDS = {"slow": ("slowly", "at low speed", "gently"), "fast": ("fast", "quickly", "rapidly")}
DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftwards", "towards the left", "to the left side"),
    "right": ("right", "to the right", "rightwards", "towards the right", "to the right side"),
    "up": ("up", "upwards", "to the top", "towards the top", "upward"),
    "down": ("down", "downwards", "to the bottom", "towards the bottom", "downward"),
}
VERBS = (
    ("moves", "moving"),
    ("goes", "going"),
    ("slides", "sliding"),
    ("travels", "travelling"),
    ("drifts", "drifting"),
    ("flies", "flying"),
)
STILL_WORDS = (
    ("stays still", "staying still"),
    ("stands still", "standing still"),
    ("does not move", "not moving"),
    ("rests in place", "resting in place"),
    ("stays where it is", "staying where it is"),
    ("is not moving", "without moving"),
)
TEMPLATES = (
    "a {size} {colour} {shape} {does} {speed}",
    "a {size} {colour} {shape} {does} {speed}",
    "the {size} {colour} {shape} {does}",
    "a {colour} {shape} {does} {speed}",
    "{colour} {shape} {doing}",
    "a {colour} {shape} {doing} {speed}",
    "{size} {colour} {shape} {doing} {speed}",
    "a {shape} {does}, it is {colour}",
    "there is a {size} {colour} {shape} {doing}",
    "a {size} {shape} in {colour} {does}",
    "a video of a {colour} {shape} that {does}",
    "{size} {colour} {shape} {does}",
    "please show me a {size} {colour} {shape} {doing}",
    "show a {colour} {shape} {doing} {speed}",
    "make a video of a {size} {colour} {shape} {doing} {speed}",
)
VAGUE_TEMPLATES = (
    "something {does}",
    "something {does} {speed}",
    "{doing} {speed}",
    "something {colour} {does} {speed}",
    "the {colour} one {does}",
    "a {colour} shape {does}",
    "a {size} {colour} thing {does}",
    "a shape {does}",
    "a {shape} {does}",
    "a {size} {shape} {does} {speed}",
)


@dataclass(frozen=True)
class ShapeClip:
    """Attributes of one clip.

    Attributes:
        colour: One of `COLOURS`.
        shape: One of `SHAPES`.
        direction: One of `DIRECTIONS`.
        size: One of `SIZES`.
        speed: One of `SPEEDS`.
        x: Left edge of the shape in the first frame, in pixels.
        y: Top edge of the shape in the first frame, in pixels.
    """

    colour: str
    shape: str
    direction: str
    size: str
    speed: str
    x: int
    y: int


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """Return the (colour, shape, direction) combinations of the held-out or of the training split.

    Each colour, shape and direction occurs in both splits; each (colour, shape) lacks one direction in training.
    """
    triples = itertools.product(enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS))
    return [(c, s, d) for (i, c), (j, s), (k, d) in triples if ((i + 2 * j + k) % 5 == 0) == held_out]


def sample_clip(combination: tuple[str, str, str], rng: np.random.Generator) -> ShapeClip:
    """Draw size, speed and a start position far enough from the edge.

    Args:
        combination: Colour, shape and direction.
        rng: Generator of the random choices.
    """
    colour, shape, direction = combination
    size, speed = str(rng.choice(list(SIZES))), str(rng.choice(list(SPEEDS)))
    last = IMAGE_SIZE - SIZES[size]
    start = []
    for step in DIRECTIONS[direction]:
        low = MIN_DISTANCE if step < 0 else 0
        high = last - MIN_DISTANCE if step > 0 else last
        start.append(LATTICE * int(rng.integers(low // LATTICE, high // LATTICE + 1)))
    return ShapeClip(colour, shape, direction, size, speed, *start)


def caption_of(clip: ShapeClip, rng: np.random.Generator, templates: Sequence[str] = TEMPLATES) -> str:
    """Return a caption from a random template.

    Args:
        clip: The clip.
        rng: Generator of the random choices.
        templates: Templates to choose from.
    """
    if clip.direction == "still":
        does, doing = _pick(STILL_WORDS, rng)
        speed = ""
    else:
        verb, participle = _pick(VERBS, rng)
        where = _pick(DIRECTION_WORDS[clip.direction], rng)
        does, doing = f"{verb} {where}", f"{participle} {where}"
        speed = _pick(SPEED_WORDS[clip.speed], rng)
    text = _pick(templates, rng).format(
        size=_pick(SIZE_WORDS[clip.size], rng),
        colour=clip.colour,
        shape=_pick(SHAPE_WORDS[clip.shape], rng),
        does=does,
        doing=doing,
        speed=speed,
    )
    return " ".join(text.split())


def render(clip: ShapeClip) -> UInt8[Tensor, "t 3 height width"]:
    """Draw a clip with anti-aliased edges."""
    size = SIZES[clip.size]
    opacity = coverage(clip.shape, size)[..., None]
    colour, background = np.array(COLOURS[clip.colour]), np.array(BACKGROUND)
    patch = np.rint(opacity * colour + (1 - opacity) * background).astype(np.uint8)

    video = np.empty((FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    video[:] = BACKGROUND
    dx, dy = (SPEEDS[clip.speed] * step for step in DIRECTIONS[clip.direction])
    last = IMAGE_SIZE - size
    for t, frame in enumerate(video):
        top, left = min(max(clip.y + dy * t, 0), last), min(max(clip.x + dx * t, 0), last)
        frame[top : top + size, left : left + size] = patch
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()


def coverage(shape: str, size: int) -> Float64[np.ndarray, "size size"]:
    """Return the fraction of each pixel that a shape covers, from 4×4 samples.

    Args:
        shape: One of `SHAPES`.
        size: Width and height in pixels.
    """
    scale = 4
    coordinates = (np.arange(size * scale) + 0.5) / (size * scale)  # from 0 to 1 across the shape
    y, x = np.meshgrid(coordinates, coordinates, indexing="ij")
    if shape == "circle":
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    elif shape == "triangle":
        inside = np.abs(x - 0.5) <= y / 2
    else:
        inside = np.ones_like(x, dtype=bool)
    fractions: Float64[np.ndarray, "size size"] = inside.reshape(size, scale, size, scale).mean(axis=(1, 3))
    return fractions


def draw(held_out: bool, clips: int, seed: int) -> Iterator[tuple[ShapeClip, str]]:
    """Yield clips with captions, cycling through the combinations of a split.

    Args:
        held_out: Whether to use the held-out combinations or those to train on.
        clips: Number of clips.
        seed: Equal seeds give equal clips.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    for combination in itertools.islice(itertools.cycle(combinations(held_out)), clips):
        clip = sample_clip(combination, rng)
        yield clip, caption_of(clip, rng)


def training_captions(drawn: list[tuple[ShapeClip, str]], seed: int) -> list[list[str]]:
    """Return the captions of each training clip.

    Args:
        drawn: The clips, each with its own caption.
        seed: Equal seeds give equal captions.

    Returns:
        For each clip its own caption, those of the next clips that differ only in position, and vague ones.
    """
    rng = np.random.default_rng([seed, 2])
    groups: dict[ShapeClip, list[str]] = defaultdict(list)
    members = []  # the group of each clip, and its index there
    for clip, caption in drawn:
        group = groups[replace(clip, x=0, y=0, speed="" if clip.direction == "still" else clip.speed)]
        members.append((group, len(group)))
        group.append(caption)
    captions = []
    for (clip, _), (group, index) in zip(drawn, members, strict=True):
        shared = list(dict.fromkeys(group[index:] + group[:index]))[:SHARED]
        vague = dict.fromkeys(caption_of(clip, rng, VAGUE_TEMPLATES) for _ in range(VAGUE))
        captions.append([*shared, *vague])
    return captions


def held_out_prompts(per_combination: int, seed: int = 1) -> list[tuple[ShapeClip, str]]:
    """Return prompts for the held-out combinations, each with a clip of the attributes that a video must show."""
    return list(draw(held_out=True, clips=per_combination * len(combinations(held_out=True)), seed=seed))


def make_shapes(out: Path, train_clips: int = 3600, val_clips: int = 360, seed: int = 0, num_workers: int = 2) -> None:
    """Write the moving-shapes data set: captioned mp4 files of 64×64 pixels and 16 frames at 8 frames per second.

    Args:
        out: Folder to create, with the folders `train` and `val` (the held-out combinations).
        train_clips: Number of training clips.
        val_clips: Number of held-out clips.
        seed: Equal seeds give equal files.
        num_workers: Processes that draw and encode.
    """
    check_counts(train_clips=train_clips, val_clips=val_clips, num_workers=num_workers)
    out.mkdir(parents=True, exist_ok=True)
    for split, clips in (("train", train_clips), ("val", val_clips)):
        folder = out / split
        if is_complete(folder):
            continue
        drawn = list(draw(split == "val", clips, seed))
        captions = [[caption] for _, caption in drawn] if split == "val" else training_captions(drawn, seed)
        write_split(folder, [clip for clip, _ in drawn], captions, render, FPS, num_workers)
        print(f"{folder}: {clips} clips.")


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


if __name__ == "__main__":
    run_tool(make_shapes)
