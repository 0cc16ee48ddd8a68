import pytest
import torch
import torch.nn.functional as F

from data.examples.shapes import ShapeClip, render
from data.prepare.scenes import find_scenes
from t2v.errors import UserError
from t2v.video import DecodeError, stream_frames, write_mp4


def shot(seed, frames, step=2):
    """Return a clip of a camera that pans over random blobs."""
    blobs = torch.rand(1, 3, 6, 24, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(blobs, (64, 400), mode="bicubic").clamp(0, 1) * 255
    return torch.cat([wide[..., step * t : step * t + 96] for t in range(frames)]).byte()


@pytest.mark.parametrize("fps", [8, 30000 / 1001])
def test_cuts_are_found_at_their_frames(tmp_path, fps):
    path = tmp_path / "cut.mp4"
    write_mp4(path, torch.cat([shot(1, 25), shot(2, 40), shot(3, 20)]), fps)
    times = [time for time, _ in stream_frames(path)]
    found = find_scenes(path, 27.0)
    assert [start for start, _ in found] == pytest.approx([0, times[25], times[65]], abs=1 / fps)
    assert [end for _, end in found[:-1]] == [start for start, _ in found[1:]]
    assert found[-1][1] == pytest.approx(85 / fps, abs=1 / fps)


def test_a_fast_pan_a_static_clip_and_a_moving_shape_are_one_scene(tmp_path):
    shape = render(ShapeClip("white", "square", "right", "large", "fast", 0, 8))
    for name, video in (("pan", shot(1, 30, step=4)), ("still", shot(1, 1).expand(30, -1, -1, -1)), ("shape", shape)):
        write_mp4(tmp_path / f"{name}.mp4", video, 8, crf=30)
        [(start, end)] = find_scenes(tmp_path / f"{name}.mp4", 27.0)
        assert (start, end) == (0, pytest.approx(len(video) / 8, abs=1 / 8))


def test_a_higher_threshold_finds_fewer_cuts(tmp_path):
    write_mp4(tmp_path / "cut.mp4", torch.cat([shot(1, 20), shot(2, 20)]), 8)
    assert len(find_scenes(tmp_path / "cut.mp4", 27.0)) == 2
    assert len(find_scenes(tmp_path / "cut.mp4", 200.0)) == 1


def test_a_flash_is_no_scene(tmp_path):
    video = shot(1, 90)
    video[40:43] = 255
    write_mp4(tmp_path / "flash.mp4", video, 30)
    assert all(end - start >= 0.5 for start, end in find_scenes(tmp_path / "flash.mp4", 27.0))


def test_invalid_files_raise_and_print_nothing(tmp_path, capfd):
    intact = tmp_path / "intact.mp4"
    write_mp4(intact, shot(1, 20), 8)
    (tmp_path / "cut.mp4").write_bytes(intact.read_bytes()[:600])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    capfd.readouterr()
    for name in ("cut", "text", "empty"):
        with pytest.raises(DecodeError):
            find_scenes(tmp_path / f"{name}.mp4", 27.0)
    find_scenes(intact, 27.0)
    assert capfd.readouterr() == ("", "")


def test_a_threshold_of_zero_is_an_error(tmp_path):
    with pytest.raises(UserError, match="threshold of 0"):
        find_scenes(tmp_path / "any.mp4", 0.0)
