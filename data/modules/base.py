"""The LightningDataModules: clips of footage for stage 1, token clips and prompts for stage 2."""

import json
import math
import re
import warnings
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler

from data.datasets import Clips, TokenClips, VideoClips, WholeClips
from data.loaders import Loader, NonEmptyLoader, TrainLoader
from data.plan import Bucket, OrderedSampler, Plan, TrainSampler
from data.shards import ShardSet
from t2v.batch import PromptBatch
from t2v.errors import UserError

_WHOLE = 8
"""Tokenising keeps no activations for a backward pass: it takes so many times the frames of a training batch."""


class ShardDataModule(LightningDataModule):
    """Train and validation loaders over shards; the base of `VideoDataModule` and `TokenDataModule`.

    A checkpoint of `fit` in the middle of an epoch goes on with the batch that would have come next, with any number of
    workers, and with another number of ranks.
    """

    frames: int

    def __init__(
        self,
        train: str,
        val: str,
        batch_size: int,
        num_workers: int,
        seed: int,
        buckets: list[Bucket],
        max_bad_fraction: float,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.buckets, self.max_bad_fraction = buckets, max_bad_fraction
        self._shards: dict[str, ShardSet] = {}
        self._clips: dict[tuple[str, bool], Clips] = {}
        self._sampler: TrainSampler | None = None
        self._resumed: dict[str, Any] = {}

    def shards(self, path: str) -> ShardSet:
        """The shards at a path, opened once."""
        if path not in self._shards:
            self._shards[path] = ShardSet(path)
        return self._shards[path]

    def clips(self, path: str, training: bool = False) -> Clips:
        """The clips of the shards at a path, to train on or not, opened once."""
        if (path, training) not in self._clips:
            self._clips[path, training] = self._open_clips(self.shards(path), training)
        return self._clips[path, training]

    def protocol(self, batches: float = math.inf) -> dict[str, Any]:
        """What `validate` and `test` look at: without it their figures cannot be compared.

        Args:
            batches: how many batches each rank took, where that was not all.

        Returns:
            Plain values for a report. `clips` went in; of those, `repeated` ones did so a second time, as ranks take
            equal shares. Clips that turned out `broken` had another take their place.
        """
        clips, ranks = self.clips(self.val), self._ranks()["num_replicas"]
        taken = int(min(math.ceil(len(clips) / ranks), batches * self.batch_size)) * ranks
        return {
            "shards": clips.shards.path,
            "clips": taken,
            "repeated": max(0, taken - len(clips)),
            "broken": int(clips.broken.sum()),
            "frames": taken * self.frames,
            "frames_per_clip": self.frames,
            "window": "the frames of a longer clip at a random place, drawn by the seed, the same every time",
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to know, beside Lightning's count of batches, to go on at the next clip."""
        if self._sampler is None:
            return {}
        sampler = self._sampler
        return {
            "plan": self._plan_hash,
            "ranks": sampler.num_replicas,
            "origin": list(sampler.origin),
            "epoch": sampler.epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the trainer's counts are restored."""
        self._resumed = state_dict

    def prepare_data(self) -> None:
        """Index shards that have no index yet, on one rank only."""
        stage = self.trainer.state.fn if self.trainer else None
        for path in self._paths(stage or "fit"):
            self.shards(path)

    def setup(self, stage: str) -> None:
        """Open what a command needs, so that mistakes show before it begins."""
        for path in self._paths(stage):
            if stage == "predict":
                self.shards(path)
            else:
                self.clips(path, training=stage == "fit" and path == self.train)

    def train_dataloader(self) -> DataLoader:
        """Random windows of the training clips, in the order of the plan."""
        clips, ranks = self.clips(self.train, training=True), self._ranks()
        plan = Plan(clips.shard_sizes, self.seed, clips.buckets, clips.fits)
        self._sampler = TrainSampler(plan, **ranks)
        if len(self._sampler) == 0:
            sizes = ", ".join(f"{bucket.batch_size} clips of {bucket.frames} frames" for bucket in clips.buckets)
            raise UserError(
                f"{len(clips)} training clips in '{self.train}' do not fill one batch (data.batch_size: {sizes}) on "
                f"each of {ranks['num_replicas']} ranks: lower it, or those of data.buckets, or add clips."
            )
        self._plan_hash = plan.fingerprint()
        self._rejoin(self._sampler)
        return TrainLoader(clips, self._sampler, self._place, self.max_bad_fraction, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The validation clips in their order, the same in every epoch."""
        clips = self.clips(self.val)
        sampler = OrderedSampler(len(clips), self.batch_size, self.seed, **self._ranks())
        return Loader(clips, sampler, self.max_bad_fraction, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """The validation clips."""
        return self.val_dataloader()

    def _open_clips(self, shards: ShardSet, training: bool) -> Clips:
        raise NotImplementedError

    def _paths(self, stage: str) -> list[str]:
        """The shards that a command needs."""
        return {"fit": [self.train, self.val], "predict": []}.get(stage, [self.val])

    def _ranks(self) -> dict[str, int]:
        """Number of ranks among which samples are shared, and which of them this is."""
        known = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return known or {"num_replicas": 1, "rank": 0}

    @property
    def _bad_samples(self) -> Path | None:
        """The list of samples that cannot be used, in the run's folder."""
        if self.trainer is None:
            return None
        return Path(self.trainer.log_dir or self.trainer.default_root_dir) / "bad_samples.jsonl"

    def _place(self) -> tuple[int, int]:
        """The epoch, and how many of its batches are trained on, as Lightning counts them."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _rejoin(self, sampler: TrainSampler) -> None:
        """Go on where the checkpoint was written, if training resumes from one."""
        resumed, self._resumed = self._resumed, {}
        if not resumed or self.trainer is None:
            return
        if resumed["plan"] != self._plan_hash:
            warnings.warn(
                f"The training clips, data.seed, data.batch_size, data.frames or data.buckets are not those of the "
                f"checkpoint: the running epoch of '{self.train}' goes on at the same step, but some clips may come "
                "twice and others not at all.",
                stacklevel=2,
            )
            return
        sampler.origin, epoch = tuple(resumed["origin"]), resumed["epoch"]
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if (ranks := resumed["ranks"]) != sampler.num_replicas:
            steps = sampler.rejoin(epoch, sampler.first_batch(epoch) + done.processed * ranks)
            more = steps - done.processed
            for name in (
                "ready",
                "started",
                "processed",
                "completed",
            ):  # Lightning counts this number of ranks' batches
                setattr(done, name, getattr(done, name) + more)
        self._count_epochs(epoch, done.processed >= len(sampler))

    def _count_epochs(self, epoch: int, ended: bool) -> None:
        """Put Lightning's counts of epochs right.

        A run that resumes at the end of an epoch forgets to count the next one, and one that ends in the middle of an
        epoch counts it as done; from their checkpoints the epochs would be counted wrongly.

        Args:
            epoch: the epoch of the last batch.
            ended: whether that was its last.
        """
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        for known in (loop.epoch_progress.total, loop.epoch_progress.current):
            known.ready = known.started = epoch + 1
            known.processed = epoch + (ended and known.processed > epoch)
            known.completed = epoch + (ended and known.completed > epoch)
        loop.restarting = True  # which looks at the counts


class VideoDataModule(ShardDataModule):
    """Clips of footage out of video shards.

    A clip that does not decode is named in a warning, and another takes its place.

    Args:
        train: training shards: a folder, one tar or a pattern, as `data.prepare` or `video2dataset` makes them.
        val: validation shards.
        size: height and width of a clip in pixels; other footage is resized by its shorter side, its centre cut out.
        frames: length of a clip; shorter footage is left out, and of longer footage a random window is taken.
        fps: frames a second of a clip; footage at another rate is sampled at this one.
        batch_size: clips in a batch on each rank; `predict` takes as many whole clips as have eight times the frames.
        num_workers: processes that decode, on each rank.
        seed: decides the order of the clips, the random windows and squares, and which clips are mirrored.
        crop: with less than 1, a training clip shows a random square of the footage instead of its centre. The side is
            at least this share of the footage's shorter side, so that shards of `size` / `crop` pixels are needed for
            no square to be enlarged.
        flip: mirror half of the training clips, left to right, but none whose caption has the word left or right.
        buckets: train on batches of these kinds instead of `batch_size` clips of `frames` frames and `size` pixels.
            Ranks may work on different buckets at the same step, so batches should cost about the same.
        max_bad_fraction: more samples than this share of an epoch's that cannot be used stop the run. Each is named in
            `bad_samples.jsonl` in the run's folder, and another takes its place.

    Raises:
        UserError: where shards are missing or no clip is long enough.
    """

    predict_splits = ("train", "val")
    """What the loaders of `predict_dataloader` hold."""

    def __init__(
        self,
        train: str,
        val: str,
        size: int,
        frames: int,
        fps: float,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        crop: float = 1.0,
        flip: bool = False,
        buckets: list[Bucket] = [],  # noqa: B006
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(train, val, batch_size, num_workers, seed, buckets, max_bad_fraction)
        self.save_hyperparameters(logger=False, ignore="buckets")  # checkpoints hold plain values only
        _require_positive(size=size, frames=frames, fps=fps, batch_size=batch_size, crop=crop)
        if crop > 1:
            raise UserError(f"data.crop={crop} is more than 1, all of the footage's shorter side: lower it.")
        self.size, self.frames, self.fps = size, frames, fps
        self.crop, self.flip = crop, flip

    def protocol(self, batches: float = math.inf) -> dict[str, Any]:
        """What `validate` and `test` look at; see `ShardDataModule.protocol`."""
        return {
            **super().protocol(batches),
            "fps": self.fps,
            "size": self.size,
            "resize": "shorter side to size, bilinear, antialiased; the centre is cut out",
        }

    def _open_clips(self, shards: ShardSet, training: bool) -> VideoClips:
        buckets = [Bucket(self.frames, self.batch_size)]
        if training and self.buckets:
            buckets = self.buckets
        sized = [replace(b, height=b.height or self.size, width=b.width or self.size) for b in buckets]
        crop, flip = (self.crop, self.flip) if training else (1.0, False)
        return VideoClips(shards, sized, self.fps, crop, flip, self._bad_samples)

    def _paths(self, stage: str) -> list[str]:
        return super()._paths("fit" if stage == "predict" else stage)

    def predict_dataloader(self) -> list[DataLoader]:
        """All training clips, then all validation clips: whole, in their order, each once."""
        return [self._whole_loader(path) for path in (self.train, self.val)]

    def _whole_loader(self, path: str) -> DataLoader:
        bucket = Bucket(frames=1, batch_size=1, height=self.size, width=self.size)
        clips = VideoClips(self.shards(path), [bucket], self.fps, bad_samples=self._bad_samples)
        ranks = self._ranks()
        batches = WholeClips(clips, _WHOLE * self.batch_size * self.frames, ranks["num_replicas"])
        return NonEmptyLoader(
            batches,
            batch_size=None,
            sampler=UnrepeatedDistributedSampler(batches, **ranks, shuffle=False),
            num_workers=self.num_workers,
            prefetch_factor=1 if self.num_workers else None,  # whole clips are large
            pin_memory=torch.cuda.is_available(),
        )


class TokenDataModule(ShardDataModule):
    """Token clips out of token shards, and prompts to generate from.

    Args:
        train: training shards: a folder, one tar or a pattern, as `predict` of stage 1 writes them. Prompts need none.
        val: validation shards.
        frames: length of a clip; shorter ones are left out, and of longer ones a random window is taken.
        batch_size: clips or prompts in a batch on each rank.
        num_workers: processes that read, on each rank.
        prompts: what `predict` generates: a list of prompts, or a text file with one prompt a line.
        seed: decides the order of the clips and the random windows; prompt number i is generated with seed + i.
        buckets: train on batches of these kinds instead of `batch_size` clips of `frames` frames; height and width are
            those of the tokens, and not given here.
        max_bad_fraction: more samples than this share of an epoch's that cannot be used stop the run. Each is named in
            `bad_samples.jsonl` in the run's folder, and another takes its place.

    Raises:
        UserError: where shards or prompts are missing, no clip is long enough, or the shards were written by different
            tokenizers.
    """

    def __init__(
        self,
        train: str,
        val: str,
        frames: int,
        batch_size: int,
        num_workers: int = 2,
        prompts: list[str] | str = (),  # type: ignore[assignment]
        seed: int = 0,
        buckets: list[Bucket] = [],  # noqa: B006
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(train, val, batch_size, num_workers, seed, buckets, max_bad_fraction)
        self.save_hyperparameters(logger=False, ignore="buckets")  # checkpoints hold plain values only
        _require_positive(frames=frames, batch_size=batch_size)
        if sized := [bucket for bucket in buckets if bucket.height or bucket.width]:
            raise UserError(
                f"data.buckets asks for height={sized[0].height}, width={sized[0].width}, but tokens are as large as "
                "they were written: leave height and width away."
            )
        self.frames, self.prompts = frames, prompts

    def _open_clips(self, shards: ShardSet, training: bool) -> TokenClips:
        buckets = [Bucket(self.frames, self.batch_size)]
        if training and self.buckets:
            buckets = self.buckets
        return TokenClips(shards, buckets, self._bad_samples)

    def setup(self, stage: str) -> None:
        """Open the shards, or read the prompts."""
        super().setup(stage)
        if stage == "predict":
            self._read_prompts()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the shards were made, as their json says: tokenizer, size, frame rate, text encoder.

        The first sample of each shard is asked; a shard is written in one go.
        """
        told: dict[str, dict[str, Any]] = {}
        for path in dict.fromkeys((self.train, self.val)):
            for shard, samples in groupby(self.shards(path).samples, lambda sample: sample.shard):
                content = self.shards(path).read(next(samples), "json").get("json", b"{}")
                told[shard] = json.loads(content).get("fingerprint", {})
        first, expected = next(iter(told.items()))
        for shard, fingerprint in told.items():
            if not fingerprint:
                raise UserError(f"'{shard}' does not say which tokenizer made it: write the token shards again.")
            if fingerprint != expected:
                names = sorted(k for k in expected.keys() | fingerprint.keys() if expected.get(k) != fingerprint.get(k))
                raise UserError(
                    f"'{shard}' and '{first}' differ in {', '.join(names)}: they were written by different tokenizers "
                    "or settings; write all token shards with one of them."
                )
        return expected

    def predict_dataloader(self) -> DataLoader:
        """The prompts. Where ranks come short of an equal share, they make the first videos again."""
        prompts = self._read_prompts()
        jobs: Any = [(text, self.seed + i, f"{i:04d}-{_slug(text)}".rstrip("-")) for i, text in enumerate(prompts)]
        ranks = self._ranks()
        sampler: DistributedSampler = DistributedSampler(jobs, ranks["num_replicas"], ranks["rank"], shuffle=False)
        return DataLoader(jobs, batch_size=self.batch_size, sampler=sampler, collate_fn=_collate_prompts)

    def _read_prompts(self) -> list[str]:
        source: Any = self.prompts
        if isinstance(source, str):
            try:
                source = Path(source).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"No prompts in '{self.prompts}' ({error}): give data.prompts a text file with one prompt a line, "
                    "or a list such as '[\"a red circle moves left\"]'."
                ) from error
        prompts = [line.strip() for line in source if line.strip()]
        if not prompts:
            raise UserError(
                f"There are no prompts in data.prompts={self.prompts!r}: give a text file with one prompt a line, "
                "or a list such as '[\"a red circle moves left\"]'."
            )
        return prompts


def _collate_prompts(jobs: list[tuple[str, int, str]]) -> PromptBatch:
    prompts, seeds, names = zip(*jobs, strict=True)
    return PromptBatch(list(prompts), list(seeds), list(names))


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))[:60].rstrip("-")


def _require_positive(**values: float) -> None:
    wrong = [f"data.{name}={value}" for name, value in values.items() if value <= 0]
    if wrong:
        raise UserError(f"{', '.join(wrong)} must be greater than 0.")
