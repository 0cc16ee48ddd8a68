"""The captions of a sample are the same for the loader, `inspect` and `prepare`, whatever its members contain."""

import io
import tarfile
import warnings
from pathlib import Path

import pytest

from data.datasets import TokenClips, VideoClips
from data.inspect import inspect
from data.plan import Bucket
from data.prepare.filters import Filters
from data.prepare.sources import find_videos
from data.prepare.tables import CaptionTable
from data.shards import ShardSet
from t2v.video import encode_mp4

SAMPLES = {  # members beside the video, and the captions, or why there are none
    "txt": ({"txt": b"a dog"}, ["a dog"]),
    "bom": ({"TXT": b"\xef\xbb\xbfa dog"}, ["a dog"]),
    "json": ({"json": b'{"caption": "a dog"}'}, ["a dog"]),
    "json-bom": ({"json": b'\xef\xbb\xbf{"caption": "a dog"}'}, ["a dog"]),
    "one-text": ({"json": b'{"captions": "a dog runs"}'}, ["a dog runs"]),
    "list": ({"json": b'{"caption": ["one", "two"], "captions": ["two", null]}'}, ["one", "two"]),
    "nan-elsewhere": ({"txt": b"a dog", "json": b'{"views": NaN}'}, ["a dog"]),
    "empty-txt": ({"txt": b"", "json": b'{"caption": "a dog"}'}, ["a dog"]),
    "dots": ({"v2.txt": b"a dog"}, ["a dog"]),
    "nan": ({"json": b'{"caption": NaN}'}, "it has no caption"),
    "null-captions": ({"json": b'{"captions": null}'}, "it has no caption"),
    "spaces": ({"txt": b" \n"}, "it has no caption"),
    "nothing": ({}, "it has no caption"),
    "null": ({"json": b"null"}, "its json is not an object"),
    "array": ({"json": b"[1]", "txt": b"a dog"}, "its json is not an object"),
    "number": ({"json": b'{"caption": 5}'}, "its caption is a number, not text"),
    "object": ({"json": b'{"captions": [{"en": "x"}]}'}, "its captions is an object, not text"),
    "surrogate": ({"json": b'{"caption": "\\ud800"}'}, "its caption has half of a surrogate pair, which is not text"),
    "zeros": ({"txt": b"\0\0"}, "its caption has characters of code 0, as a damaged file has"),
    "zero": ({"json": b'{"captions": "a\\u0000"}'}, "its captions has characters of code 0, as a damaged file has"),
    "long": ({"json": b'{"caption": "%s"}' % (b"a" * 2**22)}, "its json has 4194319 bytes, more than 4194304"),
    "latin": ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
    "broken": ({"json": b"{"}, "its json is invalid"),
    "deep": ({"json": b"[" * 100_000}, "its json is invalid"),
}
USABLE = {key: captions for key, (_, captions) in SAMPLES.items() if isinstance(captions, list)}
UNUSABLE = {key: reason for key, (_, reason) in SAMPLES.items() if isinstance(reason, str)}


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, content in members.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def shard(make, tmp_path_factory):
    mp4 = encode_mp4(make.numbered(4), 8.0)
    video = {"bom": "MP4", "json": "mov", "dots": "v2.mp4"}
    samples = {key: {video.get(key, "mp4"): mp4, **members} for key, (members, _) in SAMPLES.items()}
    return write_tar(tmp_path_factory.mktemp("captions") / "clips.tar", samples)


def test_the_loader(shard):
    with pytest.warns(UserWarning, match=f"{len(UNUSABLE)} samples"):
        clips = VideoClips(ShardSet(shard), [Bucket(4, 1, height=32, width=32)], 8.0)
    loaded = [clips.load(index, clips.buckets[0], None) for index in range(len(clips))]
    assert {clip.key: clip.captions for clip in loaded} == USABLE
    assert {sample.key: sample.reason for sample in clips.skipped} == UNUSABLE


def test_inspect(shard, capsys):
    with pytest.raises(SystemExit) as end:
        inspect(str(shard), clips=0)
    assert end.value.code == 1
    problems = dict(
        line.strip().split(f" in {shard}: ") for line in capsys.readouterr().out.splitlines() if " in /" in line
    )
    assert problems == UNUSABLE


def test_prepare(shard):
    videos, dropped = find_videos(shard, CaptionTable(), Filters())
    assert {Path(video.name).name: video.captions for video in videos} == USABLE
    reasons = {Path(drop.source).name: drop.reason for drop in dropped}
    assert reasons == {key: reason.replace("it has no", "no") for key, reason in UNUSABLE.items()}


def test_clips_without_any_caption_are_used(make, tmp_path):
    mp4 = encode_mp4(make.numbered(4), 8.0)
    shard = write_tar(tmp_path / "clips.tar", {"a": {"mp4": mp4}, "b": {"webm": mp4, "json": b"{}"}})
    with warnings.catch_warnings(action="error"):
        clips = VideoClips(ShardSet(shard), [Bucket(4, 1, height=32, width=32)], 8.0)
    assert [clips.load(index, clips.buckets[0], None).captions for index in range(2)] == [[""], [""]]


def test_several_videos_of_one_key(make, tmp_path):
    mp4 = encode_mp4(make.numbered(4), 8.0)
    samples = {"a": {"1.mp4": mp4, "2.mp4": mp4}, "b": {"mp4": mp4, "low.mp4": b"x", "gif": b"x"}}
    shards = ShardSet(write_tar(tmp_path / "clips.tar", samples))
    assert [(sample.key, sample.video, sample.frames) for sample in shards.samples] == [("b", "mp4", 4)]
    assert "it has 2 videos (1.mp4, 2.mp4)" in shards.skipped[0].reason


@pytest.mark.parametrize(
    ("json", "reason"),
    [
        ({"captions": ["a", "b"]}, "2 captions have the lengths"),
        ({"caption": "a", "text_lengths": [9]}, r"have the lengths \[9\]"),
        ({"caption": "a", "text_lengths": "3"}, "not a list of numbers"),
        ({"caption": ["a"], "text_lengths": [3]}, None),
    ],
)
def test_captions_that_do_not_fit_their_embeddings(json, reason, make, tmp_path):
    sample = make.tokens("a")
    sample["json"] = {"fingerprint": make.fingerprint, **json}
    clips = TokenClips(ShardSet(make.shards(tmp_path, [sample, make.tokens("b")])), [Bucket(6, 1)])
    if reason is None:
        assert clips.load(0, clips.buckets[0], None).caption == "a"
    else:
        with pytest.warns(UserWarning, match=reason):
            assert clips.load(0, clips.buckets[0], None) is None
