"""Captioned Moving MNIST: handwritten digits that bounce inside the picture, as mp4 files with captions.

The task of Sync-DRAW (https://arxiv.org/abs/1611.10314), GODIVA (https://arxiv.org/abs/2104.14806) and MAGE
(https://arxiv.org/abs/2112.02815): one or two digits of 28×28 pixels on black, each moving up and down or left and
right by a tenth of its range per frame, with captions such as "digit 3 is moving up and down and digit 7 is moving left
and right".

`python -m data.examples.moving_digits runs/two_digits/clips --digits 2` draws them:

- One digit: 20 captions (10 digits × 2 motions), of which 5 are held out. Two digits: 360 captions (90 ordered pairs of
  different digits × 4 combinations of motions), of which half are held out, as in MAGE.
- The held-out captions make up `val/` and do not occur in `train/`, though each digit and each motion does. Their
  handwriting is not in `train/` either.
- A training clip has paraphrases too.

The handwriting is that of MNIST: training clips show its 60,000 training images, held-out clips its 10,000 test images.
`OUT/train` and `OUT/val` contain the mp4s and a `captions.csv` with the columns path, caption and the attributes.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from data.examples import is_complete
from data.examples.handwriting import DIGIT_SIZE, load_handwriting
from data.examples.writer import check_counts, write_split
from t2v.errors import run_tool

IMAGE_SIZE = 64
STEP = (IMAGE_SIZE - DIGIT_SIZE) / 10
"""Pixels per frame, a tenth of the range."""
FPS = 8
MOTIONS = ("up and down", "left and right")

TEMPLATES = (
    "digit {digit} is moving {motion}",
    "the digit {digit} moves {motion}",
    "a {digit} that moves {motion}",
    "{digit} is going {motion}",
)
"""The first is the literature's; held-out clips have that one only."""


@dataclass(frozen=True)
class DigitsClip:
    """Attributes of a clip; those of the second digit are -1 and "" in clips with one digit.

    Attributes:
        digit: From 0 to 9.
        motion: One of `MOTIONS`.
        second_digit: From 0 to 9, different from the first.
        second_motion: One of `MOTIONS`.
        seed: Draws handwriting, start positions and directions.
    """

    digit: int
    motion: str
    second_digit: int
    second_motion: str
    seed: int

    @property
    def parts(self) -> list[tuple[int, str]]:
        """Each digit with its motion."""
        first, second = (self.digit, self.motion), (self.second_digit, self.second_motion)
        return [first] if self.second_digit < 0 else [first, second]


def combinations(digits: Literal[1, 2], held_out: bool) -> list[tuple[tuple[int, str], ...]]:
    """Return what the captions of a split say: for each caption its digits, each with its motion.

    Args:
        digits: Digits in a clip.
        held_out: Whether to return the captions of the held-out or of the training split.
    """
    if digits == 1:
        # Every second digit lacks one motion, in turn.
        left_out = {(digit, MOTIONS[digit // 2 % 2]) for digit in range(0, 10, 2)}
        return [
            ((digit, motion),) for digit in range(10) for motion in MOTIONS if ((digit, motion) in left_out) == held_out
        ]
    pairs = [
        ((first, motion), (second, second_motion))
        for first, second in itertools.permutations(range(10), 2)
        for motion, second_motion in itertools.product(MOTIONS, repeat=2)
    ]
    order = np.random.default_rng(0).permutation(len(pairs))
    half = order[: len(pairs) // 2] if held_out else order[len(pairs) // 2 :]
    return [pairs[index] for index in sorted(half)]


def captions_of(clip: DigitsClip) -> list[str]:
    """Return the caption in the words of the literature, then its paraphrases."""
    return [
        " and ".join(template.format(digit=digit, motion=motion) for digit, motion in clip.parts)
        for template in TEMPLATES
    ]


def draw(digits: Literal[1, 2], held_out: bool, clips: int, seed: int) -> list[DigitsClip]:
    """Return clips, cycling through the captions of a split.

    Args:
        digits: Digits in a clip.
        held_out: Whether to use the held-out captions or those to train on.
        clips: Number of clips.
        seed: Equal seeds give equal clips.
    """
    rng = np.random.default_rng([seed, digits, int(held_out)])
    drawn = []
    for (digit, motion), *second in itertools.islice(itertools.cycle(combinations(digits, held_out)), clips):
        second_digit, second_motion = second[0] if second else (-1, "")
        drawn.append(DigitsClip(digit, motion, second_digit, second_motion, int(rng.integers(2**31))))
    return drawn


def render(
    clip: DigitsClip, frames: int = 16, held_out: bool = False, handwriting: Path | None = None
) -> UInt8[Tensor, "t 3 height width"]:
    """Draw a clip; where digits overlap, the brighter pixel is shown.

    Args:
        clip: The clip.
        frames: Length.
        held_out: Whether to draw the held-out handwriting.
        handwriting: As in `load_handwriting`.
    """
    written = load_handwriting(handwriting)
    images = written.held_out if held_out else written.train
    rng = np.random.default_rng(clip.seed)
    video = np.zeros((frames, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    last = IMAGE_SIZE - DIGIT_SIZE
    for digit, motion in clip.parts:
        image = images[digit][rng.integers(len(images[digit]))]
        start = rng.uniform(0, last, 2)
        travel = np.arange(frames) * STEP * rng.choice([-1, 1])
        moving = MOTIONS.index(motion)  # the rows or the columns
        for frame, distance in zip(video, travel, strict=True):
            position = start.copy()
            position[moving] = last - abs((start[moving] + distance) % (2 * last) - last)  # reflected at both ends
            top, left = np.rint(position).astype(int)
            place = frame[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE]
            np.maximum(place, image, out=place)
    return torch.from_numpy(video)[:, None].repeat(1, 3, 1, 1)


def make_digits(
    out: Path,
    digits: Literal[1, 2] = 1,
    frames: int = 16,
    train_clips: int = 20000,
    val_clips: int = 360,
    seed: int = 0,
    num_workers: int = 2,
    handwriting: Path | None = None,
) -> None:
    """Write captioned Moving MNIST: mp4 files of 64×64 pixels at 8 frames per second.

    Args:
        out: Folder to create, with the folders `train` and `val` (held-out captions in held-out handwriting).
        digits: Digits in a clip.
        frames: Length of a clip.
        train_clips: Number of training clips.
        val_clips: Number of held-out clips.
        seed: Equal seeds give equal files.
        num_workers: Processes that draw and encode.
        handwriting: Folder that contains the four unpacked files of MNIST, or of other digits in its format, at any
            depth; by default MNIST is fetched once.
    """
    check_counts(frames=frames, train_clips=train_clips, val_clips=val_clips, num_workers=num_workers)
    load_handwriting(handwriting)
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_clips), ("val", val_clips)):
        folder, held_out = out / split, split == "val"
        if is_complete(folder):
            continue
        clips = draw(digits, held_out, count, seed)
        captions = [captions_of(clip)[:1] if held_out else captions_of(clip) for clip in clips]
        draw_clip = partial(render, frames=frames, held_out=held_out, handwriting=handwriting)
        write_split(folder, clips, captions, draw_clip, FPS, num_workers)
        print(f"{folder}: {count} clips.")


if __name__ == "__main__":
    run_tool(make_digits)
