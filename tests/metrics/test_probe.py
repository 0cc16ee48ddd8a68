"""The linear map from features to attributes, and accuracies with their intervals."""

import math

import pytest
import torch

from t2v.errors import UserError
from t2v.metrics import Accuracy, LinearProbe
from t2v.metrics.probe import _PENALTIES, _ridge, accuracies


def make(clips: int, noise: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(5, 40, generator=torch.Generator().manual_seed(9))
    who, action = torch.randint(3, (clips,), generator=generator), torch.randint(2, (clips,), generator=generator)
    features = directions[who] + directions[3 + action] + noise * torch.randn(clips, 40, generator=generator)
    return features * torch.logspace(-3, 3, 40), [
        {"who": "abc"[w], "action": "xy"[a]} for w, a in zip(who.tolist(), action.tolist(), strict=True)
    ]


def test_attributes_of_other_clips_are_found_with_more_and_with_fewer_clips_than_features():
    for clips in (300, 30):
        probe = LinearProbe(*make(clips, 0.3, seed=0))
        found = probe.accuracy(*make(200, 0.3, seed=1))
        assert list(found) == ["who", "action", "all"]
        assert found["all"].value > 0.95
    noise = torch.randn(200, 40)
    assert probe.accuracy(noise, make(200, 0.3, seed=1)[1])["who"].value < 0.6


@pytest.mark.parametrize("clips", [30, 60])
def test_the_penalty_has_the_smallest_error_of_clips_that_were_left_out(clips):
    x, y = torch.randn(2, clips, 40, generator=torch.Generator().manual_seed(clips), dtype=torch.float64)
    x, y = x - x.mean(0), y[:, :3] + x[:, :3]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    errors = {}
    for penalty in _PENALTIES:
        amount, error = penalty * s.square().mean(), 0.0
        for i in range(clips):
            kept = torch.arange(clips) != i
            mean, offset = x[kept].mean(0), y[kept].mean(0)
            centred = x[kept] - mean
            weight = torch.linalg.solve(centred.T @ centred + amount * torch.eye(40), centred.T @ (y[kept] - offset))
            error += float(((x[i] - mean) @ weight + offset - y[i]).square().sum())
        errors[penalty] = error
    best = min(errors, key=errors.__getitem__)
    expected = torch.linalg.solve(x.T @ x + best * s.square().mean() * torch.eye(40), x.T @ (y - y.mean(0)))
    torch.testing.assert_close(vh.T @ _ridge(u, s, y - y.mean(0)), expected)


def test_an_accuracy_has_wilsons_interval():
    accuracy = Accuracy.of([True] * 8 + [False] * 2)
    assert accuracy[:3] == (8, 10, 0.8)
    assert accuracy[3:] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Accuracy.of([True] * 10)[3:] == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert math.isnan(Accuracy.of([]).value)


def test_all_attributes_of_a_clip_must_be_right_together():
    truths = [{"who": "a", "action": "x"}, {"who": "b", "action": "y"}]
    found = accuracies([{"who": "a", "action": "y", "other": "?"}, {"who": "b", "action": "y"}], truths)
    assert {name: accuracy.correct for name, accuracy in found.items()} == {"who": 2, "action": 1, "all": 1}


def test_clips_with_different_attributes_are_refused():
    with pytest.raises(UserError, match="at least 2 clips with the same attributes, but got 2"):
        LinearProbe(torch.randn(2, 4), [{"who": "a"}, {"action": "x"}])
