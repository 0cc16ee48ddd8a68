"""The terms of the loss."""

import pytest
import torch

from t2v.errors import UserError
from t2v.vqvae.losses import L1Loss, L2Loss, LPIPSLoss, MobileNetLoss, TemporalDifferenceLoss


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_constant_error_is_no_temporal_error(video):
    assert TemporalDifferenceLoss()(video + 0.1, video).item() == pytest.approx(0, abs=1e-6)
    assert L1Loss()(video + 0.1, video).item() == pytest.approx(0.1, rel=1e-4)
    assert L2Loss()(video + 0.1, video).item() == pytest.approx(0.01, rel=1e-3)


def test_flicker_is_a_temporal_error(video):
    flicker = torch.tensor([0.1, -0.1, 0.1])[None, :, None, None, None]
    assert TemporalDifferenceLoss()(video + flicker, video).item() == pytest.approx(0.2, rel=1e-4)


def test_a_picture_has_no_temporal_error(video):
    assert TemporalDifferenceLoss()(video[:, :1] + 1, video[:, :1]).item() == 0


def test_mobilenet_prefers_a_shift_of_brightness_to_noise(video):
    smooth = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 9, 1, 4).unflatten(0, (2, 3))
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    term = MobileNetLoss()
    assert term(smooth, smooth).item() == pytest.approx(0, abs=1e-6)
    assert term(smooth + 0.1, smooth) < term(smooth + noise, smooth)


def test_mobilenet_passes_gradients_to_the_reconstruction_alone(video):
    reconstruction = video.clone().requires_grad_()
    term = MobileNetLoss(frames=2)
    term(reconstruction, video.flip(0)).backward()
    touched = reconstruction.grad.flatten(0, 1).abs().sum((1, 2, 3)) > 0
    assert touched.sum() == 2
    assert all(parameter.grad is None for parameter in term.network.parameters())


def test_missing_lpips_weights_say_where_to_put_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is not there"):
        LPIPSLoss()
    damaged = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"a web page that says no")
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is damaged"):
        LPIPSLoss()
