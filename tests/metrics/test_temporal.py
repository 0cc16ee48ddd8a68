"""Flicker and warping error."""

import pytest
import torch

from t2v.metrics import Flicker, WarpError


@pytest.fixture
def video():
    return torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_constant_error_does_not_flicker(video):
    metric = Flicker()
    metric.update(video + 0.3, video)
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_an_error_of_changing_sign_flickers(video):
    error = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1])[None, :, None, None, None]
    metric = Flicker()
    metric.update(video + error, video)
    assert metric.compute().item() == pytest.approx(0.2, rel=1e-5)


def test_every_frame_pair_has_the_same_weight(video):
    noisy = video + torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    at_once, parts = Flicker(), Flicker()
    at_once.update(noisy, video)
    parts.update(noisy[:, :2], video[:, :2])
    parts.update(noisy[:, 1:], video[:, 1:])
    assert parts.compute().item() == pytest.approx(at_once.compute().item(), rel=1e-5)


def test_pictures_add_nothing(video):
    metric = Flicker()
    metric.update(video[:, :1], video[:, :1] + 1)
    assert metric.compute() == 0


@pytest.fixture
def still():
    """A video without motion, so that its flow is zero."""
    return (torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).expand(2, 5, 3, 32, 32)


def measure(reconstruction: torch.Tensor, video: torch.Tensor) -> float:
    metric = WarpError()
    metric.update(reconstruction, video)
    return metric.compute().item()


def test_warp_error_is_a_mean_squared_error_of_pixels_from_0_to_1(still):
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[None, :, None, None, None]
    assert measure(still * 0.5, still) == pytest.approx(0, abs=1e-8)
    assert measure(still + 0.1 * signs, still) == pytest.approx(0.01, rel=1e-3)


def test_warp_error_of_a_flickering_reconstruction_is_above_that_of_a_steady_one():
    noise = torch.rand(1, 3, 20, 20)
    picture = torch.nn.functional.interpolate(noise, (80, 80), mode="bicubic")[0].clamp(0, 1) * 2 - 1
    video = torch.stack([picture[:, 8:72, 8 - 2 * t : 72 - 2 * t] for t in range(4)])[None]
    steady, flickering = video + 0.05, video + 0.05 * torch.randn(1, 4, 1, 1, 1)
    assert measure(steady, video) == pytest.approx(measure(video, video), rel=1e-3)
    assert measure(flickering, video) > 1.5 * measure(steady, video)
    frozen = video[:, :1].expand_as(video)  # no flicker, but no motion either
    assert measure(frozen, video) > 10 * measure(steady, video)


def test_warp_error_over_batches_and_ranks(still):
    noisy = still + torch.randn(still.shape) * 0.1
    at_once, parts, rank = WarpError(), WarpError(), WarpError()
    at_once.update(noisy, still)
    parts.update(noisy[:1], still[:1])
    parts.update(noisy[:, :1], still[:, :1])  # pictures add nothing
    rank.update(noisy[1:], still[1:])
    parts.merge_state(rank)
    assert parts.compute().item() == pytest.approx(at_once.compute().item(), rel=1e-5)
    assert at_once.protocol()["flow"] == "DIS"
