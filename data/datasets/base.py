"""Map-style data sets over shards: what a place of the plan becomes.

Every random choice comes from the place's own generator (`Draw.rng`), so that a sample does not depend on the worker
that made it. A broken clip costs that clip alone: training and validation take another in its place, chosen by the same
generator, and a warning names it once.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.plan import Batch, Bucket, Draw
from data.shards import BadSample, Sample, ShardSet
from t2v.batch import TextEmbedding, TokenBatch, VideoBatch
from t2v.errors import UserError
from t2v.video import read_frames, resize_and_crop

_ATTEMPTS = 8
"""So many broken clips for one place of the plan, and the run stops."""
_SIDED = re.compile(r"\b(left|right)(wards?|most|hand|handed)?\b", re.IGNORECASE)
"""What a caption says of a clip that is no longer true of its mirror image."""
_NPY = b"\x93NUMPY\x01\x00"
"""What an npy file of the usual version begins with."""


class VideoClip(NamedTuple):
    """One clip of a `VideoBatch`."""

    video: UInt8[Tensor, "t c h w"]
    captions: list[str]
    key: str


class TokenClip(NamedTuple):
    """One clip of a `TokenBatch`."""

    tokens: Int[Tensor, "t h w"]
    text: Float[Tensor, "l d"]
    pooled: Float[Tensor, "d"]
    caption: str
    key: str


class Clips(Dataset):
    """Clips of a set of shards, a batch of the plan at a time; the base of `VideoClips` and `TokenClips`.

    Args:
        shards: the shards.
        member: the member without which a sample is no clip.
        buckets: what the clips of a batch have in common; a clip too short for all of them is left out.
        fps: frames a second at which a bucket's `frames` count; none where clips are taken as they are stored.
        bad_samples: a file to which a line is added for each sample that cannot be used: key, shard and reason. Those
            it names already are not added again.

    Attributes:
        samples: the clips that are long enough.
        bad: the samples of which is known from the index alone that they cannot be used.
        broken: for each of `samples`, whether it turned out not to decode; shared by all workers.
        failures: how often that happened since somebody set it to 0, with the clips that are known to be broken; shared
            by all workers.

    Raises:
        UserError: where no clip is left.
    """

    collate: Callable[[list[Any]], Any]

    def __init__(
        self,
        shards: ShardSet,
        member: str,
        buckets: Sequence[Bucket],
        fps: float | None = None,
        bad_samples: Path | None = None,
    ) -> None:
        self.shards, self.buckets, self.fps, self.bad_samples = shards, buckets, fps, bad_samples
        clips = [sample for sample in shards.samples if member in sample.members]
        if not clips:
            found = sorted({name for sample in shards.samples for name in sample.members})
            raise UserError(
                f"No sample in '{shards.path}' has a {member}; they have {', '.join(found) or 'nothing'}: "
                "are these the shards of the other stage?"
            )
        needed = [name for name in self._needed if any(name in sample.members for sample in clips)]
        self.bad = list(shards.bad)
        readable = []
        for sample in clips:
            if missing := [name for name in needed if name not in sample.members]:
                self.bad.append(BadSample(sample.key, sample.shard, f"it has no {' and no '.join(missing)}"))
            elif not sample.frames:
                self.bad.append(BadSample(sample.key, sample.shard, f"its {member} does not decode: {sample.reason}"))
            else:
                readable.append(sample)
        frames = min(bucket.frames for bucket in buckets)
        self.samples = [sample for sample in readable if self.length(sample) >= frames]
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self.failures = torch.zeros((), dtype=torch.int64).share_memory_()
        if self.bad:
            first = self.bad[0]
            warnings.warn(
                f"{len(self.bad)} samples in '{shards.path}' cannot be used and are left out, such as '{first.key}' in "
                f"{first.shard}: {first.reason}.",
                stacklevel=2,
            )
        self._list(*self.bad)
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

    def __getitem__(self, batch: Batch) -> Any:
        rngs = [draw.rng() for draw in batch.draws]  # in a row: between two decodings all code and data is out of cache
        drawn = zip(batch.draws, rngs, strict=True)
        return type(self).collate([self._draw(draw, self.buckets[batch.bucket], rng) for draw, rng in drawn])

    @property
    def shard_sizes(self) -> list[int]:
        """Number of clips in each shard, for the plan."""
        return [len(list(clips)) for _, clips in groupby(self.samples, lambda sample: sample.shard)]

    @property
    def fits(self) -> Bool[np.ndarray, "samples buckets"]:
        """Whether a clip is long enough for a bucket, for the plan."""
        lengths = np.array([self.length(sample) for sample in self.samples])
        return lengths[:, None] >= np.array([bucket.frames for bucket in self.buckets])

    def length(self, sample: Sample) -> int:
        """Frames of a clip at the rate it is taken at."""
        return int(np.ceil((sample.frames - 0.5) / self.stride(sample)))

    @property
    def batch_bytes(self) -> int:
        """Size of the largest batch in bytes, or a little more."""
        raise NotImplementedError

    def stride(self, sample: Sample) -> float:
        """Stored frames from one wanted frame to the next."""
        return sample.fps / self.fps if self.fps else 1.0

    def load(self, index: int, bucket: Bucket, rng: np.random.Generator | None) -> Any:
        """One clip: a random window with a generator, all of it without; None where it is broken."""
        if not self.broken[index]:
            sample = self.samples[index]
            try:
                return self._load(sample, bucket, rng)
            except (ValueError, EOFError) as error:
                self.broken[index] = True
                warnings.warn(f"Clip {sample.key} in {sample.shard} is broken and left out: {error}", stacklevel=2)
                self._list(BadSample(sample.key, sample.shard, str(error)))
        self.failures += 1
        return None

    @property
    def _needed(self) -> Sequence[str]:
        """Members that a clip must have where any clip has them."""
        raise NotImplementedError

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> Any:
        raise NotImplementedError

    def _draw(self, draw: Draw, bucket: Bucket, rng: np.random.Generator) -> Any:
        """The clip at a place of the plan, or another long enough where it is broken."""
        index, length = draw.sample, bucket.frames
        for attempt in range(_ATTEMPTS):
            rng = draw.rng(attempt) if attempt else rng
            while attempt and self.length(self.samples[index := int(rng.integers(len(self)))]) < length:
                continue
            if (clip := self.load(index, bucket, rng)) is not None:
                return clip
        raise UserError(
            f"{_ATTEMPTS} clips in a row from '{self.shards.path}' do not decode, {int(self.broken.sum())} of "
            f"{len(self)} so far: make the shards again from intact footage."
        )

    def _window(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> Int[np.ndarray, "t"]:
        """Which stored frames to take: those nearest in time to the wanted ones."""
        length = bucket.frames if rng is not None else self.length(sample)
        window = np.floor(np.arange(length) * self.stride(sample) + 0.5).astype(np.int64)
        if rng is None or bucket.start == "first":
            return window
        return window + rng.integers(sample.frames - window[-1])

    def _list(self, *samples: BadSample) -> None:
        """Add samples that cannot be used to the file."""
        if self.bad_samples is None or not samples:
            return
        self.bad_samples.parent.mkdir(parents=True, exist_ok=True)
        listed = self.bad_samples.read_text().splitlines() if self.bad_samples.exists() else []
        lines = [json.dumps(sample._asdict()) for sample in samples]
        with self.bad_samples.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines if line not in listed))


class VideoClips(Clips):
    """Clips of footage.

    Args:
        shards: shards with mp4 and, if there is one, txt.
        buckets: length, height and width of the clips.
        fps: frames a second to take; the footage may have another rate.
        crop: with less than 1, a random clip shows a random window of the footage, whose sides are at least this share
            of the largest such window; with 1, and of a whole clip, the largest window in the centre.
        flip: mirror half of the random clips, but none whose caption speaks of left or right.
        bad_samples: see `Clips`.
    """

    _needed = ("txt",)

    def __init__(
        self,
        shards: ShardSet,
        buckets: Sequence[Bucket],
        fps: float,
        crop: float = 1.0,
        flip: bool = False,
        bad_samples: Path | None = None,
    ) -> None:
        super().__init__(shards, "mp4", buckets, fps, bad_samples)
        self.crop, self.flip = crop, flip
        size = max(min(_size(bucket)) for bucket in buckets)
        smallest = round(crop * min(min(sample.height, sample.width) for sample in self.samples))
        if crop < 1 and smallest < size:
            warnings.warn(
                f"data.crop={crop:g} cuts windows of down to {smallest} pixels out of '{shards.path}', which are "
                f"enlarged to data.size={size}: prepare shards with --size {2 * int(np.ceil(size / crop / 2))}.",
                stacklevel=2,
            )

    @staticmethod
    def collate(clips: list[VideoClip]) -> VideoBatch:
        """Clips of equal length as one batch, whose colours lie side by side as they were decoded."""
        videos, captions, keys = zip(*clips, strict=True)
        video = torch.stack([rearrange(video, "t c h w -> t h w c") for video in videos])
        return VideoBatch(rearrange(video, "b t h w c -> b t c h w"), list(captions), list(keys))

    @property
    def batch_bytes(self) -> int:
        """Size of the largest batch in bytes."""
        return max(bucket.batch_size * bucket.frames * 3 * math.prod(_size(bucket)) for bucket in self.buckets)

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> VideoClip:
        members = self.shards.read(sample, "mp4", "txt", "json")
        captions = _captions(members)
        window = self._window(sample, bucket, rng)
        cut = partial(resize_and_crop, size=_size(bucket))
        if self.crop < 1 and rng is not None:
            cut = partial(_cut, size=_size(bucket), share=rng.uniform(self.crop, 1), place=rng.random(2))
        video = read_frames(members["mp4"], window.tolist(), transform=cut)
        sided = any(_SIDED.search(caption) for caption in captions)
        if self.flip and rng is not None and rng.random() < 0.5 and not sided:
            video = video.flip(-1)
        return VideoClip(video, captions, sample.key)


class TokenClips(Clips):
    """Tokenised clips with the embeddings of their captions.

    Args:
        shards: shards with tokens.npy, text.npy, pooled.npy and json.
        buckets: length of the clips; a random window is taken where one is longer.
        bad_samples: see `Clips`.
    """

    _needed = ("text.npy", "pooled.npy", "json")

    def __init__(self, shards: ShardSet, buckets: Sequence[Bucket], bad_samples: Path | None = None) -> None:
        super().__init__(shards, "tokens.npy", buckets, bad_samples=bad_samples)

    @staticmethod
    def collate(clips: list[TokenClip]) -> TokenBatch:
        """Clips as one batch; shorter captions are padded with zeros, which the mask tells apart."""
        tokens, texts, pooled, captions, keys = zip(*clips, strict=True)
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        text = TextEmbedding(pad_sequence(list(texts), batch_first=True), mask, torch.stack(pooled))
        return TokenBatch(torch.stack(tokens), text, list(captions), list(keys))

    @property
    def batch_bytes(self) -> int:
        """Size of the largest batch in bytes, or a little more; text may be stored in half precision."""
        text = max(sample.members["text.npy"][1] + sample.members["pooled.npy"][1] for sample in self.samples)
        frame = 8 * max(sample.height * sample.width for sample in self.samples)
        return max(bucket.batch_size * (bucket.frames * frame + 3 * text) for bucket in self.buckets)

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> TokenClip:
        """One of the clip's captions goes with it: a random one with a generator, the first without."""
        members = self.shards.read(sample, "tokens.npy", *self._needed)
        tokens = torch.from_numpy(_array(members["tokens.npy"])[self._window(sample, bucket, rng)].astype(np.int64))
        texts, pooled = (
            torch.from_numpy(_array(members[name]).astype(np.float32)) for name in ("text.npy", "pooled.npy")
        )
        told = json.loads(members["json"])
        captions = told.get("captions") or [told.get("caption", "")]
        lengths = told.get("text_lengths") or [len(texts)]
        which = int(rng.integers(len(captions))) if rng is not None else 0
        return TokenClip(
            tokens, texts.split(lengths)[which], pooled.view(len(captions), -1)[which], captions[which], sample.key
        )


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
        bucket = self.clips.buckets[0]
        loaded = (self.clips.load(index, bucket, rng=None) for index in self.batches[number])
        clips = [clip for clip in loaded if clip is not None]
        return VideoClips.collate(clips) if clips else None


def _captions(members: dict[str, bytes]) -> list[str]:
    """All that is said of a clip; the first is that in txt."""
    told = json.loads(members.get("json", b"{}"))
    first = members["txt"].decode() if "txt" in members else str(told.get("caption") or "")
    others = [str(caption).strip() for caption in told.get("captions", [])]
    return list(dict.fromkeys([first.strip(), *others]))


def _size(bucket: Bucket) -> tuple[int, int]:
    assert bucket.height is not None
    assert bucket.width is not None
    return bucket.height, bucket.width


def _cut(
    video: UInt8[Tensor, "t c h w"], size: tuple[int, int], share: float, place: np.ndarray
) -> UInt8[Tensor, "t c height width"]:
    """The same window of every frame, resized.

    Args:
        video: the frames.
        size: height and width of the result.
        share: sides of the window, as shares of the largest that has the result's proportions.
        place: where it lies, from the top and from the left, in [0, 1].
    """
    height, width = video.shape[-2:]
    scale = min(height / size[0], width / size[1]) * share
    sides = [max(1, round(scale * side)) for side in size]
    top, left = (
        round(float(at) * (whole - side)) for at, whole, side in zip(place, (height, width), sides, strict=True)
    )
    return resize_and_crop(video[..., top : top + sides[0], left : left + sides[1]], size)


def _array(content: bytes) -> np.ndarray:
    """An npy file's array, which is not to be written to."""
    if content[:8] != _NPY:
        return np.load(io.BytesIO(content), allow_pickle=False)
    start = len(_NPY) + 2 + int.from_bytes(content[8:10], "little")
    shape, by_columns, dtype = _npy_header(content[:start])
    array = np.frombuffer(content, dtype, math.prod(shape), start)
    return array.reshape(shape, order="F" if by_columns else "C")


@lru_cache
def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """To parse it takes longer than all else that is done for a clip of tokens, and few are different."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(content[len(_NPY) :]))
