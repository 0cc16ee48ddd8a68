import pytest
import torch

from data.examples.shapes import SIZES, SPEEDS, ShapeClip, render
from data.prepare.filters import Filters, reason_to_drop_clip, reason_to_drop_video
from t2v.errors import UserError
from t2v.video import VideoInfo

LIMITS = Filters(min_seconds=1.0, max_seconds=10.0, min_height=100, min_fps=5.0, max_aspect=2.0)
DROP_STATIC = Filters(min_motion=0.5)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (VideoInfo(40, 8.0, 100, 200), None),
        (VideoInfo(8, 8.0, 200, 100), None),
        (VideoInfo(7, 8.0, 100, 200), "too short (0.9 s; min_seconds is 1)"),
        (VideoInfo(81, 8.0, 100, 200), "too long (10.1 s; max_seconds is 10)"),
        (VideoInfo(40, 8.0, 100, 99), "too small (99x100 pixels; min_height is 100)"),
        (VideoInfo(9, 4.5, 100, 200), "too few frames per second (4.5; min_fps is 5)"),
        (VideoInfo(40, 8.0, 201, 100), "too wide or too tall (100x201 pixels; max_aspect is 2)"),
    ],
)
def test_a_video_outside_a_limit_is_dropped_with_a_reason(info, reason):
    assert reason_to_drop_video(info, LIMITS) == reason


def test_invalid_limits_are_named_in_one_error():
    with pytest.raises(
        UserError, match=r"min_fps=-1.0 .*min_words=5 is above max_words=4; max_aspect=0.5 .*distance=150"
    ):
        Filters(min_fps=-1.0, min_words=5, max_words=4, max_aspect=0.5, max_hash_distance=150)


def test_the_defaults_keep_moving_and_static_shapes():
    for colour in ("red", "blue"):
        for direction in ("still", "right"):
            clip = render(ShapeClip(colour, "triangle", direction, min(SIZES), min(SPEEDS), 0, 8))
            assert reason_to_drop_clip(clip, Filters()) is None


def test_static_clips_are_dropped_at_any_compression_if_min_motion_is_set(draw):
    still = draw.scene(0)[:1].expand(8, -1, -1, -1)
    for crf in (18, 28, 40):
        assert reason_to_drop_clip(draw.recode(still, crf), DROP_STATIC).startswith("near-static (")
        assert reason_to_drop_clip(draw.recode(still, crf), Filters()) is None


def test_sensor_noise_is_static_and_the_slowest_shape_is_motion(draw):
    still = draw.scene(0, height=256, width=256)[:1].expand(8, -1, -1, -1)
    noisy = (still + 3 * torch.randn(still.shape)).clamp(0, 255).byte()
    assert (noisy[1:].float() - noisy[:-1].float()).abs().mean() > 2
    assert reason_to_drop_clip(noisy, DROP_STATIC).startswith("near-static (")
    slowest = render(ShapeClip("blue", "triangle", "right", "small", "slow", 0, 8))
    assert reason_to_drop_clip(draw.recode(slowest, 28), DROP_STATIC) is None


def test_a_single_frame_is_not_dropped_as_static(draw):
    assert reason_to_drop_clip(draw.scene(0)[:1], DROP_STATIC) is None


def test_black_clips_are_dropped_and_dark_ones_kept(draw):
    black = (3 * torch.rand(8, 3, 64, 64)).byte()
    assert reason_to_drop_clip(black, Filters()).startswith("black (mean grey level ")
    night = black.clone()
    night[:, :, 20:40, 20:40] = 90
    assert reason_to_drop_clip(night, Filters()) is None
    assert reason_to_drop_clip((draw.scene(0) // 12), Filters()) is None
