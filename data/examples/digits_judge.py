"""The judge of the moving digits: a detector of digits, trained on real frames only, and a tracker.

The detector is a small convolutional network that gives, for each digit, a map of where its centre is. It never sees a
generated frame, a caption or held-out handwriting. The digit with the largest response, averaged over the frames, is
that of the clip (with two digits, the two largest); its motion is the axis along which its place varies more.

`python -m data.examples.digits_judge runs/digits/clips/val` prints its accuracy on real held-out clips.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.examples.handwriting import DIGIT_SIZE, load_handwriting
from data.examples.judge import ClipJudge
from data.examples.moving_digits import IMAGE_SIZE, MOTIONS
from t2v.errors import UserError, run_tool
from t2v.files import atomic_path
from t2v.video import probe, read_frames

CELL = 4
"""Pixels between neighbouring places of the map of centres."""
_BATCH = 32


class DigitsJudge(ClipJudge):
    """Names the digits of a clip, in ascending order, and the motion of each.

    Args:
        weights: File of the detector's weights; trained and written if it does not exist.
        digits: Digits in a clip.
        handwriting: As in `data.examples.moving_digits`.
        steps: Training steps of the detector, each of 32 frames.
    """

    def __init__(
        self, weights: str, digits: Literal[1, 2] = 1, handwriting: str | None = None, steps: int = 3000
    ) -> None:
        if steps < 1:
            raise UserError(f"steps={steps} of the judge must be at least 1.")
        self.weights, self.digits, self.steps = Path(weights), digits, steps
        self.handwriting = None if handwriting is None else Path(handwriting)
        with torch.random.fork_rng(devices=[]):  # the judge takes no random numbers of the run
            torch.manual_seed(0)
            self._detector = _build()

    def prepare(self) -> None:
        """Read the detector's weights, or train it on real frames.

        Raises:
            UserError: If the file has other weights, or the handwriting is missing.
        """
        if not self.weights.exists():
            print(f"Training the judge of digits on real frames; its weights will be in {self.weights}", flush=True)
            self._train()
            self.weights.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.weights) as partial:
                save_file(self._detector.state_dict(), partial)
        try:
            self._detector.load_state_dict(load_file(self.weights))
        except Exception as error:  # a damaged file, or one of another network
            raise UserError(f"{self.weights} has not the weights of the judge of digits: delete it.") from error
        self._detector.requires_grad_(False).eval()

    def recognize(self, video: UInt8[Tensor, "t 3 height width"]) -> dict[str, str]:
        frames = video.float().mean(1, keepdim=True) / 255
        if frames.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            frames = F.interpolate(frames, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        maps = self._detector(frames).sigmoid()
        found = sorted(maps.amax((2, 3)).mean(0).topk(self.digits).indices.tolist())
        return _name([(digit, _motion(maps[:, digit])) for digit in found])

    def truth(self, metadata: Mapping[str, Any]) -> dict[str, str]:
        prefixes = ["", "second_"][: self.digits]
        try:
            parts = [(int(metadata[f"{prefix}digit"]), str(metadata[f"{prefix}motion"])) for prefix in prefixes]
        except KeyError as error:
            raise UserError(
                f"A clip's metadata has no {error}: the judge needs clips that `python -m data.examples.moving_digits "
                f"OUT --digits {self.digits}` wrote."
            ) from None
        if (int(metadata.get("second_digit", -1)) >= 0) != (self.digits == 2):
            raise UserError(
                f"The clips have {3 - self.digits} digit(s), but the judge is told digits={self.digits}: correct it."
            )
        return _name(sorted(parts))

    def _train(self) -> None:
        """Train the detector by binary cross-entropy to Gaussians around the centres of the digits."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            self._detector.train()
            optimizer = torch.optim.AdamW(self._detector.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=self.steps)
            for frames, targets in _frames(self.steps, self.handwriting):
                logits = self._detector(frames)
                weight = 1 + 20 * targets
                loss = F.binary_cross_entropy_with_logits(logits, targets, weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def _build() -> nn.Sequential:
    """Return the detector: a frame in, ten maps out, each place of which sees 37 pixels around it."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(
            layer
            for _ in range(3)
            for layer in (nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        ),
        nn.Conv2d(32, 10, 1),
    )


def _frames(
    steps: int, handwriting: Path | None
) -> Iterator[tuple[Float[Tensor, "n 1 height width"], Float[Tensor, "n 10 h w"]]]:
    """Yield batches of real frames with one or two digits of the training handwriting, and their maps of centres."""
    images = load_handwriting(handwriting).train
    rng, grid = np.random.default_rng(0), IMAGE_SIZE // CELL
    places = (np.arange(grid) + 0.5) * CELL
    for _ in range(steps):
        frames = np.zeros((_BATCH, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        targets = np.zeros((_BATCH, 10, grid, grid), dtype=np.float32)
        for frame, target in zip(frames, targets, strict=True):
            for digit in rng.permutation(10)[: rng.integers(1, 3)]:
                top, left = rng.integers(0, IMAGE_SIZE - DIGIT_SIZE + 1, 2)
                place = frame[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE]
                np.maximum(place, images[digit][rng.integers(len(images[digit]))], out=place)
                rows, columns = (np.square(places - (start + DIGIT_SIZE / 2)) for start in (top, left))
                target[digit] = np.exp(-(rows[:, None] + columns[None]) / (2 * CELL**2))
        yield torch.from_numpy(frames)[:, None].float() / 255, torch.from_numpy(targets)


def _motion(maps: Float[Tensor, "t h w"]) -> str:
    """Return the axis along which the place of the largest response varies more, each frame by its certainty."""
    weights, index = maps.flatten(1).max(1)
    places = torch.stack([index // maps.shape[2], index % maps.shape[2]], 1).double()  # rows, columns
    weights = weights.double()[:, None] / weights.sum().clamp(min=1e-9)
    mean = (weights * places).sum(0)
    return MOTIONS[int((weights * (places - mean).square()).sum(0).argmax())]


def _name(parts: list[tuple[int, str]]) -> dict[str, str]:
    return {
        "digits": " ".join(str(digit) for digit, _ in parts),
        "motions": ", ".join(motion for _, motion in parts),
    }


def print_accuracy(
    clips: Path,
    digits: Literal[1, 2] = 1,
    weights: Path = Path("runs/digits/judge.safetensors"),
    handwriting: Path | None = None,
    steps: int = 3000,
) -> None:
    """Print the accuracy of the judge on a folder of real clips.

    Args:
        clips: Folder written by `data.examples.moving_digits`, such as `runs/digits/clips/val`.
        digits: Digits in a clip.
        weights: File of the detector's weights; trained and written if it does not exist.
        handwriting: As in `data.examples.moving_digits`.
        steps: Training steps of the detector.
    """
    table = clips / "captions.csv"
    if not table.is_file():
        raise UserError(f"'{table}' does not exist: give a folder that `python -m data.examples.moving_digits` wrote.")
    judge = DigitsJudge(str(weights), digits, None if handwriting is None else str(handwriting), steps)
    judge.prepare()
    with table.open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    if not rows:
        raise UserError(f"'{table}' has no clips: give a folder that `python -m data.examples.moving_digits` wrote.")
    videos = {path: read_frames(clips / path, range(probe(clips / path).frames)) for path in rows}
    pairs = [(judge.recognize(video), judge.truth(rows[path])) for path, video in videos.items()]
    for name in ("digits", "motions"):
        correct = sum(answer[name] == truth[name] for answer, truth in pairs)
        print(f"{name}: {correct} of {len(pairs)} right ({correct / len(pairs):.1%}).")


if __name__ == "__main__":
    run_tool(print_accuracy)
