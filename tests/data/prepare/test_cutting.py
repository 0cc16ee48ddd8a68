"""Scenes, filters, and videos that crash or hang the process that cuts them."""

import json
import os
import signal
from collections import deque

import pytest
import torch

from data.prepare import Filters, prepare
from data.prepare.cutting import CRASH_REASON, cut_all, make_jobs, read_result
from data.prepare.engine import processes
from data.prepare.sources import Video
from data.prepare.video_clips import ClipFormat
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import read_frames, write_mp4


def sliding_texture(seed, frames):
    """Return a clip of a textured picture that slides to the left."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8)
    picture = picture.repeat_interleave(6, -1).repeat_interleave(6, -2)
    return torch.cat([picture.roll(2 * t, -1) for t in range(frames)])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def add(source, name, video, fps=8.0, crf=4):
    write_mp4(source / f"{name}.mp4", video, fps, crf)
    (source / f"{name}.txt").write_text(f"a caption of {name}")


def small(source, out, **options):
    prepare(source, out, **{"size": 32, "fps": 8.0, "frames": 4, "num_workers": 1, **options})


def read_json(folder):
    shards = ShardSet(folder)
    return {sample.key: json.loads(shards.read(sample, "json")["json"]) for sample in shards.samples}


def test_no_clip_spans_two_scenes(source, tmp_path, capsys):
    dark, bright = (torch.full((n, 3, 48, 48), grey, dtype=torch.uint8) for n, grey in ((18, 40), (15, 220)))
    add(source, "cut", torch.cat([dark, bright, dark[:15]]), fps=24)
    small(source, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    metadata = read_json(tmp_path / "out")
    assert {key: sample["start"] for key, sample in metadata.items()} == {
        "000000_0000": 0,
        "000000_0001": 0.75,
        "000000_0002": 1.375,
    }
    for sample in shards.samples:
        greys = read_frames(shards.read(sample, "mp4")["mp4"], range(4)).float().mean(dim=(1, 2, 3))
        assert greys.max() - greys.min() < 8
    small(source, tmp_path / "uncut", scenes=0.0)
    assert [sample["start"] for sample in read_json(tmp_path / "uncut").values()] == [0, 0.5, 1, 1.5]


def test_a_scene_shorter_than_a_clip_is_reported(source, tmp_path, capsys):
    dark, bright = (torch.full((n, 3, 48, 48), grey, dtype=torch.uint8) for n, grey in ((14, 40), (24, 220)))
    add(source, "cut", torch.cat([dark, bright]), fps=24)
    small(source, tmp_path / "out", frames=6)
    assert {sample["start"] for sample in read_json(tmp_path / "out").values()} == {0.583333}
    dropped = "Dropped 1: 1 scene too short: cut.mp4 at 0 s (a clip takes 0.75 s: 6 frames at 8 fps)"
    assert dropped in capsys.readouterr().out


def test_filters_and_near_duplicates(source, tmp_path, capsys):
    add(source, "a", sliding_texture(0, 8))
    add(source, "b", sliding_texture(1, 8)[:1].expand(8, -1, -1, -1))
    add(source, "c", sliding_texture(0, 8), crf=12)
    add(source, "d", torch.zeros(4, 3, 48, 48, dtype=torch.uint8))
    add(source, "e", sliding_texture(2, 4), fps=3)
    add(source, "f", sliding_texture(3, 4))
    small(source, tmp_path / "out", filters=Filters(min_motion=1.0, max_hash_distance=16))
    assert [sample["source"] for sample in read_json(tmp_path / "out").values()] == ["a.mp4", "a.mp4", "f.mp4"]
    out = capsys.readouterr().out
    assert "2 near-static: b.mp4 at 0 s (" in out
    assert "2 near-duplicate: c.mp4 at 0 s (of 000000_0000), c.mp4 at 0.5 s (of 000000_0001)" in out
    assert "1 black: d.mp4 at 0 s (" in out
    assert "1 too few frames per second: e.mp4 (3; min_fps is 4)" in out
    assert "near-static" in (tmp_path / "out" / "report.html").read_text()


def test_shards_as_a_source(source, tmp_path):
    add(source, "a", sliding_texture(0, 8))
    (source / "captions.jsonl").write_text('{"path": "a.mp4", "caption": ["one", "two"], "colour": "red"}')
    small(source, tmp_path / "first", frames=8, size=48)
    small(tmp_path / "first", tmp_path / "second")
    metadata = read_json(tmp_path / "second")
    assert [sample["start"] for sample in metadata.values()] == [0, 0.5]
    size = {"frames": 4, "fps": 8.0, "height": 32, "width": 32}
    captions = {"caption": "one", "captions": ["one", "two"]}
    origin = {"source": "shard-000000.tar/000000_0000", "start": 0.5, "colour": "red"}
    assert metadata["000000_0001"] == {**captions, **origin, **size}
    shards = ShardSet(tmp_path / "second")
    assert shards.read(shards.samples[0], "txt")["txt"] == b"one"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_video_that_hangs_is_dropped_alone(source, tmp_path, capsys):
    add(source, "good", sliding_texture(0, 4))
    os.mkfifo(source / "hangs.mp4")
    clip_format = ClipFormat(32, 8.0, 4, 0, Filters(), timeout=1.0)
    videos = [Video(name, ["x"], {}, source / name, 1) for name in ("good.mp4", "hangs.mp4", "good.mp4")]
    jobs = make_jobs(videos, 3, tmp_path, clip_format)
    with processes(1) as run:
        cut_all(jobs, run)
    clips, dropped = read_result(jobs[0].result)
    assert [clip.video for clip in clips] == [0, 2]
    assert [tuple(drop) for drop in dropped] == [("hangs.mp4", None, CRASH_REASON)]
    assert f"'hangs.mp4' {CRASH_REASON}: 2 of 2 attempts." in capsys.readouterr().out


def test_a_process_that_dies_is_reported_and_replaced():
    ends = [signal.SIGCHLD, signal.SIGTERM, signal.SIGCHLD, signal.SIGKILL, signal.SIGCHLD]
    for num_workers in (1, 2):
        with processes(num_workers) as run:
            ended = sorted(run(signal.raise_signal, deque(ends)))
        assert ended == sorted((end, end == signal.SIGCHLD) for end in ends)


def test_an_exception_in_a_process_is_raised_here(tmp_path):
    with processes(1) as run:
        with pytest.raises(FileNotFoundError, match="none"):  # of the system, for the message
            list(run(os.rmdir, deque([tmp_path / "none"])))
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*TypeError"):
            list(run(os.rmdir, deque([1.5])))
        assert list(run(os.rmdir, deque([tmp_path]))) == [(tmp_path, True)]


def test_a_process_that_dies_before_its_first_video(tmp_path):
    clip_format = ClipFormat(32, 8.0, 4, 0, Filters(), 1.0)
    jobs = make_jobs([Video("a.mp4", ["x"], {}, tmp_path, 1)], 1, tmp_path / "none", clip_format)

    def run(function, jobs):
        yield jobs.popleft(), False

    with pytest.raises(UserError, match=r"to cut 'a\.mp4' and 0 more was killed before it began, .* lower num_workers"):
        cut_all(jobs, run)
