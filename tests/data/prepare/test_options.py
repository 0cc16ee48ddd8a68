"""Options of `data.prepare`: sizes, stride, captions, addresses; and errors of the system."""

import json
import os
import resource
import signal
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data.prepare import Filters, prepare
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import read_frames, write_mp4
from tests.support import forked


@pytest.fixture(scope="module")
def source(make, tmp_path_factory):
    """Videos with numbered frames: one of 14 frames, and 8 frames of a wide and of a tall picture."""
    folder = tmp_path_factory.mktemp("source")
    write_mp4(folder / "a.mp4", make.numbered(14), 8.0, crf=4)
    write_mp4(folder / "tall.mp4", make.numbered(8, 64)[..., :32], 8.0)
    write_mp4(folder / "wide.mp4", make.numbered(8, 64)[..., :32, :], 8.0)
    (folder / "captions.csv").write_text("path,caption\na.mp4,a dog\n./tall.mp4,a cat\nwide.mp4,a bird\nwide.mp4,x,y\n")
    return folder


def run(source, out, **options):
    """Prepare clips, and return for each: video, start, height, width and captions."""
    prepare(source, out, **{"size": 32, "frames": 4, "num_workers": 1, "scenes": 0.0, **options})
    shards = ShardSet(out)
    rows = []
    for sample in shards.samples:
        metadata = json.loads(shards.read(sample, "json")["json"])
        assert (metadata["height"], metadata["width"]) == (sample.height, sample.width)
        txt = shards.read(sample, "txt").get("txt", b"").decode()
        rows.append((metadata["source"], metadata["start"], sample.height, sample.width, txt))
    return rows


def test_overlapping_clips_and_at_most_some_of_a_video(source, make, tmp_path, capsys):
    rows = run(source, tmp_path / "out", stride=2, max_clips=3, captions="none")
    assert [row[:2] for row in rows[:3]] == [("a.mp4", 0.0), ("a.mp4", 0.25), ("a.mp4", 0.5)]
    assert len(rows) == 9
    assert {row[4] for row in rows} == {""}
    assert "1 rest of the video: a.mp4 at 0.75 s (max_clips is 3)" in capsys.readouterr().out
    shards = ShardSet(tmp_path / "out")
    assert make.frame_indices(read_frames(shards.read(shards.samples[1], "mp4")["mp4"], range(4))) == [2, 3, 4, 5]


def test_gaps_between_clips_that_are_not_square(source, tmp_path):
    rows = run(source, tmp_path / "out", stride=6, size=[32, 48])
    assert [row[:4] for row in rows[:2]] == [("a.mp4", 0.0, 32, 48), ("a.mp4", 0.75, 32, 48)]


def test_each_video_gets_the_size_of_the_nearest_aspect_ratio(source, tmp_path):
    rows = run(source, tmp_path / "out", size=[[16, 32], [32, 16], [24, 24]])
    assert {row[0]: row[2:4] for row in rows} == {"a.mp4": (24, 24), "tall.mp4": (32, 16), "wide.mp4": (16, 32)}


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", size=32, frames=9, num_workers=1, dry_run=True)
    printed = capsys.readouterr().out
    assert "1 of 3 videos would be cut" in printed
    assert "At most 1 clips of 9 frames" in printed
    assert "1 invalid row: captions.csv line 5 (3 values for 2 columns" in printed
    assert "2 too short: tall.mp4 (a clip takes 1.12 s: 9 frames at 8 fps), wide.mp4" in printed
    assert not list(tmp_path.iterdir())


def test_captions_of_parts_go_to_the_clips_inside_them(source, tmp_path, capsys):
    table = tmp_path / "panda.csv"
    parts = "[['0:00:00.000', '0:00:00.500'], ['0:00:01.000', '0:00:01.600']]"
    table.write_text(f"videoID,timestamp,caption\na,\"{parts}\",\"['one', 'two']\"\n")
    rows = run(source, tmp_path / "out", captions=table)
    assert [(row[1], row[4]) for row in rows] == [(0.0, "one"), (1.0, "two")]
    assert "1 in no captioned part of the video: a.mp4 at 0.5 s" in capsys.readouterr().out


def test_pictures_are_clips_of_one_frame(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("x.png", "y.jpg"):
        Image.new("RGB", (40, 40), (200, 10, 10)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    rows = run(folder, tmp_path / "out", frames=1)
    assert [(row[0], row[2], row[4]) for row in rows] == [("x.png", 32, "x.png"), ("y.jpg", 32, "y.jpg")]
    with pytest.raises(UserError, match=r"its 2 pictures give clips of one frame: --frames 1"):
        run(folder, tmp_path / "video", frames=4)


def test_a_remote_folder_gives_the_same_shards(source, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in source.iterdir():
        memory.pipe_file(f"/footage/{path.name}", path.read_bytes())
    assert run("memory://footage", tmp_path / "remote") == run(source, tmp_path / "local")
    local, remote = (tmp_path / name / "shard-000000.tar" for name in ("local", "remote"))
    assert local.read_bytes() == remote.read_bytes()
    memory.pipe_file("/clips/shard-000000.tar", local.read_bytes())
    again = run("memory://clips", tmp_path / "again")
    assert [row[4] for row in again] == ["a dog"] * 3 + ["a cat"] * 2 + ["a bird"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": [32, 33]}, r"size=\[32, 33\]: all must be greater than 0, and size even"),
        ({"size": [32, 32, 32]}, r"must be one number, \[height, width\]"),
        ({"stride": 0, "max_clips": 0}, "stride=0, max_clips=0: all must be greater than 0"),
        ({"frames": 1, "filters": Filters(min_motion=1.0)}, "min_motion has no effect"),
        ({"captions": "none", "filters": Filters(min_words=3)}, "min_words has no effect"),
    ],
)
def test_wrong_options(options, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out", **options)


def test_options_for_tables_have_no_effect_on_shards(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"--captions and --caption_column have no effect .*data\.recaption"):
        run(tmp_path / "out", tmp_path / "again", captions="x.csv", caption_column="y")


def test_a_full_disk_keeps_what_is_finished(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out\.partial': Not a directory; .* Nothing has been written"):
        run(source, tmp_path / "file" / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"File too large; .* stays in .*out\.partial', and"):
            run(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert len(run(source, tmp_path / "out")) == 7


def test_ctrl_c_prints_one_line(source, tmp_path, make):
    write_mp4(tmp_path / "long.mp4", make.numbered(31).repeat(10, 1, 1, 1), 8.0)
    fork = forked.Fork("-m", "data.prepare", tmp_path, tmp_path / "out", "--captions=none", "--frames=4", "--size=512")
    fork.wait_until(lambda: list((tmp_path / "out.partial").glob("clips/*.current")))  # the first video is being cut
    assert fork.process.exitcode is None
    os.kill(fork.process.pid, signal.SIGINT)
    done = fork.wait()
    *_, last = done.stderr.splitlines()
    assert done.returncode == 130
    assert last.startswith("error: Interrupted. What is finished stays in ")
    assert Path(tmp_path / "out.partial").is_dir()
