import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from data.plan import Bucket, OrderedSampler, Plan, TrainSampler, shuffled
from t2v.errors import UserError

SIZES = [7, 3, 12, 5, 9, 1]
TOTAL = sum(SIZES)


def plan(batch_size=1, seed=0):
    return Plan(SIZES, seed, [Bucket(frames=4, batch_size=batch_size)], np.ones((TOTAL, 1), dtype=bool))


def rank_batches(plan, epoch=0, rank=0, ranks=1):
    sampler = TrainSampler(plan, rank, ranks)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def samples(batches):
    return [draw.sample for batch in batches for draw in batch.draws]


def test_the_plan_depends_only_on_seed_and_epoch():
    assert rank_batches(plan(), epoch=3) == rank_batches(plan(), epoch=3)
    assert samples(rank_batches(plan(), epoch=3)) != samples(rank_batches(plan(), epoch=4))
    assert samples(rank_batches(plan(), epoch=3)) != samples(rank_batches(plan(seed=1), epoch=3))


@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_has_every_sample_once(epoch):
    assert sorted(samples(rank_batches(plan(), epoch))) == list(range(TOTAL))


def test_samples_that_do_not_fill_a_batch_are_left_out_and_differ_between_epochs():
    epochs = [samples(rank_batches(plan(batch_size=5), epoch)) for epoch in range(12)]
    assert {len(epoch) for epoch in epochs} == {35}
    assert all(len(set(epoch)) == 35 for epoch in epochs)
    assert len({left for epoch in epochs for left in set(range(TOTAL)) - set(epoch)}) > 6


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_take_turns_in_the_plan(ranks):
    whole = plan(batch_size=2)
    views = [rank_batches(whole, epoch=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(one) for one in views}) == 1
    joined = list(chain.from_iterable(zip(*views, strict=True)))
    assert joined == rank_batches(whole, epoch=2)[: len(whole) // ranks * ranks]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_another_world_size_takes_the_remaining_batches_of_an_epoch(before, after, steps):
    whole = plan(batch_size=2)
    taken = samples(list(whole.batches(epoch=3))[: steps * before])
    samplers = [TrainSampler(whole, rank, after) for rank in range(after)]
    rest = []
    for sampler in samplers:
        sampler.set_epoch(3)
        sampler.steps = sampler.resume(3, len(taken) // 2)
        rest.append(list(sampler))
        assert len(rest[-1]) == len(sampler) - sampler.steps
    seen = taken + samples(chain(*rest))
    assert len(seen) == len(set(seen))
    assert len(whole) - len(seen) // 2 < after  # all but what cannot be divided equally
    for sampler in samplers:
        sampler.set_epoch(4)
        sampler.steps = 0
    joined = samples(chain.from_iterable(zip(*samplers, strict=True)))
    assert (
        joined == samples(whole.batches(4))[: len(samplers[0]) * after * 2]
    )  # the next epoch starts at its first batch


@pytest.fixture(scope="module")
def mixed():
    """A plan for clips half of which are too short for the second bucket."""
    buckets = [Bucket(4, batch_size=3, probability=3.0), Bucket(8, batch_size=2, probability=1.0)]
    fits = np.ones((TOTAL, 2), dtype=bool)
    fits[::2, 1] = False
    return Plan(SIZES, 0, buckets, fits), fits


def test_the_clips_of_a_batch_fit_its_bucket(mixed):
    whole, fits = mixed
    for epoch in range(4):
        for batch in whole.batches(epoch):
            assert len(batch.draws) == whole.buckets[batch.bucket].batch_size
            assert all(fits[draw.sample, batch.bucket] for draw in batch.draws)


def test_every_epoch_has_the_same_number_of_batches_of_each_bucket(mixed):
    whole, _ = mixed
    epochs = [Counter(batch.bucket for batch in whole.batches(epoch)) for epoch in range(8)]
    assert epochs == [{0: 11, 1: 2}] * 8  # 18 of 37 clips are long enough, of which a quarter, 4, come as long ones
    assert len(whole) == 13
    long = [{draw.sample for b in whole.batches(epoch) if b.bucket == 1 for draw in b.draws} for epoch in range(8)]
    assert len(set().union(*long)) > 10
    assert not any(len(samples(whole.batches(epoch))) != len(set(samples(whole.batches(epoch)))) for epoch in range(8))


def test_a_bucket_without_probability_is_refused():
    with pytest.raises(UserError, match="probability=0 must be greater than 0"):
        Plan([4], 0, [Bucket(4, 1, probability=0.0)], np.ones((4, 1), dtype=bool))


def test_different_plans_have_different_fingerprints():
    assert plan().fingerprint() == plan().fingerprint()
    assert len({plan().fingerprint(), plan(seed=1).fingerprint(), plan(batch_size=2).fingerprint()}) == 3


def ordered(rank=0, ranks=1, batch_size=4):
    sampler = OrderedSampler(TOTAL, batch_size, 0, rank, ranks)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_validation_is_in_order_and_complete():
    assert samples(ordered()) == list(range(TOTAL))
    assert [len(batch.draws) for batch in ordered()] == [4] * 9 + [1]


@pytest.mark.parametrize("ranks", [2, 5, 50])
def test_validation_ranks_repeat_samples_to_have_equal_steps(ranks):
    views = [ordered(rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(batch.draws) for batch in view) for view in views}) == 1
    joined = list(chain.from_iterable(zip(*map(samples, views), strict=True)))
    assert joined == [position % TOTAL for position in range(math.ceil(TOTAL / ranks) * ranks)]


def test_random_choices_differ_between_positions_and_epochs():
    draws = [draw for epoch in (0, 1) for batch in plan().batches(epoch) for draw in batch.draws]
    numbers = [draw.rng().integers(2**62) for draw in draws]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [draw.rng().integers(2**62) for draw in draws]
    assert draws[0].rng(attempt=1).integers(2**62) not in numbers


def test_consecutive_samples_are_from_a_few_shards():
    order = shuffled([10] * 40, np.random.default_rng(0))
    for at in range(0, 400, 40):
        assert len({index // 10 for index in order[at : at + 40]}) == 4
    assert len({index // 10 for index in order[:10]}) > 1


def test_the_order_is_nearly_as_random_as_a_full_shuffle():
    shards, size = 200, 20
    orders = [shuffled([size] * shards, np.random.default_rng(seed)) for seed in range(5)]
    positions = np.arange(shards * size)
    assert max(abs(np.corrcoef(order, positions)[0, 1]) for order in orders) < 0.2  # a shuffle of shards has 1 / √200
    neighbours = [np.mean(order[1:] == order[:-1] + 1) for order in orders]
    assert max(neighbours) < 0.02  # neighbours in a shard that stay neighbours: 1 / 80 among four shards
    batches = [order[:4000].reshape(-1, 16) // size for order in orders]
    mixed = np.mean([[len(set(batch)) for batch in one] for one in batches])
    assert mixed > 3.9  # a batch of 16 has samples of nearly all four shards


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 1.0), (18, 18)), ((5.0, 1.0), (30, 6)), ((0.1, 0.9), (4, 32))])
def test_weights_are_the_shares_of_the_sources(weights, shares):
    sizes, sources = [4, 8, 12, 12], [0, 0, 1, 1]
    fits = np.ones((36, 2), dtype=bool)
    fits[::3, 1] = False
    plan = Plan(sizes, 0, [Bucket(4, 1), Bucket(8, 1)], fits, sources, weights)
    epochs = [[(batch.bucket, batch.draws[0].sample) for batch in plan.batches(epoch)] for epoch in range(3)]
    for epoch in epochs:
        samples = [sample for _, sample in epoch]
        assert tuple(np.bincount(np.array(samples) >= 12)) == shares
        assert all(fits[sample, bucket] for bucket, sample in epoch)
        times = np.bincount(samples, minlength=36)
        for first, last, share in ((0, 12, shares[0]), (12, 36, shares[1])):
            assert set(times[first:last]) <= {
                share // (last - first),
                share // (last - first) + 1,
                share // (last - first) + 2,
            }
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(bucket for bucket, _ in epoch)) for epoch in epochs}) == 1
    assert epochs[1] == [(batch.bucket, batch.draws[0].sample) for batch in plan.batches(1)]
    assert plan.fingerprint() != Plan(sizes, 0, [Bucket(4, 1), Bucket(8, 1)], fits).fingerprint()
