from itertools import chain

import pytest

from data.plan import PlanSampler, shuffled

SIZES = [7, 3, 12, 5, 9, 1]
TOTAL = sum(SIZES)


def plan(epoch=0, rank=0, ranks=1, shuffle=True, seed=0):
    sampler = PlanSampler(SIZES, shuffle, seed, rank, ranks)
    sampler.set_epoch(epoch)
    draws = list(sampler)
    assert len(draws) == len(sampler)
    return draws


def test_the_plan_is_a_function_of_seed_and_epoch():
    assert plan(epoch=3) == plan(epoch=3)
    assert plan(epoch=3) != plan(epoch=4)
    assert plan(epoch=3) != plan(epoch=3, seed=1)


@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_has_every_sample_once(epoch):
    assert sorted(draw.sample for draw in plan(epoch)) == list(range(TOTAL))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_are_views_of_the_plan(ranks):
    views = [plan(epoch=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(view) for view in views}) == 1
    together = list(chain.from_iterable(zip(*views, strict=True)))
    assert together == plan(epoch=2)[: TOTAL // ranks * ranks]


def test_validation_is_in_order_and_the_same_in_every_epoch():
    assert [draw.sample for draw in plan(shuffle=False)] == list(range(TOTAL))
    assert plan(epoch=0, shuffle=False) == plan(epoch=7, shuffle=False)


@pytest.mark.parametrize("ranks", [2, 5, 50])
def test_validation_ranks_start_again_to_have_equal_steps(ranks):
    views = [plan(rank=rank, ranks=ranks, shuffle=False) for rank in range(ranks)]
    assert len({len(view) for view in views}) == 1
    together = list(chain.from_iterable(zip(*views, strict=True)))
    assert together[:TOTAL] == plan(shuffle=False)
    assert together[TOTAL:] == plan(shuffle=False)[: len(together) - TOTAL]


def test_random_choices_differ_between_places_and_epochs():
    draws = [*plan(epoch=0), *plan(epoch=1)]
    numbers = [draw.rng().integers(2**62) for draw in draws]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [draw.rng().integers(2**62) for draw in draws]
    assert draws[0].rng(attempt=1).integers(2**62) not in numbers


def test_reads_stay_within_a_few_shards_at_a_time():
    order = shuffled([10] * 40, seed=0, epoch=0)
    for at in range(0, 400, 40):
        assert len({index // 10 for index in order[at : at + 40]}) == 4
    assert len({index // 10 for index in order[:10]}) > 1
