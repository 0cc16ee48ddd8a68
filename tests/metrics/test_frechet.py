"""Fréchet distance between sets of clips."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

from t2v.metrics import (
    ClipFeatures,
    FrechetVideoDistance,
    KernelVideoDistance,
    MobileNetClipFeatures,
    frechet_distance,
    kernel_distance,
)

ROOT = Path(__file__).parents[2]


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
    assert at_once.compute().dtype == torch.float64

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
    assert metric.protocol()["remark"].startswith("1 clips a side are fewer than 2 × 3 dimensions")
    metric.reset()
    metric.update(clips(torch.randn(1, 3)), clips(torch.randn(1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().isnan()


def test_distances_with_fewer_vectors_than_dimensions_are_those_of_scipy_and_torchmetrics():
    a, b = torch.randn(9, 20) * torch.linspace(0.1, 3, 20), torch.randn(13, 20) + 0.5
    covariances = [np.cov(x.double().numpy().T) for x in (a, b)]
    roots = [scipy.linalg.sqrtm(covariance).real for covariance in covariances]
    middle = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    means = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = means + sum(np.trace(covariance) for covariance in covariances) - 2 * middle
    assert frechet_distance(a, b).item() == pytest.approx(expected, rel=1e-6)  # the roots of scipy are less exact
    assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a * torch.nan, b).isnan()
    c = b[:9].double()  # torchmetrics needs sets of equal size
    assert kernel_distance(a, c).item() == pytest.approx(poly_mmd(a.double(), c).item(), rel=1e-9)


@pytest.mark.parametrize("kind", [FrechetVideoDistance, KernelVideoDistance])
def test_a_distance_is_in_float64_under_every_precision(kind):
    real, fake = clips(torch.randn(12, 3).bfloat16().float()), clips(torch.rand(12, 3).bfloat16().float())
    expected, other = kind(MeanColour()), kind(MeanColour()).to(torch.bfloat16)
    expected.update(fake, real)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            other.update(fake.bfloat16(), real.bfloat16())
            found = other.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected.compute().item(), rel=1e-6)


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


RANK = """
import sys, torch, torch.distributed as dist
from t2v.metrics import ClipFeatures, FrechetVideoDistance, KernelVideoDistance, frechet_distance, kernel_distance

class Means(ClipFeatures):
    name, num_features = "means", 3
    def forward(self, video):
        return video.mean((1, 3, 4))
    def protocol(self):
        return {}

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
video, other = torch.rand(2, 9, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
mine = [slice(0, 0), slice(0, 7), slice(7, 9)][rank]
for kind, distance in ((FrechetVideoDistance, frechet_distance), (KernelVideoDistance, kernel_distance)):
    metric = kind(Means())
    if mine.stop > mine.start:
        metric.update(other[mine], video[mine])
    expected = distance(*(clips.mean((1, 3, 4)).double() for clips in (video, other)))
    torch.testing.assert_close(metric.compute(), expected)
"""


def test_ranks_with_different_numbers_of_clips_measure_all_of_them(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(i), tmp_path], cwd=ROOT) for i in range(3)
    ]
    assert [run.wait(timeout=200) for run in runs] == [0, 0, 0]
