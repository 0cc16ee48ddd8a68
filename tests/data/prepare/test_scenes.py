import pytest
import torch
import torch.nn.functional as F

from data.examples.shapes import ShapeClip, render
from data.prepare.scenes import scenes
from t2v.errors import UserError
from t2v.video import DecodeError, stream_frames, write_mp4


def shot(seed, frames, step=2):
    """A camera that pans over random blobs."""
    blobs = torch.rand(1, 3, 6, 24, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(blobs, (64, 400), mode="bicubic").clamp(0, 1) * 255
    return torch.cat([wide[..., step * t : step * t + 96] for t in range(frames)]).byte()


@pytest.mark.parametrize("fps", [8, 30000 / 1001])
def test_a_video_is_cut_where_it_is(tmp_path, fps):
    path = tmp_path / "cut.mp4"
    write_mp4(path, torch.cat([shot(1, 25), shot(2, 40), shot(3, 20)]), fps)
    times = [time for time, _ in stream_frames(path)]
    found = scenes(path, 27)
    assert [start for start, _ in found] == pytest.approx([0, times[25], times[65]], abs=1 / fps)
    assert [end for _, end in found[:-1]] == [start for start, _ in found[1:]]
    assert found[-1][1] == pytest.approx(85 / fps, abs=1 / fps)


def test_a_fast_pan_a_still_and_a_moving_shape_are_whole(tmp_path):
    shape = render(ShapeClip("white", "square", "right", "large", "fast", 0, 8))
    for name, video in (("pan", shot(1, 30, step=4)), ("still", shot(1, 1).expand(30, -1, -1, -1)), ("shape", shape)):
        write_mp4(tmp_path / f"{name}.mp4", video, 8, crf=30)
        [(start, end)] = scenes(tmp_path / f"{name}.mp4", 27)
        assert (start, end) == (0, pytest.approx(len(video) / 8, abs=1 / 8))


def test_a_higher_threshold_cuts_less(tmp_path):
    write_mp4(tmp_path / "cut.mp4", torch.cat([shot(1, 20), shot(2, 20)]), 8)
    assert len(scenes(tmp_path / "cut.mp4", 27)) == 2
    assert len(scenes(tmp_path / "cut.mp4", 200)) == 1


def test_scenes_are_not_shorter_than_a_flash(tmp_path):
    video = shot(1, 90)
    video[40:43] = 255
    write_mp4(tmp_path / "flash.mp4", video, 30)
    assert all(end - start >= 0.5 for start, end in scenes(tmp_path / "flash.mp4", 27))


def test_what_is_no_video_is_told_and_nothing_else_is_said(tmp_path, capfd):
    whole = tmp_path / "whole.mp4"
    write_mp4(whole, shot(1, 20), 8)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:600])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    capfd.readouterr()
    for name in ("cut", "text", "empty"):
        with pytest.raises(DecodeError):
            scenes(tmp_path / f"{name}.mp4", 27)
    scenes(whole, 27)
    assert capfd.readouterr() == ("", "")


def test_a_threshold_that_cuts_everywhere_is_an_error(tmp_path):
    with pytest.raises(UserError, match="threshold of 0"):
        scenes(tmp_path / "any.mp4", 0)
