"""Moving shapes: the embedded data set, as real mp4 files with captions.

`python -m data.examples.shapes runs/demo/clips` draws clips of one coloured shape on a dark ground that stands still,
or moves by whole pixels until it meets the edge of the picture, where it rests:

- 6 colours × 3 shapes × 5 motions (left, right, up, down, still) × 2 sizes × 2 speeds, setting out from random places
  on a lattice of 4 pixels, with at least 28 pixels to go;
- 18 of the 90 (colour, shape, motion) combinations are **held out**: they make up `val/` and never appear in `train/`,
  though each colour, shape and motion does. What a model does on them shows whether it understood the caption;
- captions follow the templates below, such as "a small red circle moves left slowly", with paraphrases a person would
  type. Size and speed are not always said;
- a clip to train on has several captions: those of other clips that show the same, as one that tells a clip from all
  others is learnt by heart, and some that leave out more, such as "something moves left", so that what each word means
  is learnt apart from the others.

`OUT/train` and `OUT/val` hold the mp4s and a `captions.csv` with the columns path, caption and the attributes; every
caption is a row.
"""

import csv
import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from t2v.errors import UserError
from t2v.video import write_mp4

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
"""Pixels a frame."""
LATTICE = 4
"""Shapes set out from places whose coordinates are multiples of this."""
ROOM = 28
"""Least number of pixels between a moving shape and the edge it moves to."""
SHARED, VAGUE = 4, 4
"""Most captions that a clip to train on has: like its own, and that leave out its colour or shape."""

SHAPE_WORDS = {"circle": ("circle", "circle", "disc", "ball"), "square": ("square",), "triangle": ("triangle",)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SPEED_WORDS = {"slow": ("slowly", "at low speed", "gently"), "fast": ("fast", "quickly", "rapidly")}
DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftwards", "towards the left"),
    "right": ("right", "to the right", "rightwards", "towards the right"),
    "up": ("up", "upwards", "to the top", "towards the top"),
    "down": ("down", "downwards", "to the bottom", "towards the bottom"),
}
VERBS = (
    ("moves", "moving"),
    ("goes", "going"),
    ("slides", "sliding"),
    ("travels", "travelling"),
    ("drifts", "drifting"),
)
STILL_WORDS = (
    ("stays still", "staying still"),
    ("stands still", "standing still"),
    ("does not move", "not moving"),
    ("rests in place", "resting in place"),
    ("stays where it is", "staying where it is"),
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
    """What one clip shows; `x` and `y` are the pixel of the shape's upper left corner in the first frame."""

    colour: str
    shape: str
    direction: str
    size: str
    speed: str
    x: int
    y: int


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """The (colour, shape, direction) triples of the held-out part, or of the training part.

    Each colour, shape and direction appears in both parts; each (colour, shape) pair lacks one direction in training.
    """
    triples = itertools.product(enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS))
    return [(c, s, d) for (i, c), (j, s), (k, d) in triples if ((i + 2 * j + k) % 5 == 0) == held_out]


def sample_clip(combination: tuple[str, str, str], rng: np.random.Generator) -> ShapeClip:
    """Draws size, speed and a place with room to move."""
    colour, shape, direction = combination
    size, speed = str(rng.choice(list(SIZES))), str(rng.choice(list(SPEEDS)))
    last, start = IMAGE_SIZE - SIZES[size], []
    for step in DIRECTIONS[direction]:
        low, high = (ROOM if step < 0 else 0), (last - ROOM if step > 0 else last)
        start.append(LATTICE * int(rng.integers(low // LATTICE, high // LATTICE + 1)))
    return ShapeClip(colour, shape, direction, size, speed, *start)


def caption_of(clip: ShapeClip, rng: np.random.Generator, templates: Sequence[str] = TEMPLATES) -> str:
    """One caption out of the templates."""

    def pick(words):
        return words[int(rng.integers(len(words)))]

    if clip.direction == "still":
        does, doing = pick(STILL_WORDS)
        speed = ""
    else:
        verbs, where = pick(VERBS), pick(DIRECTION_WORDS[clip.direction])
        does, doing = (f"{verb} {where}" for verb in verbs)
        speed = pick(SPEED_WORDS[clip.speed])
    text = pick(templates).format(
        size=pick(SIZE_WORDS[clip.size]),
        colour=clip.colour,
        shape=pick(SHAPE_WORDS[clip.shape]),
        does=does,
        doing=doing,
        speed=speed,
    )
    return " ".join(text.split())


def render(clip: ShapeClip) -> UInt8[Tensor, "t 3 h w"]:
    """Draws the clip with anti-aliased edges (4×4 samples a pixel)."""
    scale, size = 4, SIZES[clip.size]
    place = (np.arange(size * scale) + 0.5) / (size * scale)  # 0…1 across the shape
    y, x = np.meshgrid(place, place, indexing="ij")
    if clip.shape == "circle":
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    elif clip.shape == "triangle":
        inside = np.abs(x - 0.5) <= y / 2
    else:
        inside = np.ones_like(x, dtype=bool)
    cover = inside.reshape(size, scale, size, scale).mean(axis=(1, 3))[..., None]

    video = np.empty((FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    video[:] = BACKGROUND
    patch = np.rint(cover * np.array(COLOURS[clip.colour]) + (1 - cover) * np.array(BACKGROUND)).astype(np.uint8)
    dx, dy = (SPEEDS[clip.speed] * step for step in DIRECTIONS[clip.direction])
    last = IMAGE_SIZE - size
    for t, frame in enumerate(video):
        top, left = min(max(clip.y + dy * t, 0), last), min(max(clip.x + dx * t, 0), last)
        frame[top : top + size, left : left + size] = patch
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()


def draw(held_out: bool, clips: int, seed: int) -> Iterator[tuple[ShapeClip, str]]:
    """Clips and captions of one part, its combinations taking turns."""
    rng = np.random.default_rng([seed, int(held_out)])
    for combination in itertools.islice(itertools.cycle(combinations(held_out)), clips):
        clip = sample_clip(combination, rng)
        yield clip, caption_of(clip, rng)


def training_captions(drawn: list[tuple[ShapeClip, str]], seed: int) -> list[list[str]]:
    """Each clip's own caption, those of the next clips that show the same from another place, and vague ones."""
    rng = np.random.default_rng([seed, 2])
    alike: dict[ShapeClip, list[str]] = defaultdict(list)
    places = []
    for clip, caption in drawn:
        kind = alike[replace(clip, x=0, y=0, speed="" if clip.direction == "still" else clip.speed)]
        places.append((kind, len(kind)))
        kind.append(caption)
    captions = []
    for (clip, _), (kind, at) in zip(drawn, places, strict=True):
        shared = list(dict.fromkeys(kind[at:] + kind[:at]))[:SHARED]
        vague = dict.fromkeys(caption_of(clip, rng, VAGUE_TEMPLATES) for _ in range(VAGUE))
        captions.append([*shared, *vague])
    return captions


def held_out_prompts(per_combination: int, seed: int = 1) -> list[tuple[ShapeClip, str]]:
    """Prompts for the held-out combinations, with what a video of each must show."""
    return list(draw(held_out=True, clips=per_combination * len(combinations(held_out=True)), seed=seed))


def _write(job: tuple[Path, ShapeClip]) -> None:
    path, clip = job
    write_mp4(path, render(clip), fps=FPS)


def make_shapes(out: Path, train_clips: int = 3600, val_clips: int = 360, seed: int = 0, num_workers: int = 2) -> None:
    """Writes the moving-shapes data set: captioned mp4 files, 64×64 pixels, 16 frames at 8 frames a second.

    Args:
        out: folder to make; `train` and `val` (the held-out combinations) lie in it.
        train_clips: number of training clips.
        val_clips: number of held-out clips.
        seed: the same seed gives the same files.
        num_workers: processes that draw and encode.
    """
    if min(train_clips, val_clips, num_workers) < 1:
        raise UserError(
            f"train_clips={train_clips}, val_clips={val_clips} and num_workers={num_workers} must all be at least 1."
        )
    for part, clips in (("train", train_clips), ("val", val_clips)):
        folder = out / part
        if (folder / "captions.csv").exists():
            print(f"{folder} is complete already: nothing to do.")
            continue
        partial = out / f"{part}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if folder.exists():
            raise UserError(
                f"{folder} exists but holds no captions.csv: it is not ours to replace; choose another folder."
            )
        drawn = list(draw(part == "val", clips, seed))
        captions = [[caption] for _, caption in drawn] if part == "val" else training_captions(drawn, seed)
        jobs = [(partial / f"{i:06d}.mp4", clip) for i, (clip, _) in enumerate(drawn)]
        with get_context("spawn").Pool(num_workers) as pool:
            done = pool.imap_unordered(_write, jobs, chunksize=16)
            for _ in tqdm(done, total=len(jobs), desc=f"drawing {part}", unit="clip"):
                pass
        with (partial / "captions.csv").open("w", newline="") as file:
            columns = ["path", "caption", *(field.name for field in fields(ShapeClip))]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for (path, clip), texts in zip(jobs, captions, strict=True):
                writer.writerows({"path": path.name, "caption": text, **asdict(clip)} for text in texts)
        partial.rename(folder)
        print(f"{folder}: {clips} clips.")


if __name__ == "__main__":
    from t2v.errors import run_tool

    run_tool(make_shapes)
