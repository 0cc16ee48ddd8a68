"""Codebook usage and perplexity."""

import pytest
import torch

from t2v.metrics import CodebookUsage


def test_evenly_used_codes_and_a_single_code():
    metric = CodebookUsage(8)
    metric.update(torch.arange(8).view(2, 2, 2))
    values = metric.compute()
    assert values["usage"] == 1
    assert values["perplexity"].item() == pytest.approx(8)

    metric.reset()
    metric.update(torch.full((3, 4), 5))
    values = metric.compute()
    assert values["usage"].item() == pytest.approx(1 / 8)
    assert values["perplexity"].item() == pytest.approx(1)


def test_batches_are_counted_together():
    tokens = torch.randint(0, 16, (6, 3, 2, 2))
    at_once, parts = CodebookUsage(16), CodebookUsage(16)
    at_once.update(tokens)
    for part in tokens.split([1, 3, 2]):
        parts.update(part)
    assert at_once.compute() == parts.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_tokens():
    values = CodebookUsage(4).compute()
    assert values["usage"] == 0
    assert values["perplexity"] == 1


@pytest.mark.parametrize(
    ("tokens", "collapsed"),
    [
        (torch.zeros(4000, dtype=torch.long), True),
        (torch.arange(4000) % 50, True),
        (torch.cat([torch.arange(1024), torch.zeros(10**6, dtype=torch.long)]), True),
        (torch.cat([torch.arange(1024), torch.arange(10**6) % 2]), True),
        (torch.cat([torch.arange(4000) % 300, torch.zeros(40_000, dtype=torch.long)]), False),  # a plain background
        (torch.arange(4000) % 300, False),
        (torch.arange(64), False),  # so few tokens cannot use more codes
    ],
)
def test_a_collapse_is_reported(tokens, collapsed):
    metric = CodebookUsage(1024)
    metric.update(tokens)
    assert metric.collapse().startswith("The codebook has collapsed") == collapsed
