"""Each layout of a source is recognized and gives its videos, captions and reasons."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.prepare.dropped import Dropped
from data.prepare.filters import Filters
from data.prepare.sources import digest, find_videos
from data.prepare.tables import CaptionTable
from t2v.errors import UserError
from t2v.video import encode_mp4


@pytest.fixture
def folder(tmp_path):
    """Three files with names of videos; listing them decodes nothing."""
    (tmp_path / "part").mkdir()
    for name in ("a.mp4", "b.webm", "part/c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def find(source, captions=None, filters=None):
    return find_videos(source, CaptionTable(captions), filters or Filters())


def captions_by_name(videos):
    return {video.name: video.captions for video in videos}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_json_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def as_json(path, rows):
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("captions.parquet", as_parquet),
        ("footage.parquet", as_parquet),
        ("x.jsonl", as_json_lines),
        ("x.json", as_json),
    ],
)
def test_tables(name, write, folder):
    rows = [
        {"path": "a.mp4", "caption": ["one", "two", "one"], "views": 3},
        {"path": "part/c.mp4", "caption": ["three"], "views": None},
        {"path": "gone.mp4", "caption": ["four"], "views": 1},
    ]
    write(folder / name, rows)
    videos, dropped = find(folder)
    assert captions_by_name(videos) == {"a.mp4": ["one", "two"], "part/c.mp4": ["three"]}
    assert videos[0].extra == {"views": 3}
    assert (videos[0].path, videos[0].size, videos[0].offset) == (folder / "a.mp4", 5, None)
    assert dropped == [Dropped("gone.mp4", None, "missing file"), Dropped("b.webm", None, "no caption")]


def test_a_video_in_several_rows_has_several_captions(folder):
    (folder / "captions.csv").write_text("path,caption\na.mp4,one\nb.webm,two\na.mp4,three\n")
    assert captions_by_name(find(folder)[0]) == {"a.mp4": ["one", "three"], "b.webm": ["two"]}


@pytest.mark.parametrize(("stored", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_composed_or_not(stored, written, tmp_path):
    on_disk, in_table = (unicodedata.normalize(form, "caf\u00e9") for form in (stored, written))
    (tmp_path / f"{on_disk}.mp4").write_bytes(b"video")
    (tmp_path / f"{in_table}.txt").write_text("a cup")
    assert captions_by_name(find(tmp_path)[0]) == {f"{on_disk}.mp4": ["a cup"]}
    (tmp_path / "captions.csv").write_text(f"path,caption\n{in_table}.mp4,a table\n")
    videos, dropped = find(tmp_path)
    assert captions_by_name(videos) == {f"{on_disk}.mp4": ["a table"]}
    assert not dropped
    (tmp_path / f"{in_table}.mp4").write_bytes(b"another video")
    assert captions_by_name(find(tmp_path)[0]) == {f"{in_table}.mp4": ["a table"]}


def test_webvid(folder):
    (folder / "results_2M_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        "c,https://example.org/c.mp4,PT00H00M10S,part,Aerial view of a lake\n"
        "a,https://example.org/a.mp4,PT00H00M09S,elsewhere,A cat\n"
        "9,https://example.org/9.mp4,PT00H00M09S,part,A dog\n"
    )
    videos, dropped = find(folder)
    assert captions_by_name(videos) == {"part/c.mp4": ["Aerial view of a lake"], "a.mp4": ["A cat"]}
    assert videos[1].extra["duration"] == "PT00H00M09S"
    assert dropped[0] == Dropped("9", None, "missing file")


def test_msr_vtt(folder):
    content = {
        "info": {"year": "2016"},
        "videos": [{"video_id": "c", "split": "train", "start time": 1.5}, {"video_id": "a", "split": "validate"}],
        "sentences": [
            {"caption": "a car", "video_id": "c", "sen_id": 0},
            {"caption": "a cat", "video_id": "a", "sen_id": 1},
            {"caption": "a red car", "video_id": "c", "sen_id": 2},
        ],
    }
    (folder / "train_val_videodatainfo.json").write_text(json.dumps(content))
    videos, _ = find(folder)
    assert captions_by_name(videos) == {"part/c.mp4": ["a car", "a red car"], "a.mp4": ["a cat"]}
    assert videos[0].extra == {"split": "train", "start time": 1.5}


def test_shards_of_video2dataset(tmp_path):
    json_of_b = {"caption": "from the json", "videoid": 7, "status": "success"}
    members = {
        "0001.mp4": b"first",
        "0001.txt": b"a caption",
        "0001.json": b'{"caption": "a caption", "key": "0001"}',
        "0002.json": json.dumps(json_of_b).encode(),
        "0002.webm": b"second",
        "0003.mp4": b"third",
        "0003.txt": b"\xff\xfe",
        "0004.txt": b"no video",
        "0005.mp4": b"fifth",
        "0005.json": b'{"captions": ["one", "two"], "caption": "one"}',
        "0006.mp4": b"sixth",
        "0006.json": b"{",
        "0006.txt": b"a caption",
    }
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    videos, dropped = find(tmp_path)
    captions = {"0001": ["a caption"], "0002": ["from the json"], "0005": ["one", "two"]}
    assert captions_by_name(videos) == {f"00000.tar/{key}": texts for key, texts in captions.items()}
    assert videos[1].extra == {"videoid": 7, "status": "success"}
    tar = (tmp_path / "00000.tar").read_bytes()
    assert [tar[video.offset : video.offset + video.size] for video in videos] == [b"first", b"second", b"fifth"]
    assert {drop.source.removeprefix("00000.tar/"): drop.reason for drop in dropped} == {
        "0003": "caption is not UTF-8",
        "0004": "missing file",
        "0006": "its json is invalid",
    }
    assert captions_by_name(find(tmp_path / "00000.tar")[0]) == captions_by_name(videos)


def test_captions_are_cleaned_and_limited(folder):
    (folder / "a.txt").write_text("A &amp; B <br> https://example.org\n")
    (folder / "b.txt").write_text("one two three four")
    (folder / "part/c.txt").write_bytes(b"\xff")
    videos, dropped = find(folder, filters=Filters(max_words=3))
    assert captions_by_name(videos) == {"a.mp4": ["A & B"]}
    assert [(drop.source, drop.reason.split(" (")[0]) for drop in dropped] == [
        ("part/c.mp4", "caption is not UTF-8"),
        ("b.webm", "caption too long"),
    ]
    with pytest.raises(UserError, match=r"No video in .* is kept: .*2 caption too long: a"):
        find(folder, filters=Filters(min_words=0, max_words=0))


def test_the_digest_changes_with_captions_metadata_and_sizes(folder):
    rows = [{"path": "a.mp4", "caption": "one", "views": 3}]
    digests = set()
    for _ in range(2):
        as_json(folder / "captions.json", rows)
        digests.add(digest(find(folder)[0]))
    for change in ({"views": 4}, {"caption": "two"}):
        as_json(folder / "captions.json", [rows[0] | change])
        digests.add(digest(find(folder)[0]))
    (folder / "a.mp4").write_bytes(b"longer than before")
    digests.add(digest(find(folder)[0]))
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("captions.parquet", b"no parquet", r"captions\.parquet' is not a readable parquet file"),
        ("captions.json", b"{", r"captions\.json' is not a readable json file"),
        ("captions.json", b"{}", r"neither a list of rows nor MSR-VTT's lists"),
        ("captions.json", b'{"videos": [{"id": 1}], "sentences": []}', r"joined by video_id \(KeyError 'video_id'\)"),
        ("captions.json", b"5", r"has no column path and no column caption; its columns are none"),
        ("captions.jsonl", b'{"path": "a.mp4"}', r"has no column caption; its columns are path"),
    ],
)
def test_invalid_tables(name, content, sentence, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        find(folder)


def test_a_parquet_file_without_the_column(folder):
    as_parquet(folder / "table.parquet", [{"path": "a.mp4", "text": "one"}])
    with pytest.raises(UserError, match=r"has no column caption; its columns are path, text: .* --caption_column"):
        find(folder)


def test_ambiguous_sources(folder):
    (folder / "one.csv").touch()
    (folder / "two.csv").touch()
    with pytest.raises(UserError, match=r"several tables \(one\.csv, two\.csv\): select one with --captions"):
        find(folder)
    with pytest.raises(UserError, match=r"is not a table of captions: use a file that ends in \.csv"):
        find(folder, captions=Path(folder / "a.mp4"))
    (folder / "00000.tar").touch()
    with pytest.raises(UserError, match=r"contains both 3 videos and 1 shards"):
        find(folder)


def test_links_to_one_file_are_one_video_with_the_captions_of_both_names(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "videos"
    store.mkdir()
    folder.mkdir()
    for name in ("one", "two", "text"):
        (store / name).write_text(name)
    for name, stored in {"a.mp4": "one", "b.mp4": "two", "c.mp4": "two", "a.txt": "text", "b.txt": "text"}.items():
        (folder / name).symlink_to(store / stored)
    (folder / "c.txt").write_text("another text")
    videos, dropped = find(folder)
    assert captions_by_name(videos) == {"a.mp4": ["text"], "b.mp4": ["text", "another text"]}
    assert not dropped
    assert [video.path.name for video in videos] == ["a.mp4", "b.mp4"]  # the suffix says what they are
    (folder / "captions.csv").write_text("path,caption\na.mp4,one\nc.mp4,two\n")
    assert captions_by_name(find(folder)[0]) == {"a.mp4": ["one"], "c.mp4": ["two"]}


def test_files_that_belong_to_videos_are_not_footage(folder, make):
    (folder / "captions.csv").write_text("path,caption\na.mp4,one\nother,two\n")
    preview = encode_mp4(make.numbered(8), 8.0)
    for name in ("a.LRX", "GL01.LRV", "other"):
        (folder / name).write_bytes(preview)
    (folder / "read.nfo").write_text("a long text\n" * 4000)
    (folder / "out.partial/clips").mkdir(parents=True)
    (folder / "out.partial/prepare.json").write_text("{}")
    (folder / "out.partial/clips/000000.clips").write_bytes(preview)
    videos, dropped = find(folder)
    assert captions_by_name(videos) == {"a.mp4": ["one"], "other": ["two"]}
    assert [drop.source for drop in dropped] == ["b.webm", "part/c.mp4"]


def test_columns_with_names_of_the_json_of_a_clip_are_left_out(folder):
    rows = [{"path": "a.mp4", "summary": "one", "captions": ["other text"], "start": 12.5, "views": 3}]
    as_json_lines(folder / "table.jsonl", rows)
    with pytest.warns(UserWarning, match="The columns captions, start of .* are left out"):
        videos, _ = find_videos(folder, CaptionTable(folder / "table.jsonl", caption_column="summary"), Filters())
    assert (videos[0].captions, videos[0].extra) == (["one"], {"views": 3})


@pytest.mark.parametrize("name", ["clips [HD]", "clips {raw}", "a::b", "clips.tar"])
def test_a_folder_with_the_characters_of_a_pattern(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"video")
    (folder / "a.txt").write_text("a caption")
    assert captions_by_name(find(folder)[0]) == {"a.mp4": ["a caption"]}


def test_shards_in_a_folder_of_the_source_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub/x.tar", {"0.mp4": b"video", "0.txt": b"a caption"})
    with pytest.raises(UserError, match=r"shards such as sub/x\.tar are read from the folder that they are in"):
        find(tmp_path)
