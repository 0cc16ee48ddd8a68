"""Clips of video shards: random windows to train on, and whole clips to tokenize."""

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from data.captions import read_captions
from data.datasets.base import Clips
from data.members import TEXT_EXTENSIONS
from data.plan import Bucket
from data.shards import Sample, ShardSet
from t2v.batch import VideoBatch
from t2v.video import read_at, resize_and_crop

_SIDED = re.compile(r"\b(left|right)(wards?|most|hand|handed)?\b", re.IGNORECASE)
"""Words that make a caption wrong for the mirrored clip."""

_SAME_ASPECT = 0.01
"""Difference of the logarithms of two aspect ratios below which they count as equal."""


class VideoClip(NamedTuple):
    """One clip of a `VideoBatch`."""

    video: UInt8[Tensor, "t c height width"]
    captions: list[str]
    key: str


class VideoClips(Clips):
    """Clips of video shards.

    Args:
        shards: Shards whose samples have a video and, optionally, txt and json. If any sample has a caption, those
            without one are left out.
        buckets: Length, height and width of the clips.
        fps: Frames per second of a clip; videos with another rate are resampled.
        crop: If less than 1, a training clip shows a random window of the picture, whose sides are at least this
            fraction of the largest window's. At 1, and for whole clips, it shows the largest window in the centre.
        flip: Mirror half of the training clips horizontally, except those whose caption names left or right.
        skipped_samples: JSON-lines file for the samples that cannot be used; see `Clips`.

    Raises:
        UserError: If no clip is left.
    """

    _kind = "mp4 or another video"

    def __init__(
        self,
        shards: ShardSet,
        buckets: Sequence[Bucket],
        fps: float,
        crop: float = 1.0,
        flip: bool = False,
        skipped_samples: Path | None = None,
    ) -> None:
        super().__init__(shards, buckets, fps, skipped_samples)
        self.crop, self.flip = crop, flip
        size = max(min(_size(bucket)) for bucket in buckets)
        smallest = round(crop * min(min(sample.height, sample.width) for sample in self.samples))
        if crop < 1 and smallest < size:
            warnings.warn(
                f"data.crop={crop:g} cuts windows of down to {smallest} pixels out of '{shards.path}', which are "
                f"enlarged to data.size={size}: prepare shards with --size {2 * math.ceil(size / crop / 2)}.",
                stacklevel=2,
            )

    @staticmethod
    def collate(clips: list[VideoClip]) -> VideoBatch:
        """Stack clips of equal length; the channels stay innermost in memory, as decoders write them."""
        videos, captions, keys = zip(*clips, strict=True)
        video = torch.stack([rearrange(video, "t c h w -> t h w c") for video in videos])
        return VideoBatch(rearrange(video, "b t h w c -> b t c h w"), list(captions), list(keys))

    @property
    def batch_bytes(self) -> int:
        """Size of the largest batch in bytes."""
        return max(bucket.batch_size * bucket.frames * 3 * math.prod(_size(bucket)) for bucket in self.buckets)

    @property
    def fits(self) -> Bool[np.ndarray, "samples buckets"]:
        """Whether each clip is long enough for each bucket, and has no other such bucket of a nearer aspect ratio.

        If all clips have the same aspect ratio, only their length counts.
        """
        fits = super().fits
        of_samples = np.log([sample.height / sample.width for sample in self.samples])
        if np.ptp(of_samples) < _SAME_ASPECT:
            return fits
        of_buckets = np.log([height / width for height, width in map(_size, self.buckets)])
        distance = np.where(fits, np.abs(of_samples[:, None] - of_buckets), np.inf)
        return fits & (distance <= distance.min(axis=1, keepdims=True) + _SAME_ASPECT)

    def times(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> Float64[np.ndarray, " t"]:
        """Return when the frames of a clip are shown, in seconds since the first frame of the video.

        Args:
            sample: The sample.
            bucket: Length of the clip, and where it starts.
            rng: Generator that chooses the start, the time of a stored frame; None for the whole video.
        """
        window = self.window(sample, bucket, rng)
        return window[0] / sample.fps + np.arange(len(window)) * (self.stride(sample) / sample.fps)

    def _member(self, sample: Sample) -> str | None:
        return sample.video

    def _flaw(self, sample: Sample, captioned: bool) -> str:
        return sample.flaw or ("it has no caption" if captioned and not sample.captions else "")

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> VideoClip:
        member = sample.video
        assert member is not None
        members = self.shards.read(sample, member, *TEXT_EXTENSIONS)
        captions = read_captions(members) or [""]
        times = self.times(sample, bucket, rng)
        transform = partial(resize_and_crop, size=_size(bucket))
        if self.crop < 1 and rng is not None:
            fraction = rng.uniform(self.crop, 1)
            transform = partial(_crop_and_resize, size=_size(bucket), fraction=fraction, position=rng.random(2))
        video = read_at(members[member], times.tolist(), transform=transform)
        sided = any(_SIDED.search(caption) for caption in captions)
        if self.flip and rng is not None and rng.random() < 0.5 and not sided:
            video = video.flip(-1)
        return VideoClip(video, captions, sample.key)


class WholeClips(Dataset[VideoBatch | None]):
    """Batches of whole clips, shard after shard; a batch has clips of equal length from one shard.

    Args:
        clips: The clips.
        frames: Largest number of frames in a batch; a longer clip forms a batch by itself.
        ranks: Number of ranks among which the batches are divided equally; empty batches are added for that.
        max_skipped_fraction: Fraction of the samples that cannot be used above which the run stops.

    Raises:
        UserError: If too many samples cannot be used; also in a later batch.
    """

    def __init__(self, clips: VideoClips, frames: int, ranks: int = 1, max_skipped_fraction: float = math.inf) -> None:
        self.clips, self._max_skipped_fraction = clips, max_skipped_fraction
        self._clips_per_rank = math.ceil(len(clips) / ranks)
        clips.check_skipped(len(clips.skipped), len(clips.skipped) + len(clips), max_skipped_fraction)
        groups: dict[tuple[str, int], list[int]] = {}
        for index, sample in enumerate(clips.samples):
            groups.setdefault((sample.shard, clips.length(sample)), []).append(index)
        self.batches: list[list[int]] = []
        for (_, length), indices in groups.items():
            size = max(1, frames // length)
            self.batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        while len(self.batches) % ranks:
            self.batches.append([])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> VideoBatch | None:
        """Return one batch without its corrupt clips, or None if no clip is left."""
        bucket = self.clips.buckets[0]
        loaded = [self.clips.load(index, bucket, rng=None) for index in self.batches[number]]
        self.clips.check_skipped(int(self.clips.failures), self._clips_per_rank, self._max_skipped_fraction)
        clips = [clip for clip in loaded if clip is not None]
        return VideoClips.collate(clips) if clips else None

    def digest(self) -> str:
        """Return a hash of what the batches depend on: the samples, the shards' sizes and dates, and the format."""
        clips = self.clips
        digest = hashlib.sha256(repr((clips.buckets, clips.fps, self.batches)).encode())
        for shard, samples in groupby(clips.samples, lambda sample: sample.shard):
            stat = Path(shard).stat() if Path(shard).exists() else None  # none of a remote one
            digest.update(repr(stat and (stat.st_size, stat.st_mtime_ns)).encode())
            for sample in samples:
                digest.update(repr(sample).encode())
        return digest.hexdigest()


def _size(bucket: Bucket) -> tuple[int, int]:
    assert bucket.height is not None
    assert bucket.width is not None
    return bucket.height, bucket.width


def _crop_and_resize(
    video: UInt8[Tensor, "t c height width"],
    size: tuple[int, int],
    fraction: float,
    position: Float64[np.ndarray, "2"],
) -> UInt8[Tensor, "t c {size[0]} {size[1]}"]:
    """Cut the same window out of every frame and resize it.

    Args:
        video: The frames.
        size: Height and width of the result.
        fraction: Sides of the window as a fraction of the sides of the largest window with the result's aspect ratio.
        position: Position of the window from the top and from the left, in [0, 1].
    """
    height, width = video.shape[-2:]
    scale = min(height / size[0], width / size[1]) * fraction
    window_height, window_width = (max(1, round(scale * side)) for side in size)
    top = round(float(position[0]) * (height - window_height))
    left = round(float(position[1]) * (width - window_width))
    return resize_and_crop(video[..., top : top + window_height, left : left + window_width], size)
