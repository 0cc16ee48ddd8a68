"""The base of the data sets: batches of the plan, out of the samples of a set of shards.

Every random choice comes from the generator of its draw (`Draw.rng`), so that a clip does not depend on the worker that
loads it. A corrupt clip is replaced by another, chosen with the same generator, and named in one warning.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch.utils.data import Dataset

from data.plan import Batch, Bucket, Draw
from data.shards import Sample, ShardSet, SkippedSample
from t2v.errors import UserError

_ATTEMPTS = 8
"""Corrupt clips in a row after which the run stops."""


class Clips(Dataset[Any]):
    """Clips of a set of shards, loaded one batch of the plan at a time; the base of `VideoClips` and `TokenClips`.

    Args:
        shards: The shards.
        buckets: Length, size and number of the clips in a batch. A clip too short for all buckets is left out.
        fps: Frames per second at which a bucket's `frames` are counted; None to take clips at their stored rate.
        skipped_samples: JSON-lines file to which each sample that cannot be used is added, with key, shard and reason,
            unless it is listed already.

    Attributes:
        samples: The clips that are long enough.
        skipped: The samples that cannot be used as far as the index shows.
        corrupt: For each of `samples`, whether it failed to decode; shared by all workers.
        failures: Number of loads of corrupt clips since it was last set to 0; shared by all workers.

    Raises:
        UserError: If no clip is left.
    """

    collate: Callable[[list[Any]], Any]

    def __init__(
        self,
        shards: ShardSet,
        buckets: Sequence[Bucket],
        fps: float | None = None,
        skipped_samples: Path | None = None,
    ) -> None:
        self.shards, self.buckets, self.fps, self.skipped_samples = shards, buckets, fps, skipped_samples
        self._listed: set[bytes] = set()  # lines of `skipped_samples`
        self._listed_bytes = 0
        clips = [sample for sample in shards.samples if self._member(sample)]
        if not clips:
            found = sorted({name for sample in shards.samples for name in sample.members})
            raise UserError(
                f"No sample in '{shards.path}' has a {self._kind}; they have {', '.join(found) or 'nothing'}: "
                "are these the shards of the other stage?"
            )
        self._warn_of_others([sample for sample in shards.samples if not self._member(sample)])
        self.skipped = list(shards.skipped)
        readable = self._readable(clips)
        self._warn_of_skipped()
        self._list_skipped(self.skipped)
        if not readable:
            raise UserError(
                f"None of the {len(clips)} clips in '{shards.path}' can be used, such as '{self.skipped[-1].key}': "
                f"{self.skipped[-1].reason}; make the shards again."
            )
        self.samples = self._long_enough(readable)
        self.corrupt = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self.failures = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, batch: Batch) -> Any:
        bucket = self.buckets[batch.bucket]
        rngs = [draw.rng() for draw in batch.draws]  # all first: slower between two clips, when caches are cold
        pairs = zip(batch.draws, rngs, strict=True)
        return type(self).collate([self._load_or_replace(draw, bucket, rng) for draw, rng in pairs])

    @property
    def shard_sizes(self) -> list[int]:
        """Number of clips in each shard."""
        return [len(list(clips)) for _, clips in groupby(self.samples, lambda sample: sample.shard)]

    @property
    def shard_sources(self) -> list[int]:
        """Which of the paths of the shards each shard belongs to."""
        return [self.shards.sources[shard] for shard, _ in groupby(self.samples, lambda sample: sample.shard)]

    @property
    def fits(self) -> Bool[np.ndarray, "samples buckets"]:
        """Whether each clip is long enough for each bucket."""
        lengths = np.array([self.length(sample) for sample in self.samples])
        return lengths[:, None] >= np.array([bucket.frames for bucket in self.buckets])

    @property
    def batch_bytes(self) -> int:
        """Upper bound of the size of a batch in bytes."""
        raise NotImplementedError

    def length(self, sample: Sample) -> int:
        """Return the number of frames of a clip at the rate `fps`."""
        return math.ceil((sample.frames - 0.5) / self.stride(sample))

    def stride(self, sample: Sample) -> float:
        """Return the number of stored frames per frame at the rate `fps`."""
        return sample.fps / self.fps if self.fps else 1.0

    def window(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> Int[np.ndarray, " t"]:
        """Return the indices of the stored frames of a clip, as if they were equally spaced in time.

        Args:
            sample: The sample.
            bucket: Length of the window, and where it starts.
            rng: Generator that chooses the start; None for all frames of the sample.
        """
        length = self.length(sample) if rng is None else bucket.frames
        window = np.floor(np.arange(length) * self.stride(sample) + 0.5).astype(np.int64)
        if rng is None or bucket.start == "first":
            return window
        return window + rng.integers(sample.frames - window[-1])

    def check_skipped(self, skipped: int, clips: int, max_fraction: float) -> None:
        """Check the number of samples that cannot be used, or of loads that failed.

        Args:
            skipped: The number.
            clips: The number of all samples, or of the loads of an epoch.
            max_fraction: Fraction of them that is allowed.

        Raises:
            UserError: If there are more.
        """
        if skipped > max_fraction * clips:
            unusable = len(self.skipped) + int(self.corrupt.sum())
            often = f" and were drawn {skipped} times in an epoch of {clips} clips" if skipped > unusable else ""
            raise UserError(
                f"{unusable} of {len(self.skipped) + len(self)} clips in '{self.shards.path}' cannot be used{often}, "
                f"more than data.max_skipped_fraction={max_fraction:g}; they are listed in {self.skipped_samples}: "
                "repair or remove them, or raise data.max_skipped_fraction."
            )

    def load(self, index: int, bucket: Bucket, rng: np.random.Generator | None) -> Any:
        """Load one clip.

        Args:
            index: Which of `samples`.
            bucket: Length and size of the clip.
            rng: Generator of the random choices, such as the window; None to load all frames of the clip.

        Returns:
            The clip, or None if it is corrupt.
        """
        if not self.corrupt[index]:
            sample = self.samples[index]
            try:
                return self._load(sample, bucket, rng)
            except (ValueError, EOFError) as error:
                self.corrupt[index] = True
                warnings.warn(f"Clip {sample.key} in {sample.shard} is corrupt and skipped: {error}", stacklevel=2)
                self._list_skipped([SkippedSample(sample.key, sample.shard, str(error))])
        self.failures += 1
        return None

    _kind: str
    """What holds a clip, for messages."""

    def _member(self, sample: Sample) -> str | None:
        """Return the member that holds a sample's clip, or None; samples without one are ignored."""
        raise NotImplementedError

    def _flaw(self, sample: Sample, captioned: bool) -> str:
        """Return why a sample cannot be used apart from its clip, as far as the index shows, or an empty string.

        Args:
            sample: The sample.
            captioned: Whether any clip has a caption.
        """
        raise NotImplementedError

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> Any:
        """Read and decode a clip; raise `ValueError` or `EOFError` if it is corrupt."""
        raise NotImplementedError

    def _load_or_replace(self, draw: Draw, bucket: Bucket, rng: np.random.Generator) -> Any:
        """Load the clip of a draw, or another that is long enough if it is corrupt."""
        index = draw.sample
        for attempt in range(_ATTEMPTS):
            if attempt > 0:
                rng = draw.rng(attempt)
                index = self._random_index(bucket.frames, rng)
            clip = self.load(index, bucket, rng)
            if clip is not None:
                return clip
        raise UserError(
            f"{_ATTEMPTS} clips in a row from '{self.shards.path}' are corrupt, {int(self.corrupt.sum())} of "
            f"{len(self)} so far: make the shards again from intact footage."
        )

    def _random_index(self, frames: int, rng: np.random.Generator) -> int:
        """Return the index of a random clip with at least `frames` frames."""
        while True:
            index = int(rng.integers(len(self)))
            if self.length(self.samples[index]) >= frames:
                return index

    def _readable(self, clips: list[Sample]) -> list[Sample]:
        """Return the clips that can be used as far as the index shows; add the others to `skipped`."""
        captioned = any(sample.captions for sample in clips)
        readable = []
        for sample in clips:
            reason = self._flaw(sample, captioned)
            if not (reason or sample.frames):
                reason = f"its {self._member(sample)} does not decode: {sample.reason}"
            if reason:
                self.skipped.append(SkippedSample(sample.key, sample.shard, reason))
            else:
                readable.append(sample)
        return readable

    def _long_enough(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples with enough frames for the shortest bucket; warn of the others."""
        frames = min(bucket.frames for bucket in self.buckets)
        kept = [sample for sample in samples if self.length(sample) >= frames]
        short = len(samples) - len(kept)
        rate = f" at {self.fps:g} fps" if self.fps else ""
        if not kept:
            longest = max(self.length(sample) for sample in samples)
            raise UserError(
                f"All {short} clips in '{self.shards.path}' are shorter than {frames} frames{rate} (the longest has "
                f"{longest}): lower data.frames{' or raise data.fps' if self.fps else ''}, or prepare longer clips."
            )
        if short:
            warnings.warn(
                f"{short} of {len(samples)} clips in '{self.shards.path}' are left out: shorter than {frames} "
                f"frames{rate}.",
                stacklevel=3,
            )
        return kept

    def _warn_of_others(self, others: Sequence[Sample]) -> None:
        """Name the samples without a clip."""
        if not others:
            return
        rows = [
            SkippedSample(each.key, each.shard, f"it has {', '.join(each.members)}, but no {self._kind}")
            for each in others
        ]
        self._list_skipped(rows)
        warnings.warn(
            f"{len(rows)} samples in '{self.shards.path}' are left out, such as '{rows[0].key}' in {rows[0].shard}: "
            f"{rows[0].reason}.",
            stacklevel=3,
        )

    def _warn_of_skipped(self) -> None:
        if self.skipped:
            first = self.skipped[0]
            warnings.warn(
                f"{len(self.skipped)} samples in '{self.shards.path}' cannot be used and are skipped, such as "
                f"'{first.key}' in {first.shard}: {first.reason}.",
                stacklevel=3,
            )

    def _list_skipped(self, samples: Sequence[SkippedSample]) -> None:
        """Add samples to the file `skipped_samples`."""
        if self.skipped_samples is None or not samples:
            return
        self.skipped_samples.parent.mkdir(parents=True, exist_ok=True)
        with self.skipped_samples.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < self._listed_bytes:  # it was made again
                self._listed, self._listed_bytes = set(), 0
            file.seek(self._listed_bytes)
            self._listed.update(file.read().splitlines())  # other workers and earlier runs
            lines = dict.fromkeys(json.dumps(sample._asdict()).encode() for sample in samples)
            new = [line for line in lines if line not in self._listed]
            file.write(b"".join(line + b"\n" for line in new))
            self._listed.update(new)
            self._listed_bytes = file.tell()
