"""Tables as people have them: what is kept, and what is left out with its line; a value is never turned into text."""

import json
import os

import pytest

from data.prepare.filters import Filters
from data.prepare.sources import find_videos
from data.prepare.tables import CaptionTable
from t2v.errors import UserError

CSV, JSONL = "captions.csv", "captions.jsonl"
QUOTE = '"'


@pytest.fixture
def folder(tmp_path):
    """Files with names of videos; listing them decodes nothing."""
    (tmp_path / "part").mkdir()
    for name in ("a.mp4", "b.webm", "part/c.mp4", "d.TS"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def find(folder, files, **table):
    """Return captions by video, the rows left out by their place, and the videos."""
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    videos, dropped = find_videos(folder, CaptionTable(**table), Filters())
    rows = {drop.source: drop.reason for drop in dropped if drop.kind not in ("no caption", "missing file")}
    return {video.name: video.captions for video in videos}, rows, videos


@pytest.mark.parametrize(
    ("name", "content", "captions", "places"),
    [
        (CSV, "path,caption\na.mp4,a dog, brown\nb.webm,x\n", {"b.webm": ["x"]}, ["line 2"]),
        (CSV, "path,caption,views\na.mp4,x\nb.webm,y,5\n", {"b.webm": ["y"]}, ["line 2"]),
        (CSV, f"path,caption\na.mp4,{QUOTE}a dog\nb.webm,x\n", {"b.webm": ["x"]}, ["line 2"]),
        (
            CSV,
            'path,caption\na.mp4,"a dog\nb.webm,x\npart/c.mp4,"y"\n',
            {"b.webm": ["x"], "part/c.mp4": ["y"]},
            ["line 2"],
        ),
        (CSV, 'path,caption\na.mp4,"a dog\nb.webm,a 5"\n', {"b.webm": ['a 5"']}, ["line 2"]),
        (CSV, 'path,caption\na.mp4,"a dog,\n brown"\n', {"a.mp4": ["a dog, brown"]}, []),
        (CSV, "path,caption\n\n\na.mp4,x\n\nb.webm,x,y\n", {"a.mp4": ["x"]}, ["line 6"]),
        (CSV, b'\xef\xbb\xbfpath,caption\r\na.mp4,"x\r\ny"\r\n', {"a.mp4": ["x y"]}, []),
        (CSV, ",path,caption\n0,a.mp4,x\n", {"a.mp4": ["x"]}, []),
        (CSV, "path,caption\n,one\na.mp4,two\n", {"a.mp4": ["two"]}, ["line 2"]),
        (CSV, "path,caption\na.mp4,1\n./a.mp4,2\npart/../a.mp4,3\n", {"a.mp4": ["1", "2", "3"]}, []),
        (JSONL, '{"path":"a.mp4","caption":NaN}\n{"path":"b.webm","caption":["x",null]}', {"b.webm": ["x"]}, []),
        (JSONL, '{"path":"a.mp4"}\n\n{"path":"b.webm","caption":"x"}\n{oops', {"b.webm": ["x"]}, ["line 4"]),
        (
            JSONL,
            "\n".join(
                (
                    '{"path":"a.mp4","caption":{"en":"x"}}',
                    '{"path":"a.mp4","caption":[["x"]]}',
                    '{"path":"a.mp4","caption":5}',
                    "[1]",
                    '{"path":7,"caption":"x"}',
                    '{"caption":"x"}',
                    '{"path":"d.TS","caption":"y"}',
                    '{"path":"a.mp4","caption":"\\ud800"}',
                    '{"path":"a.mp4","caption":"x","caption":"y"}',
                )
            ),
            {"d.TS": ["y"]},
            [f"line {n}" for n in (4, 9, 1, 2, 3, 5, 6, 8)],
        ),
        ("captions.json", '[{"path":"a.mp4","caption":"x"},5]', {"a.mp4": ["x"]}, ["row 2"]),
        (
            "captions.json",
            '{"a.mp4":"x","part/c.mp4":["y","z"],"b.webm":5}',
            {"a.mp4": ["x"], "part/c.mp4": ["y", "z"]},
            ["'b.webm'"],
        ),
        ("captions.tsv", "path\tcaption\na.mp4\ta dog, brown\n", {"a.mp4": ["a dog, brown"]}, []),
        ("metadata.jsonl", '{"file_name":"a.mp4","text":"x"}', {"a.mp4": ["x"]}, []),
        ("OpenVid-1M.csv", "video,caption,fps\na.mp4,a dog,25\n", {"a.mp4": ["a dog"]}, []),
    ],
)
def test_a_row_that_is_not_of_the_form_is_named_and_left_out(name, content, captions, places, folder):
    found, rows, _ = find(folder, {name: content})
    assert (found, sorted(rows)) == (captions, sorted(f"{name} {place}" for place in places))
    assert all(reason.startswith("invalid row (") for reason in rows.values())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (CSV, "path,caption\na.mp4,x\n".encode("utf-16"), r"it is in UTF-16: save it as UTF-8"),
        (CSV, b"path,caption\na.mp4,x\nb.webm,\xe9\n", r"line 3 is not UTF-8"),
        (CSV, "path,caption,caption\na.mp4,x,y\n", r"two columns of one name"),
        (CSV, "path,caption\na.mp4,x,y\n", r"No row of .* such as line 2: 3 values for 2 columns"),
        ("captions.json", '{"a.mp4":"x","a.mp4":"y"}', r"its key 'a.mp4' occurs twice"),
        ("captions.json", "[" * 100_000, r"nested too deeply"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_refused(name, content, sentence, folder):
    with pytest.raises(UserError, match=sentence):
        find(folder, {name: content})


def test_lines_of_prompts_and_videos(folder):
    assert find(folder, {"prompts.txt": "one\ntwo\n", "videos.txt": "a.mp4\nb.webm\n"})[0] == {
        "a.mp4": ["one"],
        "b.webm": ["two"],
    }
    with pytest.raises(UserError, match=r"3 lines and .* 2"):
        find(folder, {"prompts.txt": "one\ntwo\nthree\n"})


def test_a_json_next_to_each_video(folder):
    files = {
        "a.json": '{"caption":"x","views":3}',
        "b.JSON": "[1]",
        "part/c.json": '{"captions":"one text"}',
        "d.txt": "y",
    }
    captions, rows, videos = find(folder, files)
    assert captions == {"a.mp4": ["x"], "part/c.mp4": ["one text"], "d.TS": ["y"]}
    assert rows == {"b.webm": "its json is not an object"}
    assert videos[0].extra == {"views": 3}


def test_captions_of_parts_of_a_video(folder):
    rows = "a,\"[['0:00:01.000', '0:01:02.500']]\",\"['it\\'s one']\"\nc,\"[1]\",\"['x', 'y']\"\n"
    _, bad, (video,) = find(folder, {"panda70m.csv": f"videoID,timestamp,caption\n{rows}"})
    assert (video.name, video.segments) == ("a.mp4", ((1.0, 62.5, "it's one"),))
    assert list(bad) == ["panda70m.csv line 3"]


def test_no_captions(folder):
    captions = find(folder, {"captions.csv": "path,caption\na.mp4,x\n"}, path="none")[0]
    assert captions == {"a.mp4": [], "b.webm": [], "d.TS": [], "part/c.mp4": []}


@pytest.mark.parametrize(
    ("files", "table", "option"),
    [
        ({"a.txt": "x"}, {"caption_column": "text"}, "--caption_column has no effect"),
        ({}, {"path": "none", "path_column": "x", "caption_column": "y"}, "--path_column and --caption_column have no"),
        ({"m.json": json.dumps({"videos": [], "sentences": []})}, {"path_column": "x"}, "have no effect"),
    ],
)
def test_an_option_without_effect_is_an_error(files, table, option, folder):
    with pytest.raises(UserError, match=option):
        find(folder, files, **table)


def test_an_id_that_names_several_videos_is_left_out(folder):
    rows = {"c.mp4": "x", "r.csv": "videoid,page_dir,name\nc,p,x\na,p,y\n"}
    captions, left_out, _ = find(folder, rows)
    assert captions == {"a.mp4": ["y"]}
    assert left_out["c"].startswith("ambiguous id (it names c.mp4, part/c.mp4")


def test_links_and_names_that_are_not_utf8(folder):
    (folder / "loop").symlink_to(".")
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "again.mp4").symlink_to("a.mp4")
    (folder / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"x")
    rows = "a.mp4,x\nagain.mp4,y\ngone.mp4,z\nloop/b.webm,q\n"
    (folder / "captions.csv").write_text(f"path,caption\n{rows}")
    videos, dropped = find_videos(folder, CaptionTable(), Filters())
    assert {video.name: video.captions for video in videos} == {"a.mp4": ["x", "y"], "b.webm": ["q"]}
    assert {drop.source for drop in dropped} == {"gone.mp4", "bad\\xff.mp4", "d.TS", "part/c.mp4"}
