import pytest
import torch

from t2v.metrics import CodebookUsage


def test_an_even_spread_and_a_single_code():
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


def test_batches_count_together():
    tokens = torch.randint(0, 16, (6, 3, 2, 2))
    whole, parts = CodebookUsage(16), CodebookUsage(16)
    whole.update(tokens)
    for part in tokens.split([1, 3, 2]):
        parts.update(part)
    assert whole.compute() == parts.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen():
    values = CodebookUsage(4).compute()
    assert values["usage"] == 0
    assert values["perplexity"] == 1
