"""Sampling against the logits warpers of `transformers`."""

from itertools import combinations

import pytest
import torch
from transformers.generation import logits_process as reference

from t2v.errors import UserError
from t2v.generation import Interval, Linear, Sampler
from t2v.generation.sampling import GumbelNoise

WARPERS = {
    "temperature": (1.3, reference.TemperatureLogitsWarper),
    "top_k": (20, reference.TopKLogitsWarper),
    "top_p": (0.9, reference.TopPLogitsWarper),
    "typical_p": (0.8, reference.TypicalLogitsWarper),
    "min_p": (0.02, reference.MinPLogitsWarper),
}
"""In the order in which they are applied."""
COMBINATIONS = [names for size in range(1, 6) for names in combinations(WARPERS, size)]


def logits(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_all_combinations_of_filters_equal_those_of_transformers(names):
    expected = logits()
    for name in names:
        value, warper = WARPERS[name]
        expected = warper(value)(None, expected)
    found = Sampler(**{name: WARPERS[name][0] for name in names}).filter(logits())
    torch.testing.assert_close(found, expected)
    assert found.isfinite().any(-1).all()


@pytest.mark.parametrize(
    ("arguments", "warper"),
    [
        ({"temperature": 0.1}, reference.TemperatureLogitsWarper(0.1)),
        ({"top_k": 1}, reference.TopKLogitsWarper(1)),
        ({"top_k": 500}, reference.TopKLogitsWarper(500)),
        ({"top_p": 0.01}, reference.TopPLogitsWarper(0.01)),
        ({"typical_p": 0.05}, reference.TypicalLogitsWarper(0.05)),
        ({"min_p": 1.0}, reference.MinPLogitsWarper(1.0)),
    ],
)
def test_extreme_filters_equal_those_of_transformers(arguments, warper):
    torch.testing.assert_close(Sampler(**arguments).filter(logits()), warper(None, logits()))


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_a_total_probability_of_1_filters_nothing(name):
    """Not even in the tail, where the cumulative sum rounds to 1."""
    peaked = logits() * 10
    assert torch.equal(Sampler(**{name: 1.0}).filter(peaked), peaked)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = GumbelNoise([0], 4000, 4, 1, torch.device("cpu"))
    noise.reach(0, 0, 1)
    draws = Sampler()(probabilities.log().expand(4000, 4), noise.at(torch.arange(4000)[None])[0])
    frequencies = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(frequencies, probabilities, atol=0.025, rtol=0)


def test_a_schedule_changes_the_temperature_from_frame_to_frame():
    sampler = Sampler(temperature=Linear(2.0, 0.5), top_k=9)
    for frame, temperature in enumerate((2.0, 1.5, 1.0, 0.5)):
        expected = Sampler(temperature=temperature, top_k=9).filter(logits())
        torch.testing.assert_close(sampler.filter(logits(), frame, 4), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be greater than 0"),
        ({"temperature": float("nan")}, "temperature=nan must be greater than 0"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"typical_p": 0.0}, r"typical_p=0.0 must lie in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p=-0.1 must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Linear(1.0, 0.0), "temperature=0.0 at frame 2 of 3"),
        (Interval(-1.0, 0.5, 0.5), "temperature=-1.0 at frame 1 of 3"),
    ],
)
def test_a_scheduled_temperature_out_of_range_is_refused(schedule, message):
    sampler = Sampler(temperature=schedule)
    with pytest.raises(UserError, match=message):
        [sampler.filter(logits(1), frame, 3) for frame in range(3)]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.8, 0.99])
def test_a_draw_with_top_p_is_the_largest_sum_of_the_kept_tokens(p):
    # From nearly uniform rows, of which many draws are excluded, to nearly certain ones.
    logits = torch.randn(400, 50) * torch.logspace(-2, 2, 400)[:, None]
    noise = -torch.rand(400, 50).log().neg().log()
    sampler = Sampler(top_p=p)

    drawn = sampler(logits, noise)

    assert torch.equal(drawn, (sampler.filter(logits) + noise).argmax(dim=-1))
    assert (drawn != (logits + noise).argmax(dim=-1)).any()


def test_the_noise_has_the_same_type_whatever_the_default_is():
    noises = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            noise = GumbelNoise([1], 4, 16, 1, torch.device("cpu"))
            noise.reach(0, 0, 1)
            noises.append(noise.at(torch.arange(4)[None]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*noises)
