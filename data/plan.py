"""The plan: which samples make up which batch of which epoch.

The plan is a pure function of (seed, epoch) and of the samples' shards and lengths; ranks and workers read parts of it.
With world size W, rank r takes the batches r, r + W, r + 2W, …, so that the ranks together work through the plan from
start to end, whatever the world size and the number of workers, and a position in the plan is one integer.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Real
from torch.utils.data import DistributedSampler, SequentialSampler

from t2v.errors import UserError, check_range

_SHARDS_MIXED = 4
"""Shards whose samples are shuffled together, so that reads stay within these shards for a while."""


@dataclass(frozen=True)
class Bucket:
    """Length, size and number of the clips in a batch.

    Attributes:
        frames: Length of a clip.
        batch_size: Clips in a batch on each rank.
        probability: Weight, relative to the other buckets', with which a clip that is long enough gets into this one.
        height: Height of a clip in pixels, a multiple of the tokenizer's stride; `data.size` by default.
        width: Width of a clip in pixels; `data.size` by default.
        start: Where the window of a longer clip starts: at a random frame, or at the first.

    Raises:
        UserError: If a size is out of range.
    """

    frames: int
    batch_size: int
    probability: float = 1.0
    height: int | None = None
    width: int | None = None
    start: Literal["random", "first"] = "random"

    def __post_init__(self) -> None:
        sizes = {"frames": self.frames, "batch_size": self.batch_size, "height": self.height, "width": self.width}
        check_range("data.buckets", "[1, inf)", **sizes)


class Draw(NamedTuple):
    """One sample of a batch, with the seed of its random choices."""

    sample: int
    """Index of the sample, counted through all shards."""
    seed: tuple[int, int, int]
    """Seed of the run, epoch, and position in the epoch."""

    def rng(self, attempt: int = 0) -> np.random.Generator:
        """Return the generator of all random choices for this draw; it is the same in every process.

        Args:
            attempt: Number of corrupt clips that were loaded for this draw before.
        """
        return np.random.default_rng((*self.seed, attempt))


class Batch(NamedTuple):
    """One batch of one rank."""

    bucket: int
    """Index of the bucket."""
    draws: list[Draw]


class Plan:
    """The training batches of every epoch.

    An epoch has every sample at most once. Shards are shuffled, and samples are shuffled within groups of a few shards.
    Samples that do not fill a batch are left out; they differ from epoch to epoch. All epochs have the same number of
    batches, and the same number of each bucket.

    Args:
        shard_sizes: Number of samples in each shard.
        seed: Seed of the run.
        buckets: The kinds of batches.
        fits: Whether each sample is long enough for each bucket; each sample fits at least one.
        sources: Number of the source of each shard, if there are weights.
        weights: Share of each source in an epoch, which has as many draws as there are samples: samples of a source
            whose share is larger than its size occur several times, and of a smaller share others in each epoch. With
            none, every sample occurs once.

    Raises:
        UserError: If a bucket's probability is not positive.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        buckets: Sequence[Bucket],
        fits: Bool[np.ndarray, "samples buckets"],
        sources: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        wrong = [bucket for bucket in buckets if not 0 < bucket.probability < math.inf]
        if wrong:
            raise UserError(
                f"A bucket's probability={wrong[0].probability:g} must be greater than 0: leave the bucket out instead."
            )
        self.shard_sizes, self.seed, self.buckets = list(shard_sizes), seed, list(buckets)
        # Samples of one kind fit the same buckets, and with weights have the same source.
        features = np.column_stack([fits, np.repeat(sources, shard_sizes)]) if weights else fits
        kinds, self._kind = np.unique(features, axis=0, return_inverse=True)
        self._draws = np.bincount(self._kind)  # number of draws of each kind
        if weights:
            of_source = _apportion(len(fits), np.array(weights))
            for source, draws in enumerate(of_source.tolist()):
                chosen = kinds[:, -1] == source
                self._draws[chosen] = _apportion(draws, self._draws[chosen])
            kinds = kinds[:, :-1]
        self._weights = list(weights)
        probabilities = np.array([bucket.probability for bucket in buckets])
        self._counts = [  # of each kind: number of draws in each bucket
            _apportion(draws, probabilities * fit) for draws, fit in zip(self._draws.tolist(), kinds, strict=True)
        ]
        samples = np.sum(self._counts, axis=0)
        self.samples: list[int] = samples.tolist()
        """Samples of an epoch in each bucket, those that fill no batch included."""
        self._length = int(sum(samples // [bucket.batch_size for bucket in buckets]))

    def __len__(self) -> int:
        """Return the number of batches in an epoch, of all ranks together."""
        return self._length

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the batches."""
        mixture = (self._weights,) if self._weights else ()
        arguments = repr((self.shard_sizes, self.seed, self.buckets, self._kind.tolist(), *mixture))
        return hashlib.sha256(arguments.encode()).hexdigest()[:16]

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch in order."""
        rng = np.random.default_rng((self.seed, epoch))
        shards = self._draw_shards(rng)
        samples = np.concatenate(shards)
        order = shuffled([len(shard) for shard in shards], rng)
        buckets = np.zeros(len(order), dtype=np.int64)
        for kind, counts in enumerate(self._counts):
            buckets[self._kind[samples] == kind] = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        pending: list[list[Draw]] = [[] for _ in self.buckets]
        for position, draw in enumerate(order.tolist()):
            bucket = int(buckets[draw])
            pending[bucket].append(Draw(int(samples[draw]), (self.seed, epoch, position)))
            if len(pending[bucket]) == self.buckets[bucket].batch_size:
                yield Batch(bucket, pending[bucket])
                pending[bucket] = []

    def _draw_shards(self, rng: np.random.Generator) -> list[Int[np.ndarray, " samples"]]:
        """Return the samples of an epoch by shard; a shard occurs again for samples that are drawn several times."""
        times = np.ones(len(self._kind), dtype=np.int64)
        if self._weights:
            for kind, draws in enumerate(self._draws.tolist()):
                samples = np.flatnonzero(self._kind == kind)
                times[samples] = draws // len(samples)
                times[rng.choice(samples, draws % len(samples), replace=False)] += 1
        shards = [np.arange(start, stop) for start, stop in pairwise([0, *accumulate(self.shard_sizes)])]
        drawn = [shard[times[shard] > n] for n in range(int(times.max(initial=0))) for shard in shards]
        return [shard for shard in drawn if len(shard)]


def shuffled(shard_sizes: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " samples"]:
    """Return a random order of all samples: shards shuffled, and samples shuffled within groups of a few shards.

    Args:
        shard_sizes: Number of samples in each shard.
        rng: Generator of the order.

    Returns:
        Index of the sample at each position, counted through all shards.
    """
    shards = [np.arange(start, stop) for start, stop in pairwise([0, *accumulate(shard_sizes)])]
    order = rng.permutation(len(shards))
    groups = [order[start : start + _SHARDS_MIXED] for start in range(0, len(order), _SHARDS_MIXED)]
    return np.concatenate([rng.permutation(np.concatenate([shards[i] for i in group])) for group in groups])


class PlanSampler(DistributedSampler[Any], SequentialSampler):
    """Batches of one rank in a fixed order; the base of `TrainSampler` and `OrderedSampler`.

    Lightning neither wraps a `DistributedSampler` in one of its own nor replaces a `SequentialSampler` for
    ``overfit_batches``.
    """


class TrainSampler(PlanSampler):
    """The batches of the plan that one rank has still to train on in an epoch.

    Args:
        plan: The plan.
        rank: This rank.
        num_replicas: World size. All ranks have the same number of batches; the last few batches are left out for that.

    Attributes:
        steps: Number of steps of this epoch that are done.
        origin: An epoch that was started with another world size, and the position in the plan at which its first step
            would have been with this one; see `resume`.
    """

    def __init__(self, plan: Plan, rank: int = 0, num_replicas: int = 1) -> None:
        positions: Any = range(len(plan))
        super().__init__(positions, num_replicas, rank, drop_last=True)
        self.plan, self.steps = plan, 0
        self.origin = (-1, 0)

    def __len__(self) -> int:
        """Return the number of batches in a complete epoch."""
        return len(self.plan) // self.num_replicas

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        first = self.first_batch(self.epoch)
        start = first + self.steps * self.num_replicas + self.rank
        stop = first + len(self) * self.num_replicas
        yield from islice(self.plan.batches(self.epoch), start, stop, self.num_replicas)

    def first_batch(self, epoch: int) -> int:
        """Return the position in the plan of the epoch's first batch."""
        resumed_epoch, first = self.origin
        return first if epoch == resumed_epoch else 0

    def resume(self, epoch: int, batches: int) -> int:
        """Continue an epoch that was started with another world size.

        Args:
            epoch: The epoch.
            batches: Number of batches of the plan that are done.

        Returns:
            Number of steps with this world size that count as done.
        """
        steps = len(self) - (len(self.plan) - batches) // self.num_replicas
        self.origin = (epoch, batches - steps * self.num_replicas)
        return steps


class OrderedSampler(PlanSampler):
    """One rank's batches of all samples in order, the same in every epoch.

    Args:
        samples: Number of samples.
        batch_size: Samples in a batch; the last may have fewer.
        seed: Seed of the run.
        rank: This rank.
        num_replicas: World size. If the samples cannot be divided equally, the first ones are repeated at the end.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, num_replicas: int = 1) -> None:
        positions: Any = range(samples)
        super().__init__(positions, num_replicas, rank, shuffle=False)
        self.samples, self.batch_size, self.run_seed = samples, batch_size, seed

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        indices = [position % self.samples for position in range(self.rank, self.total_size, self.num_replicas)]
        for start in range(0, len(indices), self.batch_size):
            yield Batch(0, [Draw(i, (self.run_seed, 0, i)) for i in indices[start : start + self.batch_size]])


def _apportion(total: int, weights: Real[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return integers that add up to `total`, in proportion to the weights as far as possible."""
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest_remainders] += 1
    return counts
