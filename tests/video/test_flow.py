"""Optical flow and warping."""

import sys

import pytest
import torch
import torch.nn.functional as F

from t2v.errors import UserError
from t2v.video.flow import DISFlow, visible, warp


def moving(height: int, width: int, frames: int = 3, dx: int = 3, dy: int = -2) -> torch.Tensor:
    """Return a smooth picture whose content moves by (dx, dy) pixels per frame."""
    margin = 8 * frames
    noise = torch.rand(1, 3, (height + 2 * margin) // 4, (width + 2 * margin) // 4)
    picture = F.interpolate(noise, (height + 2 * margin, width + 2 * margin), mode="bicubic")[0].clamp(0, 1) * 2 - 1
    starts = [(margin - dy * t, margin - dx * t) for t in range(frames)]
    return torch.stack([picture[:, y : y + height, x : x + width] for y, x in starts])[None]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 28), (24, 128)])
def test_dis_finds_a_known_motion_and_warping_undoes_it(height, width):
    video = moving(height, width)
    flow = DISFlow()(video)
    assert flow.shape == (1, 2, 2, height, width)
    inner = flow[..., 6:-6, 6:-6]
    assert inner[:, :, 0].median().item() == pytest.approx(-3, abs=0.2)
    assert inner[:, :, 1].median().item() == pytest.approx(2, abs=0.2)
    residual = (video[:, 1:] - warp(video[:, :-1], flow))[..., 6:-6, 6:-6].abs().mean()
    assert residual < 0.15 * video.diff(dim=1).abs().mean()


def test_a_single_frame_has_no_flow():
    flow, mask = DISFlow().flow_and_visibility(torch.zeros(2, 1, 3, 16, 16))
    assert flow.shape == (2, 0, 2, 16, 16)
    assert mask.shape == (2, 0, 1, 16, 16)


def test_flow_passes_no_gradient():
    assert not DISFlow()(moving(32, 32).requires_grad_()).requires_grad


def test_warping_by_integers_moves_pixels_and_repeats_the_border():
    frames = torch.rand(2, 1, 3, 6, 9)
    torch.testing.assert_close(warp(frames, torch.zeros(2, 1, 2, 6, 9)), frames)
    flow = torch.tensor([-2.0, 1.0])[:, None, None].expand(2, 1, 2, 6, 9)
    warped = warp(frames, flow)
    torch.testing.assert_close(warped[..., :-1, 2:], frames[..., 1:, :-2])
    torch.testing.assert_close(warped[..., :-1, 0], frames[..., 1:, 0])


def test_occluded_boundary_and_outside_pixels_are_not_visible():
    forward, backward = torch.zeros(2, 1, 1, 2, 32, 48)  # a square moves right by 6 and uncovers columns 12 to 17
    forward[..., 0, 8:24, 12:28] = 6
    backward[..., 0, 8:24, 18:34] = -6
    mask = visible(backward, forward)[0, 0, 0]
    assert not mask[8:24, 12:18].any()
    assert mask[10:22, 20:32].all()
    assert mask[:6].all()
    assert not mask[12, 17:19].any()  # motion boundary

    right = torch.tensor([4.0, 0.0])[:, None, None].expand(1, 1, 2, 8, 12)
    assert visible(right, -right)[..., :8].all()
    assert not visible(right, -right)[..., 8:].any()


def test_an_unknown_preset_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(UserError, match="preset=slow must be one of ultrafast, fast, medium"):
        DISFlow("slow")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[perceptual\]"'):
        DISFlow()
