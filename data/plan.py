"""The plan: which sample stands at which place of which epoch.

The plan is a pure function of (seed, epoch, place) and of how many samples each shard has. Ranks and workers only look
at it: with W ranks, rank r takes the places r, r + W, r + 2W, … . So the batches of all ranks together cover the plan
from front to back, whatever W and the number of workers are, and a position in it is one integer.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from torch.utils.data import DistributedSampler

_WINDOW = 4
"""Shards read at a time: samples mix within so many shards, and reads stay close together."""


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


def shuffled(shard_sizes: Sequence[int], seed: int, epoch: int) -> Int[np.ndarray, "samples"]:
    """The order of an epoch: shards at random, samples at random within a window of shards.

    Args:
        shard_sizes: number of samples in each shard.
        seed: seed of the run.
        epoch: number of the epoch.

    Returns:
        Index of the sample at each place; samples are counted through all shards.
    """
    rng = np.random.default_rng((seed, epoch))
    shards = [np.arange(*span) for span in pairwise([0, *accumulate(shard_sizes)])]
    order = rng.permutation(len(shards))
    windows = [np.concatenate([shards[i] for i in order[at : at + _WINDOW]]) for at in range(0, len(order), _WINDOW)]
    return np.concatenate([rng.permutation(window) for window in windows])


class PlanSampler(DistributedSampler):
    """One rank's view of the plan, as a sampler of `Draw`s.

    It is a `DistributedSampler`, so that Lightning calls `set_epoch` on it, as it would not on a batch sampler, and
    puts no sampler of its own around it.

    Args:
        shard_sizes: number of samples in each shard.
        shuffle: a new order and new random choices in every epoch, and no more places than all ranks can share
            equally. Otherwise the samples in their order, the same in every epoch; ranks that would come short start
            again at the first sample.
        seed: seed of the run.
        rank: which of the ranks this is.
        num_replicas: number of ranks.
    """

    def __init__(
        self, shard_sizes: Sequence[int], shuffle: bool, seed: int, rank: int = 0, num_replicas: int = 1
    ) -> None:
        places: Any = range(sum(shard_sizes))
        super().__init__(places, num_replicas, rank, shuffle, seed, drop_last=shuffle)
        self.shard_sizes = list(shard_sizes)

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        total = sum(self.shard_sizes)
        epoch = self.epoch if self.shuffle else 0
        order = shuffled(self.shard_sizes, self.seed, epoch) if self.shuffle else np.arange(total)
        for place in range(self.rank, self.total_size, self.num_replicas):
            yield Draw(int(order[place % total]), (self.seed, epoch, place % total))
