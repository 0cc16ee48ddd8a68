"""Folders of shards with other things in them: nothing is lost without a word, and one bad shard costs that shard."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from data.datasets import VideoClips
from data.plan import Bucket
from data.prepare.filters import Filters
from data.prepare.sources import find_videos
from data.prepare.tables import CaptionTable
from data.shards import ShardSet
from t2v.errors import UserError


def test_what_cannot_be_a_shard_costs_no_other(make, tmp_path):
    folder = make.shards(tmp_path / "clips.tar", [make.video("a")])  # a folder
    (folder / "shard-000000.tar").rename(folder / "UPPER.TAR")
    (folder / "gone.tar").symlink_to("nowhere")
    (folder / "loop.tar").symlink_to("loop.tar")
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    tarfile.open(folder / "empty.tar", "w").close()
    shards = ShardSet(folder)
    assert [sample.key for sample in shards.samples] == ["a"]
    assert {Path(each.shard).name: each.reason for each in shards.skipped} == {
        "gone.tar": "it is a link to nothing",
        "loop.tar": "it is a link to nothing",
        "folder.tar": "it is a folder",
        "pipe.tar": "it is no file",
        "empty.tar": "it has no samples",
    }
    (folder / "UPPER.TAR").unlink()
    (folder / "empty.tar").unlink()
    with pytest.raises(UserError, match=r"folder\.tar: it is a folder; .*gone\.tar: it is a link to nothing"):
        ShardSet(folder)


def test_samples_without_a_clip_are_named(make, tmp_path):
    samples = [make.video("a"), {"__key__": "b", "png": b"x", "txt": "a picture"}]
    shards, listed = ShardSet(make.shards(tmp_path, samples)), tmp_path / "skipped.jsonl"
    with pytest.warns(UserWarning, match="1 samples .* are left out, such as 'b' .* it has png, txt, but no mp4"):
        VideoClips(shards, [Bucket(4, 1, height=32, width=32)], 8.0, skipped_samples=listed)
    assert json.loads(listed.read_text())["key"] == "b"


def test_a_pipe_among_the_videos_is_named(make, tmp_path):
    (tmp_path / "a.mp4").write_bytes(make.video("a")["mp4"])
    os.mkfifo(tmp_path / "pipe.mp4")
    videos, dropped = find_videos(tmp_path, CaptionTable("none"), Filters())
    assert [video.name for video in videos] == ["a.mp4"]
    assert [(each.source, each.reason) for each in dropped] == [("pipe.mp4", "no file (a pipe or a device)")]
