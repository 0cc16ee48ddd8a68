"""The plan: which samples make up which batch of which epoch.

The plan is a pure function of (seed, epoch) and of the samples' shards and lengths. Ranks and workers only look at it:
with W ranks, rank r takes the batches r, r + W, r + 2W, … . So the ranks together cover the plan from front to back,
whatever W and the number of workers are, and a position in it is one integer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from torch.utils.data import DistributedSampler

from t2v.errors import UserError

_WINDOW = 4
"""Shards read at a time: samples mix within so many shards, and reads stay close together."""


@dataclass(frozen=True)
class Bucket:
    """What the clips of a batch have in common.

    Attributes:
        frames: length of a clip.
        batch_size: clips in a batch on each rank.
        probability: weight with which a clip that is long enough comes into this bucket, beside those of the others.
        height: of a clip in pixels, a multiple of the tokenizer's stride; `data.size` where it is not given.
        width: of a clip in pixels.
        start: where a window of a longer clip begins: anywhere, or at its first frame.
    """

    frames: int
    batch_size: int
    probability: float = 1.0
    height: int | None = None
    width: int | None = None
    start: Literal["random", "first"] = "random"


class Draw(NamedTuple):
    """What stands at one place of the plan."""

    sample: int
    """Which sample, counted through all shards."""
    seed: tuple[int, int, int]
    """Seed, epoch and place."""

    def rng(self, attempt: int = 0) -> np.random.Generator:
        """Where every random choice for this place comes from, in whichever process it is made.

        Args:
            attempt: how many clips have turned out broken at this place.
        """
        return np.random.default_rng((*self.seed, attempt))


class Batch(NamedTuple):
    """One batch of one rank."""

    bucket: int
    """Which of the buckets."""
    draws: list[Draw]


class Plan:
    """The batches of every epoch of training.

    Each epoch has every sample at most once: shards come at random, samples at random within a window of shards. What
    does not fill a batch is left out, other samples in every epoch. All epochs have equally many batches, and equally
    many of each bucket.

    Args:
        shard_sizes: number of samples in each shard.
        seed: seed of the run.
        buckets: what batches there are.
        fits: whether a sample is long enough for a bucket; each is for one at least.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        buckets: Sequence[Bucket],
        fits: Bool[np.ndarray, "samples buckets"],
    ) -> None:
        if wrong := [bucket for bucket in buckets if bucket.probability <= 0]:
            raise UserError(
                f"A bucket's probability={wrong[0].probability:g} must be greater than 0: leave the bucket out instead."
            )
        self.shard_sizes, self.seed, self.buckets = list(shard_sizes), seed, list(buckets)
        kinds, self._kind = np.unique(fits, axis=0, return_inverse=True)
        weights = np.array([bucket.probability for bucket in buckets])
        self._shares = [  # how many samples of a kind come into each bucket
            _apportion(int((self._kind == kind).sum()), weights * fit) for kind, fit in enumerate(kinds)
        ]
        counts = np.sum(self._shares, axis=0)
        self._length = int(sum(counts // [bucket.batch_size for bucket in buckets]))

    def __len__(self) -> int:
        """Number of batches in an epoch, of all ranks together."""
        return self._length

    def fingerprint(self) -> str:
        """A hash of all that the batches depend on."""
        told = repr((self.shard_sizes, self.seed, self.buckets, self._kind.tolist()))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        order = shuffled(self.shard_sizes, rng)
        buckets = np.zeros(len(order), dtype=np.int64)
        for kind, share in enumerate(self._shares):
            buckets[self._kind == kind] = rng.permutation(np.repeat(np.arange(len(share)), share))
        filling: list[list[Draw]] = [[] for _ in self.buckets]
        for place, sample in enumerate(order.tolist()):
            bucket = int(buckets[sample])
            filling[bucket].append(Draw(sample, (self.seed, epoch, place)))
            if len(filling[bucket]) == self.buckets[bucket].batch_size:
                yield Batch(bucket, filling[bucket])
                filling[bucket] = []


def shuffled(shard_sizes: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, "samples"]:
    """An order of samples: shards at random, samples at random within a window of shards.

    Args:
        shard_sizes: number of samples in each shard.
        rng: where the order comes from.

    Returns:
        Index of the sample at each place; samples are counted through all shards.
    """
    shards = [np.arange(*span) for span in pairwise([0, *accumulate(shard_sizes)])]
    order = rng.permutation(len(shards))
    windows = [np.concatenate([shards[i] for i in order[at : at + _WINDOW]]) for at in range(0, len(order), _WINDOW)]
    return np.concatenate([rng.permutation(window) for window in windows])


class TrainSampler(DistributedSampler):
    """One rank's view of the plan: the batches that are still to come in an epoch.

    A `DistributedSampler`, so that Lightning puts no sampler of its own around it.

    Args:
        plan: the plan.
        rank: which of the ranks this is.
        num_replicas: number of ranks; each has the same number of batches, and the last few are left out for that.

    Attributes:
        steps: how many steps of this epoch are done.
        origin: the epoch that another number of ranks began, and where in the plan its first step would have been for
            this one.
    """

    def __init__(self, plan: Plan, rank: int = 0, num_replicas: int = 1) -> None:
        places: Any = range(len(plan))
        super().__init__(places, num_replicas, rank, drop_last=True)
        self.plan, self.steps = plan, 0
        self.origin = (-1, 0)

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.plan) // self.num_replicas

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        first = self.first_batch(self.epoch)
        start, stop = (first + step * self.num_replicas for step in (self.steps, len(self)))
        yield from islice(self.plan.batches(self.epoch), start + self.rank, stop, self.num_replicas)

    def first_batch(self, epoch: int) -> int:
        """Which batch of the plan is the first of the epoch."""
        began, origin = self.origin
        return origin if began == epoch else 0

    def rejoin(self, epoch: int, taken: int) -> int:
        """Go on in an epoch that another number of ranks began.

        Args:
            epoch: the epoch.
            taken: how many batches of the plan they have taken.

        Returns:
            How many steps of this number of ranks count as done.
        """
        steps = len(self) - (len(self.plan) - taken) // self.num_replicas
        self.origin = (epoch, taken - steps * self.num_replicas)
        return steps


class OrderedSampler(DistributedSampler):
    """One rank's batches of all samples in their order, the same in every epoch.

    Args:
        samples: number of samples.
        batch_size: samples in a batch; the last may have fewer.
        seed: seed of the run.
        rank: which of the ranks this is.
        num_replicas: number of ranks; where they would come short of equal shares, they start again at the first
            sample.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, num_replicas: int = 1) -> None:
        places: Any = range(samples)
        super().__init__(places, num_replicas, rank, shuffle=False)
        self.samples, self.batch_size, self.run_seed = samples, batch_size, seed

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        places = [place % self.samples for place in range(self.rank, self.total_size, self.num_replicas)]
        for at in range(0, len(places), self.batch_size):
            yield Batch(0, [Draw(i, (self.run_seed, 0, i)) for i in places[at : at + self.batch_size]])


def _apportion(total: int, weights: np.ndarray) -> Int[np.ndarray, "n"]:
    """Whole numbers that add up to `total`, as near as can be in proportion to the weights."""
    wanted = total * weights / weights.sum()
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: total - counts.sum()]] += 1
    return counts
