"""Map-style data sets over shards: what a place of the plan becomes.

Every random choice comes from the place's own generator (`Draw.rng`), so that a sample does not depend on the worker
that made it. A broken clip costs that clip alone: training and validation take another in its place, chosen by the same
generator, and a warning names it once.
"""

import io
import json
import re
import warnings
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.plan import Draw
from data.shards import Sample, ShardSet
from t2v.batch import TextEmbedding, TokenBatch, VideoBatch
from t2v.errors import UserError
from t2v.video import read_frames, resize_and_crop

_ATTEMPTS = 8
"""So many broken clips for one place of the plan, and the run stops."""
_SIDED = re.compile(r"\b(left|right)(wards?|most|hand|handed)?\b", re.IGNORECASE)
"""What a caption says of a clip that is no longer true of its mirror image."""


class VideoClip(NamedTuple):
    """One clip of a `VideoBatch`."""

    video: UInt8[Tensor, "t c h w"]
    caption: str
    key: str


class TokenClip(NamedTuple):
    """One clip of a `TokenBatch`."""

    tokens: Int[Tensor, "t h w"]
    text: Float[Tensor, "l d"]
    pooled: Float[Tensor, "d"]
    caption: str
    key: str


class Clips(Dataset):
    """Clips of a set of shards; the base of `VideoClips` and `TokenClips`.

    Args:
        shards: the shards.
        member: the member without which a sample is no clip.
        frames: clips shorter than this are left out.
        fps: frames a second at which `frames` counts; none where clips are taken as they are stored.

    Attributes:
        samples: the clips that are long enough.
        broken: for each of them, whether it turned out not to decode; shared by all workers.

    Raises:
        UserError: where no clip is left.
    """

    def __init__(self, shards: ShardSet, member: str, frames: int, fps: float | None = None) -> None:
        self.shards, self.frames, self.fps = shards, frames, fps
        clips = [sample for sample in shards.samples if member in sample.members]
        if not clips:
            found = sorted({name for sample in shards.samples for name in sample.members})
            raise UserError(
                f"No sample in '{shards.path}' has a {member}; they have {', '.join(found) or 'nothing'}: "
                "are these the shards of the other stage?"
            )
        unreadable = [sample for sample in clips if sample.frames == 0]
        readable = [sample for sample in clips if sample.frames]
        self.samples = [sample for sample in readable if self.length(sample) >= frames]
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        for sample in unreadable:
            _warn_broken(sample, f"its {member} does not decode")
        if short := len(readable) - len(self.samples):
            longest = max(self.length(sample) for sample in readable)
            rate = f" at {fps:g} fps" if fps else ""
            if not self.samples:
                raise UserError(
                    f"All {short} clips in '{shards.path}' are shorter than {frames} frames{rate} (the longest has "
                    f"{longest}): lower data.frames{' or raise data.fps' if fps else ''}, or prepare longer clips."
                )
            message = (
                f"{short} of {len(clips)} clips in '{shards.path}' are left out: shorter than {frames} frames{rate}."
            )
            warnings.warn(message, stacklevel=2)
        if not self.samples:
            raise UserError(f"None of the {len(clips)} clips in '{shards.path}' decodes: make the shards again.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> Any:
        index = draw.sample
        for attempt in range(_ATTEMPTS):
            rng = draw.rng(attempt)
            if attempt:
                index = int(rng.integers(len(self)))
            if (clip := self.load(index, rng)) is not None:
                return clip
        raise UserError(
            f"{_ATTEMPTS} clips in a row from '{self.shards.path}' do not decode, {int(self.broken.sum())} of "
            f"{len(self)} so far: make the shards again from intact footage."
        )

    @property
    def shard_sizes(self) -> list[int]:
        """Number of clips in each shard, for the plan."""
        return [len(list(clips)) for _, clips in groupby(self.samples, lambda sample: sample.shard)]

    def length(self, sample: Sample) -> int:
        """Frames of a clip at the rate it is taken at."""
        return int(np.ceil((sample.frames - 0.5) / self.stride(sample)))

    def stride(self, sample: Sample) -> float:
        """Stored frames from one wanted frame to the next."""
        return sample.fps / self.fps if self.fps else 1.0

    def load(self, index: int, rng: np.random.Generator | None) -> Any:
        """One clip: a random window with a generator, all of it without; None where it is broken."""
        if not self.broken[index]:
            try:
                return self._load(self.samples[index], rng)
            except (ValueError, EOFError) as error:
                self.broken[index] = True
                _warn_broken(self.samples[index], error)
        return None

    def _load(self, sample: Sample, rng: np.random.Generator | None) -> Any:
        raise NotImplementedError

    def _window(self, sample: Sample, rng: np.random.Generator | None) -> Int[np.ndarray, "t"]:
        """Which stored frames to take: those nearest in time to the wanted ones."""
        length = self.frames if rng is not None else self.length(sample)
        window = np.floor(np.arange(length) * self.stride(sample) + 0.5).astype(np.int64)
        return window if rng is None else window + rng.integers(sample.frames - window[-1])


class VideoClips(Clips):
    """Clips of footage.

    Args:
        shards: shards with mp4 and, if there is one, txt.
        size: height and width in pixels.
        frames: length of a clip.
        fps: frames a second to take; the footage may have another rate.
        crop: with less than 1, a random clip shows a random square of the footage, whose side is at least this share
            of the shorter side; with 1, and of a whole clip, the largest square in the centre.
        flip: mirror half of the random clips, but none whose caption speaks of left or right.
    """

    def __init__(
        self, shards: ShardSet, size: int, frames: int, fps: float, crop: float = 1.0, flip: bool = False
    ) -> None:
        super().__init__(shards, "mp4", frames, fps)
        self.size, self.crop, self.flip = size, crop, flip
        smallest = round(crop * min(min(sample.height, sample.width) for sample in self.samples))
        if crop < 1 and smallest < size:
            warnings.warn(
                f"data.crop={crop:g} cuts windows of down to {smallest} pixels out of '{shards.path}', which are "
                f"enlarged to data.size={size}: prepare shards with --size {2 * int(np.ceil(size / crop / 2))}.",
                stacklevel=2,
            )

    def _load(self, sample: Sample, rng: np.random.Generator | None) -> VideoClip:
        members = self.shards.read(sample, "mp4", "txt")
        caption = members.get("txt", b"").decode().strip()
        video = read_frames(members["mp4"], self._window(sample, rng).tolist())
        if self.crop < 1 and rng is not None:
            video = _random_square(video, self.crop, rng)
        video = resize_and_crop(video, self.size)
        if self.flip and rng is not None and rng.random() < 0.5 and not _SIDED.search(caption):
            video = video.flip(-1)
        return VideoClip(video, caption, sample.key)


class TokenClips(Clips):
    """Tokenised clips with the embeddings of their captions.

    Args:
        shards: shards with tokens.npy, text.npy, pooled.npy and json.
        frames: length of a clip; a random window is taken where one is longer.
    """

    def __init__(self, shards: ShardSet, frames: int) -> None:
        super().__init__(shards, "tokens.npy", frames)

    def _load(self, sample: Sample, rng: np.random.Generator | None) -> TokenClip:
        members = self.shards.read(sample, "tokens.npy", "text.npy", "pooled.npy", "json")
        if missing := {"text.npy", "pooled.npy", "json"} - members.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        tokens = torch.from_numpy(_array(members["tokens.npy"])[self._window(sample, rng)].astype(np.int64))
        text, pooled = (
            torch.from_numpy(_array(members[name]).astype(np.float32)) for name in ("text.npy", "pooled.npy")
        )
        return TokenClip(tokens, text, pooled, json.loads(members["json"]).get("caption", ""), sample.key)


class WholeClips(Dataset):
    """Batches of whole clips, shard after shard: clips of a shard that are equally long share a batch.

    Args:
        clips: the clips.
        frames: most frames in a batch; a longer clip is a batch alone.
        ranks: into how many equal shares the batches are to be dealt; the last may be empty.
    """

    def __init__(self, clips: VideoClips, frames: int, ranks: int = 1) -> None:
        self.clips = clips
        alike: dict[tuple[str, int], list[int]] = {}
        for index, sample in enumerate(clips.samples):
            alike.setdefault((sample.shard, clips.length(sample)), []).append(index)
        self.batches: list[list[int]] = []
        for (_, length), indices in alike.items():
            most = max(1, frames // length)
            self.batches += [indices[at : at + most] for at in range(0, len(indices), most)]
        self.batches += [[] for _ in range(-len(self.batches) % ranks)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> VideoBatch | None:
        """One batch, without its broken clips; None where no clip is left."""
        clips = [clip for index in self.batches[number] if (clip := self.clips.load(index, rng=None)) is not None]
        return collate_video(clips) if clips else None


def collate_video(clips: list[VideoClip]) -> VideoBatch:
    """Clips of equal length as one batch."""
    videos, captions, keys = zip(*clips, strict=True)
    return VideoBatch(torch.stack(videos), list(captions), list(keys))


def collate_tokens(clips: list[TokenClip]) -> TokenBatch:
    """Clips as one batch; shorter captions are padded with zeros, which the mask tells apart."""
    tokens, texts, pooled, captions, keys = zip(*clips, strict=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    text = TextEmbedding(pad_sequence(list(texts), batch_first=True), mask, torch.stack(pooled))
    return TokenBatch(torch.stack(tokens), text, list(captions), list(keys))


def _random_square(
    video: UInt8[Tensor, "t c h w"], least: float, rng: np.random.Generator
) -> UInt8[Tensor, "t c side side"]:
    """The same square of every frame; its side is at least that share of the shorter one."""
    height, width = video.shape[-2:]
    side = max(1, round(min(height, width) * rng.uniform(least, 1)))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return video[..., top : top + side, left : left + side]


def _array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _warn_broken(sample: Sample, reason: object) -> None:
    warnings.warn(f"Clip {sample.key} in {sample.shard} is broken and left out: {reason}", stacklevel=3)
