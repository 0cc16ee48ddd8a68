"""Footage as people have it, through every way of reading it: what a player shows, at the time at which it shows it."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from data.datasets import VideoClips
from data.plan import Bucket
from data.prepare.filters import Filters
from data.prepare.video_clips import ClipFormat, cut_video
from data.shards import ShardSet
from t2v.video import DecodeError, probe, read_at, read_clip, read_frames, stream_frames
from tests.data import corpus

PQ, HLG = 16, 18


def nearest(times, wanted):
    """Return the numbers of the frames nearest to the wanted times, and half the interval there."""
    times = np.array(times) - times[0]
    return np.abs(times - np.array(wanted)[:, None]).argmin(1)


def assert_nearest(numbers, times, wanted):
    times = np.array(times) - times[0]
    best = np.abs(times - np.array(wanted)[:, None]).min(1)
    assert np.allclose(np.abs(times[numbers] - wanted), best, atol=2e-3)


def test_the_table_in_the_documentation_has_all_files_of_the_corpus():
    text = Path("docs/reliability.md").read_text().partition("### Footage")[2].partition("\n\n###")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (\d+) \|", text, re.MULTILINE))
    files = list(map(int, rows.values()))
    places = [number for number, kind in enumerate(rows) if kind.startswith(("pixels", "pictures with"))]
    assert sum(files[: places[0]]) == len(corpus.TIMES) + 1  # and a clip whose mean rate is the wanted one
    assert sum(files[places[0] : places[1]]) == len(corpus.SHAPES) + 1  # and one turned by 30 degrees


@pytest.mark.parametrize("name", corpus.TIMES)
def test_frames_are_those_of_their_times(name, tmp_path):
    path = tmp_path / name
    times = corpus.TIMES[name](path)
    streamed = list(stream_frames(path))
    assert [corpus.number_of(frame) for _, frame in streamed] == list(range(len(times)))
    assert [time for time, _ in streamed] == pytest.approx([time - times[0] for time in times], abs=2e-3)
    info = probe(path)
    length, longest_step = info.frames / info.fps, max(np.diff(times))
    assert times[-1] - times[0] <= length <= times[-1] - times[0] + 2 * longest_step
    wanted = np.arange(0, times[-1] - times[0], 0.137)
    for content in (path, path.read_bytes()):
        assert_nearest([corpus.number_of(frame) for frame in read_at(content, wanted.tolist())], times, wanted)
    single = float(wanted[len(wanted) // 2])
    assert_nearest([corpus.number_of(read_at(path, [single], reader="decord")[0])], times, [single])
    count = math.floor(4 * length) - 1
    assert_nearest([corpus.number_of(frame) for frame in read_clip(path, count, 32, 4)], times, np.arange(count) / 4)
    clips = list(cut_video(path, info, ClipFormat(32, 4.0, 3, 0, Filters(), 60.0)))
    for clip in clips:
        if clip.frames is not None:
            assert_nearest([corpus.number_of(frame) for frame in clip.frames], times, clip.start + np.arange(3) / 4)
    assert len(clips) >= count // 3


def test_an_uneven_clip_with_the_wanted_mean_rate_is_not_copied(tmp_path):
    corpus.timed(tmp_path / "a.mp4", corpus.UNEVEN)
    info = probe(tmp_path / "a.mp4")
    clip_format = ClipFormat(64, info.fps, info.frames, 0, Filters(), 60.0)
    assert all(clip.mp4 is None for clip in cut_video(tmp_path / "a.mp4", info, clip_format))


def test_uneven_clips_of_foreign_shards_are_loaded_by_time(make, tmp_path):
    corpus.timed(tmp_path / "a.mp4", corpus.UNEVEN, options=corpus.B_FRAMES)
    sample = {"__key__": "a", "mp4": (tmp_path / "a.mp4").read_bytes(), "txt": "a", "json": {}}
    clips = VideoClips(ShardSet(make.shards(tmp_path / "shards", [sample])), [Bucket(6, 1, height=64, width=64)], 8.0)
    times = np.array(corpus.UNEVEN)
    for seed in range(4):
        clip = clips.load(0, clips.buckets[0], np.random.default_rng(seed))
        numbers = [corpus.number_of(frame) for frame in clip.video]
        shown = np.arange(6) / 8
        starts = [start for start in np.arange(40) / 4 if numbers == list(nearest(times, start + shown + 1e-4))]
        assert starts, numbers


@pytest.mark.parametrize("name", corpus.SHAPES)
def test_pictures_have_the_shape_that_a_player_shows(name, tmp_path):
    width, height, corners = corpus.SHAPES[name](tmp_path / name)
    info = probe(tmp_path / name)
    assert (info.width, info.height) == (width, height)
    _, streamed = next(iter(stream_frames(tmp_path / name)))
    for reader in ("pyav", "decord"):
        picture = read_frames(tmp_path / name, [0], reader=reader)[0]
        assert picture.equal(streamed)
        assert picture.shape == (3, height, width)
        assert corpus.corners_of(picture.permute(1, 2, 0).numpy()) == corners


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_pictures_are_turned_as_their_exif_data_says(extension, tmp_path):
    path = tmp_path / f"a.{extension}"
    shown = ["RGB.", "GR.B", ".BGR", "B.RG", "RBG.", "BR.G", ".GBR", "G.RB"]  # for the orientations 1 to 8
    for orientation, corners in enumerate(shown, start=1):
        picture = Image.fromarray(corpus.card())
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        picture.save(path, exif=exif, **({"lossless": True} if extension == "webp" else {}))
        info = probe(path)
        assert (info.frames, info.width, info.height) == (1, *((96, 128) if orientation > 4 else (128, 96)))
        (clip,) = cut_video(path, info, ClipFormat([(info.height, info.width)], 8.0, 1, 0, Filters(), 60.0))
        assert corpus.corners_of(clip.frames[0].permute(1, 2, 0).numpy()) == corners


def test_a_picture_turned_by_another_angle_keeps_its_size(tmp_path):
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    white = np.full((96, 128, 3), 255, np.uint8)
    corpus.encode(tmp_path / "a.mp4", [white], matrix=(cos, sin, -sin, cos))
    picture = read_frames(tmp_path / "a.mp4", [0])[0]
    assert picture.shape == (3, 96, 128)
    assert picture[:, 48, 64].min() > 250
    assert picture[:, 0, 0].max() < 5


def test_damage_that_the_decoder_marks_is_an_error(tmp_path):
    content = corpus.encode(tmp_path / "a.mp4", corpus.moving(), options={}).read_bytes()
    intact = read_frames(content, range(40))
    unseen = 0
    for seed in range(20):
        damaged = corpus.damaged(content, seed)
        seen = [False, False]
        for i, read in enumerate((lambda c: read_frames(c, range(40)), lambda c: [f for _, f in stream_frames(c)])):
            try:
                frames = read(damaged)
            except DecodeError:
                seen[i] = True
            else:
                unseen += not torch.stack(list(frames)).equal(intact)
        assert seen[0] == seen[1]
    assert unseen <= 2 * 4


def test_hdr_is_tone_mapped(tmp_path):
    corpus.hdr_grey(tmp_path / "pq.mp4", PQ, [0.0, 0.3024, 0.5807, 0.7518])  # 0, 10, 203 and 1000 cd/m²
    corpus.hdr_grey(tmp_path / "hlg.mp4", HLG, [0.0, 0.75, 1.0])
    assert [int(frame[0, 32, 32]) for _, frame in stream_frames(tmp_path / "pq.mp4")] == pytest.approx(
        [0, 63, 225, 255], abs=4
    )
    assert [int(frame[0, 32, 32]) for frame in read_frames(tmp_path / "hlg.mp4", range(3))] == pytest.approx(
        [0, 225, 255], abs=4
    )


def test_interlaced_frames_are_deinterlaced(tmp_path):
    corpus.interlaced(tmp_path / "a.mp4")
    streamed = list(stream_frames(tmp_path / "a.mp4"))
    assert [time for time, _ in streamed] == pytest.approx([i / 25 for i in range(12)])
    for _, frame in streamed:
        rows = frame[:, 8:-8].float()
        assert (rows[:, 1:] - rows[:, :-1]).abs().mean() < 1
    assert read_at(tmp_path / "a.mp4", [0.2])[0].equal(streamed[5][1])


def test_frames_that_change_their_size_are_an_error(tmp_path):
    corpus.changing(tmp_path / "changing.h264")
    with pytest.raises(DecodeError, match="its frames change from 64x64 to 96x96 pixels"):
        list(stream_frames(tmp_path / "changing.h264"))
    with pytest.raises(DecodeError, match="its frames change from 64x64 to 96x96 pixels"):
        read_at(tmp_path / "changing.h264", [0.0, 1.2])
