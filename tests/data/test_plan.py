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


def view(whole, epoch=0, rank=0, ranks=1):
    sampler = TrainSampler(whole, rank, ranks)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def samples(batches):
    return [draw.sample for batch in batches for draw in batch.draws]


def test_the_plan_is_a_function_of_seed_and_epoch():
    assert view(plan(), epoch=3) == view(plan(), epoch=3)
    assert samples(view(plan(), epoch=3)) != samples(view(plan(), epoch=4))
    assert samples(view(plan(), epoch=3)) != samples(view(plan(seed=1), epoch=3))


@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_has_every_sample_once(epoch):
    assert sorted(samples(view(plan(), epoch))) == list(range(TOTAL))


def test_what_does_not_fill_a_batch_is_left_out_other_samples_in_every_epoch():
    epochs = [samples(view(plan(batch_size=5), epoch)) for epoch in range(12)]
    assert {len(epoch) for epoch in epochs} == {35}
    assert all(len(set(epoch)) == 35 for epoch in epochs)
    assert len({left for epoch in epochs for left in set(range(TOTAL)) - set(epoch)}) > 6


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_are_views_of_the_plan(ranks):
    whole = plan(batch_size=2)
    views = [view(whole, epoch=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(one) for one in views}) == 1
    together = list(chain.from_iterable(zip(*views, strict=True)))
    assert together == view(whole, epoch=2)[: len(whole) // ranks * ranks]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_another_number_of_ranks_takes_what_is_left_of_an_epoch(before, after, steps):
    whole = plan(batch_size=2)
    taken = samples(list(whole.batches(epoch=3))[: steps * before])
    samplers = [TrainSampler(whole, rank, after) for rank in range(after)]
    rest = []
    for sampler in samplers:
        sampler.set_epoch(3)
        sampler.steps = sampler.rejoin(3, len(taken) // 2)
        rest.append(list(sampler))
        assert len(rest[-1]) == len(sampler) - sampler.steps
    seen = taken + samples(chain(*rest))
    assert len(seen) == len(set(seen))
    assert len(whole) - len(seen) // 2 < after  # all but what cannot be shared
    for sampler in samplers:
        sampler.set_epoch(4)
        sampler.steps = 0
    together = samples(chain.from_iterable(zip(*samplers, strict=True)))
    assert together == samples(whole.batches(4))[: len(samplers[0]) * after * 2]  # the next epoch begins at its front


@pytest.fixture(scope="module")
def mixed():
    """A plan over clips half of which are too short for the second bucket."""
    buckets = [Bucket(4, batch_size=3, probability=3), Bucket(8, batch_size=2, probability=1)]
    fits = np.ones((TOTAL, 2), dtype=bool)
    fits[::2, 1] = False
    return Plan(SIZES, 0, buckets, fits), fits


def test_batches_are_of_one_bucket_which_their_clips_fit(mixed):
    whole, fits = mixed
    for epoch in range(4):
        for batch in whole.batches(epoch):
            assert len(batch.draws) == whole.buckets[batch.bucket].batch_size
            assert all(fits[draw.sample, batch.bucket] for draw in batch.draws)


def test_every_epoch_has_equally_many_batches_of_each_bucket(mixed):
    whole, _ = mixed
    epochs = [Counter(batch.bucket for batch in whole.batches(epoch)) for epoch in range(8)]
    assert epochs == [{0: 11, 1: 2}] * 8  # 18 of 37 clips are long enough, of which a quarter, 4, come as long ones
    assert len(whole) == 13
    long = [{draw.sample for b in whole.batches(epoch) if b.bucket for draw in b.draws} for epoch in range(8)]
    assert len(set().union(*long)) > 10
    assert not any(len(samples(whole.batches(epoch))) != len(set(samples(whole.batches(epoch)))) for epoch in range(8))


def test_a_bucket_that_is_never_chosen_is_a_mistake():
    with pytest.raises(UserError, match="probability=0 must be greater than 0"):
        Plan([4], 0, [Bucket(4, 1, probability=0)], np.ones((4, 1), dtype=bool))


def test_plans_that_differ_have_other_fingerprints():
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
def test_validation_ranks_start_again_to_have_equal_steps(ranks):
    views = [ordered(rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(batch.draws) for batch in view) for view in views}) == 1
    together = list(chain.from_iterable(zip(*map(samples, views), strict=True)))
    assert together == [place % TOTAL for place in range(-(-TOTAL // ranks) * ranks)]


def test_random_choices_differ_between_places_and_epochs():
    draws = [draw for epoch in (0, 1) for batch in plan().batches(epoch) for draw in batch.draws]
    numbers = [draw.rng().integers(2**62) for draw in draws]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [draw.rng().integers(2**62) for draw in draws]
    assert draws[0].rng(attempt=1).integers(2**62) not in numbers


def test_reads_stay_within_a_few_shards_at_a_time():
    order = shuffled([10] * 40, np.random.default_rng(0))
    for at in range(0, 400, 40):
        assert len({index // 10 for index in order[at : at + 40]}) == 4
    assert len({index // 10 for index in order[:10]}) > 1


def test_the_order_is_nearly_as_random_as_if_all_samples_were_shuffled():
    shards, size = 200, 20
    orders = [shuffled([size] * shards, np.random.default_rng(seed)) for seed in range(5)]
    places = np.arange(shards * size)
    assert max(abs(np.corrcoef(order, places)[0, 1]) for order in orders) < 0.2  # a shuffle of shards has 1 / √200
    neighbours = [np.mean(order[1:] == order[:-1] + 1) for order in orders]
    assert max(neighbours) < 0.02  # who follows whom in the shards: 1 / 80 in a window of four
    batches = [order[:4000].reshape(-1, 16) // size for order in orders]
    mixed = np.mean([[len(set(batch)) for batch in one] for one in batches])
    assert mixed > 3.9  # of four shards, nearly all are in a batch of 16
