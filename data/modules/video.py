"""The LightningDataModule of stage 1: clips of video shards."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.datasets import VideoClips, WholeClips
from data.loaders import LaterSampler, NonEmptyLoader
from data.modules.base import Paths, ShardDataModule
from data.plan import Bucket
from data.shards import ShardSet
from t2v.errors import check_range

_PREDICT_FACTOR = 8
"""Frames in a batch of `predict` per frame in a training batch: it keeps no activations for a backward pass."""


class VideoDataModule(ShardDataModule):
    """Clips of video shards.

    A clip that does not decode is named in a warning and replaced by another.

    Args:
        train: Training shards: a folder, one tar or a pattern, or a list of these, as written by `data.prepare` or
            `video2dataset`.
        val: Validation shards, at one path or several.
        size: Height and width of a clip in pixels; the shorter side of other videos is resized to it, and the centre is
            cut out.
        frames: Length of a clip. Shorter videos are left out, and of longer ones a random window is taken.
        fps: Frames per second of a clip; videos with another rate are resampled.
        batch_size: Clips in a batch on each rank; `predict` takes as many whole clips as have eight times the frames.
        num_workers: Processes that decode, on each rank.
        seed: Seed of the order of the clips, the random windows and crops, and the choice of clips to mirror.
        crop: If less than 1, a training clip shows a random square of the picture instead of its centre. The side is at
            least this fraction of the picture's shorter side, so with shards of `size` / `crop` pixels no square is
            enlarged.
        flip: Mirror half of the training clips horizontally, except those whose caption names left or right.
        buckets: Train on batches of these kinds instead of `batch_size` clips of `frames` frames and `size` pixels.
            Ranks may train on different buckets at the same step, so the buckets' batches should cost about the same.
        max_skipped_fraction: Fraction of an epoch's samples that cannot be used above which the run stops. Each is
            listed in `skipped_samples.jsonl` in the run's folder and replaced by another.
        weights: Share of each path of `train` in an epoch, relative to the others'. By default every clip occurs once.

    Raises:
        UserError: If an argument is out of range, shards are missing, or no clip is long enough.
    """

    predict_splits = ("train", "val")
    """Names of the loaders of `predict_dataloader`."""

    def __init__(
        self,
        train: list[str] | str,
        val: list[str] | str,
        size: int,
        frames: int,
        fps: float,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        crop: float = 1.0,
        flip: bool = False,
        buckets: list[Bucket] = [],  # noqa: B006
        max_skipped_fraction: float = 0.01,
        weights: list[float] = [],  # noqa: B006
    ) -> None:
        super().__init__(train, val, weights, frames, batch_size, num_workers, seed, buckets, max_skipped_fraction)
        self.save_hyperparameters(logger=False, ignore="buckets")  # checkpoints hold plain values only
        check_range(self, "(0, inf)", **{"data.size": size, "data.fps": fps})
        check_range(self, "(0, 1]", **{"data.crop": crop})
        self.size, self.fps = size, fps
        self.crop, self.flip = crop, flip

    def protocol(self, batches: int | float = math.inf) -> dict[str, Any]:
        """Describe the clips of `validate` and `test`; see `ShardDataModule.protocol`."""
        return {
            **super().protocol(batches),
            "fps": self.fps,
            "size": self.size,
            "resize": "shorter side to size, bilinear, antialiased; the centre is cut out",
        }

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return all training clips and all validation clips, whole, in order, each once."""
        return [self._whole_clips_loader(path) for path in (self.train, self.val)]

    def _open_clips(self, shards: ShardSet, training: bool) -> VideoClips:
        buckets = [Bucket(self.frames, self.batch_size)]
        if training and self.buckets:
            buckets = self.buckets
        sized = [replace(b, height=b.height or self.size, width=b.width or self.size) for b in buckets]
        crop, flip = (self.crop, self.flip) if training else (1.0, False)
        return VideoClips(shards, sized, self.fps, crop, flip, self._skipped_samples)

    def _paths(self, stage: str) -> list[Paths]:
        return super()._paths("fit" if stage == "predict" else stage)

    def _whole_clips_loader(self, path: Paths) -> DataLoader[Any]:
        bucket = Bucket(frames=1, batch_size=1, height=self.size, width=self.size)
        clips = VideoClips(self.shards(path), [bucket], self.fps, skipped_samples=self._skipped_samples)
        ranks = self._ranks()
        frames = _PREDICT_FACTOR * self.batch_size * self.frames
        batches = WholeClips(clips, frames, ranks["num_replicas"], self.max_skipped_fraction)
        return NonEmptyLoader(
            batches,
            batch_size=None,
            sampler=LaterSampler(batches, **ranks, shuffle=False),
            num_workers=self.num_workers,
            prefetch_factor=1 if self.num_workers else None,  # whole clips are large
            pin_memory=torch.cuda.is_available(),
        )
