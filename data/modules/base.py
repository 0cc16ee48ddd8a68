"""The base of the LightningDataModules: training and validation loaders over shards."""

import math
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.datasets import Clips
from data.loaders import Loader, TrainLoader
from data.modules.resuming import PlanPosition, progress, resume
from data.plan import Bucket, OrderedSampler, Plan, TrainSampler
from data.shards import ShardSet
from t2v.errors import UserError, check_range

SEEDS = f"[0, {2**63 - 1}]"
"""The seeds that random generators accept."""

Paths = str | tuple[str, ...]
"""Where shards are: one path or several."""


class ShardDataModule(LightningDataModule):
    """Training and validation loaders over shards; the base of `VideoDataModule` and `TokenDataModule`.

    A run resumed from a checkpoint in the middle of an epoch continues with the next batch, with any number of workers
    and any world size.

    Args:
        train: Training shards, at one path or several.
        val: Validation shards, at one path or several.
        weights: Share of each path of `train` in an epoch; with none, every clip occurs once.
        frames: Length of a clip.
        batch_size: Clips in a batch on each rank.
        num_workers: Processes that load batches, on each rank.
        seed: Seed of all random choices, from 0 to 2⁶³ − 1.
        buckets: Kinds of training batches; with none, all are of `batch_size` clips.
        max_skipped_fraction: Fraction of an epoch's samples that cannot be used above which the run stops, in [0, 1].

    Raises:
        UserError: If an argument is out of range.
    """

    command = "python -m data.prepare"
    """The command that writes such shards, for messages."""

    def __init__(
        self,
        train: list[str] | str,
        val: list[str] | str,
        weights: list[float],
        frames: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        buckets: list[Bucket],
        max_skipped_fraction: float,
    ) -> None:
        super().__init__()
        check_range(self, "(0, inf)", **{"data.frames": frames, "data.batch_size": batch_size})
        check_range(self, "[0, inf)", **{"data.num_workers": num_workers})
        check_range(self, SEEDS, **{"data.seed": seed})
        check_range(self, "[0, 1]", **{"data.max_skipped_fraction": max_skipped_fraction})
        self.train, self.val = (path if isinstance(path, str) else tuple(path) for path in (train, val))
        self.weights = weights
        self.frames, self.batch_size = frames, batch_size
        self.num_workers, self.seed = num_workers, seed
        self.buckets, self.max_skipped_fraction = buckets, max_skipped_fraction
        self._shards: dict[Paths, ShardSet] = {}
        self._clips: dict[tuple[Paths, bool, int], Clips] = {}
        self._sampler: TrainSampler | None = None
        self._resumed: PlanPosition | None = None

    def shards(self, path: Paths) -> ShardSet:
        """Return the shards at a path; they are opened once."""
        if path not in self._shards:
            self._shards[path] = ShardSet(path, self.command)
        return self._shards[path]

    def clips(self, path: Paths, training: bool = False) -> Clips:
        """Return the clips of the shards at a path; they are opened once for each batch size, which may be tuned.

        Args:
            path: The shards.
            training: Whether buckets and augmentation apply.
        """
        key = (path, training, self.batch_size)
        if key not in self._clips:
            self._clips[key] = self._open_clips(self.shards(path), training)
        return self._clips[key]

    def protocol(self, batches: int | float = math.inf) -> dict[str, Any]:
        """Describe the clips of `validate` and `test`, so that their metrics can be compared.

        Args:
            batches: Number of batches that each rank took, if not all.

        Returns:
            Plain values for a report. `clips` is the number of clips, of which `repeated` were used twice so that all
            ranks have the same number; `corrupt` ones were replaced by others.
        """
        clips, ranks = self.clips(self.val), self._ranks()["num_replicas"]
        count = int(min(math.ceil(len(clips) / ranks), batches * self.batch_size)) * ranks
        return {
            "shards": clips.shards.path,
            "clips": count,
            "repeated": max(0, count - len(clips)),
            "corrupt": int(clips.corrupt.sum()),
            "frames": count * self.frames,
            "frames_per_clip": self.frames,
            "window": "random start in longer clips, from the seed, the same every time",
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the plan, for a checkpoint."""
        if self._sampler is None:
            return {}
        sampler = self._sampler
        position = PlanPosition(self._plan_fingerprint, sampler.num_replicas, sampler.origin, sampler.epoch)
        return {**position._asdict(), "origin": list(position.origin)}  # checkpoints hold plain values only

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position until the trainer has restored its own counts."""
        if state_dict:
            self._resumed = PlanPosition(**{**state_dict, "origin": tuple(state_dict["origin"])})

    def prepare_data(self) -> None:
        """Index shards without an index, on one rank only."""
        stage = self.trainer.state.fn if self.trainer else None
        for path in self._paths(stage or "fit"):
            self.shards(path)

    def setup(self, stage: str) -> None:
        """Open the clips that a command needs, so that mistakes are reported before it starts."""
        for path in self._paths(stage):
            if stage == "predict":
                self.shards(path)
            else:
                self.clips(path, training=stage == "fit" and path == self.train)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return random windows of the training clips, in the order of the plan."""
        clips, ranks = self.clips(self.train, training=True), self._ranks()
        plan = Plan(clips.shard_sizes, self.seed, clips.buckets, clips.fits, self._check_weights(clips), self.weights)
        self._sampler = TrainSampler(plan, **ranks)
        if len(self._sampler) == 0:
            sizes = ", ".join(f"{bucket.batch_size} clips of {bucket.frames} frames" for bucket in clips.buckets)
            raise UserError(
                f"{len(clips)} training clips in '{clips.shards.path}' do not fill one batch (data.batch_size: {sizes})"
                f" on each of {ranks['num_replicas']} ranks: lower it, or those of data.buckets, or add clips."
            )
        for bucket, samples in zip(plan.buckets, plan.samples, strict=True):
            if samples < bucket.batch_size:
                rank_zero_warn(
                    f"The bucket of {bucket.batch_size} clips of {bucket.frames} frames gets {samples} of the "
                    f"{len(clips)} clips of an epoch, which fill no batch and are left out: lower its batch_size, "
                    "raise its probability, or remove it (data.buckets)."
                )
        self._plan_fingerprint = plan.fingerprint()
        self._resume(self._sampler)
        return TrainLoader(clips, self._sampler, self._progress, self.max_skipped_fraction, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation clips in order, the same in every epoch."""
        clips = self.clips(self.val)
        sampler = OrderedSampler(len(clips), self.batch_size, self.seed, **self._ranks())
        return Loader(clips, sampler, self.max_skipped_fraction, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the validation clips."""
        return self.val_dataloader()

    def _check_weights(self, clips: Clips) -> list[int]:
        """Return the source of each training shard, after a check that there is a weight for each source."""
        if not self.weights:
            return []
        paths = [self.train] if isinstance(self.train, str) else self.train
        if (
            len(self.weights) != len(paths)
            or len(paths) < 2
            or not all(0 < weight < math.inf for weight in self.weights)
        ):
            raise UserError(
                f"data.weights={self.weights} must have a number greater than 0 for each of the {len(paths)} paths of "
                "data.train, a list of at least two: a path without weight is one to leave out."
            )
        sources = clips.shard_sources
        empty = [path for number, path in enumerate(paths) if number not in sources]
        if empty:
            raise UserError(
                f"No training clip of '{empty[0]}' can be used, or all of its shards are also in an earlier path of "
                "data.train: leave it out of data.train and data.weights."
            )
        return sources

    def _open_clips(self, shards: ShardSet, training: bool) -> Clips:
        raise NotImplementedError

    def _paths(self, stage: str) -> list[Paths]:
        """Return the shards that a command needs."""
        return {"fit": [self.train, self.val], "predict": []}.get(stage, [self.val])

    def _ranks(self) -> dict[str, int]:
        """Return world size and rank, as arguments of a `DistributedSampler`."""
        known = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return known or {"num_replicas": 1, "rank": 0}

    @property
    def _skipped_samples(self) -> Path | None:
        """The list of samples that cannot be used, in the run's folder."""
        if self.trainer is None:
            return None
        return Path(self.trainer.log_dir or self.trainer.default_root_dir) / "skipped_samples.jsonl"

    def _progress(self) -> tuple[int, int]:
        return progress(self.trainer) if self.trainer else (0, 0)

    def _resume(self, sampler: TrainSampler) -> None:
        """Continue at the position of the checkpoint, if training resumes from one."""
        position, self._resumed = self._resumed, None
        if position is None or self.trainer is None:
            return
        if position.plan == self._plan_fingerprint:
            resume(self.trainer, sampler, position)
        else:
            warnings.warn(
                f"The training clips, data.seed, data.batch_size, data.frames or data.buckets are not those of the "
                f"checkpoint: the current epoch of '{self.shards(self.train).path}' continues at the same step, but "
                "some clips may occur twice in it and others not at all.",
                stacklevel=2,
            )
