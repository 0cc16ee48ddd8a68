"""Perceptual distance of reconstructions."""

import pytest
import torch

from t2v.losses import MobileNetLoss
from t2v.metrics import PerceptualDistance


def test_it_is_the_mean_over_all_frames_of_all_batches_and_ranks():
    video = torch.rand(3, 5, 3, 32, 32) * 2 - 1
    noisy = (video + torch.randn(video.shape) * 0.3 * torch.rand(3, 5, 1, 1, 1)).clamp(-1, 1)
    term = MobileNetLoss(weight=0.1, start_step=1000, frames=1)
    expected = term.distance(noisy.flatten(0, 1), video.flatten(0, 1)).item()
    metric, rank = PerceptualDistance(term), PerceptualDistance(term)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(noisy[:1], video[:1])
        metric.update(noisy[1:, :2], video[1:, :2])
        rank.update(noisy[1:, 2:], video[1:, 2:])
    metric.merge_state(rank)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)


def test_it_has_the_name_and_the_protocol_of_its_term():
    metric = PerceptualDistance(MobileNetLoss())
    assert metric.name == "mobilenet"
    assert metric.protocol()["network"] == "mobilenet_v2"
    assert len(metric.protocol()["sha256"]) == 64
