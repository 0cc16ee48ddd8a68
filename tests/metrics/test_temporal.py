import pytest
import torch

from t2v.metrics import Flicker


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


def test_every_frame_pair_weighs_the_same(video):
    noisy = video + torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    whole, parts = Flicker(), Flicker()
    whole.update(noisy, video)
    parts.update(noisy[:, :2], video[:, :2])
    parts.update(noisy[:, 1:], video[:, 1:])
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-5)


def test_pictures_add_nothing(video):
    metric = Flicker()
    metric.update(video[:, :1], video[:, :1] + 1)
    assert metric.compute() == 0
