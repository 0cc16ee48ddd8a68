"""Fréchet distance between sets of clips."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from t2v.metrics import ClipFeatures, FrechetVideoDistance, MobileNetClipFeatures


class MeanColour(ClipFeatures):
    """Three features per clip."""

    name = "colour"
    num_features = 3

    def forward(self, video):
        return video.mean((1, 3, 4))

    def protocol(self):
        return {"network": "none"}


def clips(colours: torch.Tensor) -> torch.Tensor:
    return colours[:, None, :, None, None].expand(-1, 2, -1, 4, 4)


def test_it_equals_the_distance_of_two_gaussians():
    real = torch.randn(200, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.7, 0.2], [0.0, 0.0, 0.3]])
    fake = torch.randn(200, 3) * torch.tensor([0.5, 1.0, 0.4]) + 0.3
    a, b = (np.cov(x.double().numpy().T) for x in (real, fake))
    expected = (real.mean(0) - fake.mean(0)).square().sum().item()
    expected += np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)

    at_once, parts, rank = (FrechetVideoDistance(MeanColour()) for _ in range(3))
    at_once.update(clips(fake), clips(real))
    assert at_once.compute().item() == pytest.approx(expected, rel=1e-4)
    assert at_once.name == "frechet_colour"
    assert at_once.protocol() == {"network": "none", "clips": 200}

    parts.update(clips(fake[:1]), clips(real[:1]))
    parts.update(clips(fake[1:120]), clips(real[1:120]))
    rank.update(clips(fake[120:]), clips(real[120:]))
    parts.merge_state(rank)
    assert parts.compute().item() == pytest.approx(expected, rel=1e-4)


def test_one_clip_gives_nan_and_one_warning():
    metric = FrechetVideoDistance(MeanColour())
    metric.update(clips(torch.randn(1, 3)), clips(torch.randn(1, 3)))
    with pytest.warns(UserWarning, match="needs at least 2 clips but got 1"):
        assert metric.compute().isnan()
    assert metric.protocol()["clips"] == 1
    metric.reset()
    metric.update(clips(torch.randn(1, 3)), clips(torch.randn(1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().isnan()


def test_the_mobilenet_distance_grows_with_noise():
    video = torch.nn.functional.avg_pool3d(torch.rand(6, 3, 6, 40, 40), (1, 9, 9), 1).transpose(1, 2) * 2 - 1

    def distance(reconstruction: torch.Tensor) -> float:
        metric = FrechetVideoDistance(MobileNetClipFeatures())
        metric.update(reconstruction, video)
        return metric.compute().item()

    noise = torch.randn(video.shape)
    low, high = distance(video + 0.05 * noise), distance(video + 0.2 * noise)
    assert distance(video) == pytest.approx(0, abs=1e-3 * low)
    assert 0 < low < high


def test_half_of_the_mobilenet_features_describe_motion():
    features = MobileNetClipFeatures()
    still = (torch.rand(2, 1, 3, 32, 32) * 2 - 1).expand(2, 4, 3, 32, 32)
    assert features(still).shape == (2, features.num_features)
    assert features(still)[:, 32:].abs().max() < 1e-5
    torch.testing.assert_close(features(still[:, :1]), features(still), rtol=1e-4, atol=1e-4)
    assert (features(torch.rand(2, 4, 3, 32, 32))[:, 32:] > 0).any()
