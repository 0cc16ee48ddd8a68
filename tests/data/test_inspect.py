import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.inspect import inspect
from t2v.errors import UserError
from tests.support.corpus import corrupted_corpus


def table(printed):
    """The values of the table by their names."""
    rows = [line.strip().split("  ", 1) for line in printed.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, value in rows if value.strip()}


def look(shards, capsys, **options):
    """What is printed, and the exit status."""
    try:
        inspect(str(shards), **options)
    except SystemExit as end:
        return capsys.readouterr().out, end.code
    return capsys.readouterr().out, 0


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "data.inspect", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(videos, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in videos.iterdir()}
    result = command(tmp_path, videos)
    assert result.returncode == 0, result.stderr
    found = table(result.stdout)
    assert found["shards"] == "3"
    assert found["samples"] == "10"
    assert found["members"] == "json 10, mp4 10, txt 10"
    assert (found["frames a clip"], found["frames a second"], found["width x height"]) == ("6", "8", "32x32")
    assert found["with a caption"] == "10; without 0"
    assert found["words a caption"] == "3"
    assert found["decoded to check"] == "10 of 10 clips"
    assert "Nothing is wrong." in result.stdout
    (sheet,) = tmp_path.iterdir()
    assert sheet.name == f"inspect-{videos.parent.name}-{videos.name}.png"
    assert {path.name: path.stat().st_mtime_ns for path in videos.iterdir()} == before
    assert command(tmp_path, tmp_path / "none").returncode == 2


def test_it_starts_without_lightning():
    script = "import sys, data.inspect; sys.exit('lightning' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_sheet_shows_frames(make, tmp_path, capsys):
    make.shards(tmp_path / "shards", [make.video("a", frames=16), make.video("b", frames=16)])
    _, status = look(tmp_path / "shards", capsys, sheet=tmp_path / "sheet.png", clips=1, frames=2)
    assert status == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    greys = {int(grey) for grey in np.unique(sheet[40:100])}  # below the lines of text
    assert {0, 255} <= greys
    assert any(abs(grey - 15 * 8) <= 2 for grey in greys)  # the last frame
    assert not any(20 < grey < 100 for grey in greys)  # no other


def test_tokens(make, tmp_path, capsys):
    several = make.tokens("b", words=5)
    several["json"] = {**several["json"], "captions": ["one", "and another one"], "text_lengths": [2, 3]}
    several["pooled.npy"] = np.stack([several["pooled.npy"]] * 2)
    shards = make.shards(tmp_path / "shards", [make.tokens("a"), several])
    printed, status = look(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 0, printed
    found = table(printed)
    assert found["frames x height x width"] == "6x2x2"
    assert found["codes that occur"] == "6, from 0 to 5"
    assert found["captions a clip"] == "1 to 3, median 2"
    assert found["vectors a caption"] == "2 to 3, median 3"
    assert found["width of a vector"] == "8 (float16)"
    assert found["fingerprint: tokenizer"] == "abc"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    coloured = {tuple(pixel) for pixel in sheet.tolist() if len(set(pixel)) > 1}
    assert len(coloured) == 6  # as many as there are codes


def test_everything_that_is_wrong_with_a_corpus_is_named(tmp_path, capsys):
    shards, wrong = corrupted_corpus(tmp_path / "shards")
    printed, status = look(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 1
    assert f"{len(wrong)} things are wrong" in printed
    for key, shard in wrong:
        assert f"{key} in {shards / shard}: " in printed


@pytest.mark.parametrize(("decode", "wrong"), [(-1, 1), (0, 0)])
def test_a_clip_that_is_damaged_inside(decode, wrong, make, tmp_path, capsys):
    shards = make.shards(tmp_path / "shards", [make.video(key) for key in "abc"])
    make.damage(shards, "b")
    printed, status = look(shards, capsys, sheet=tmp_path / "sheet.png", decode=decode)
    assert status == wrong
    assert ("b in " in printed) == bool(wrong)
    assert (tmp_path / "sheet.png").exists()


def change(sample, **members):
    return {**sample, **{name.replace("_", "."): content for name, content in members.items()}}


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"tokens_npy": np.full((6, 2, 2), 99, np.uint16)}, "reach from 99 to 99, but codes go from 0 to 9"),
        ({"tokens_npy": np.zeros((6, 2, 2), np.float32)}, "are float32 of shape"),
        ({"tokens_npy": np.zeros((6, 4), np.uint16)}, r"of shape \(6, 4\)"),
        ({"text_npy": np.full((3, 8), np.nan, np.float16)}, "are no numbers"),
        ({"text_npy": np.zeros(8, np.float16)}, "have the shapes"),
        ({"pooled_npy": np.zeros((2, 8), np.float16)}, "there are 1 captions"),
        (
            {"json": {"fingerprint": {"codebook_size": 10, "size": 64}}},
            "2 different fingerprints, which differ in size",
        ),
        ({"json": {"caption": "made by nobody knows what"}}, "1 samples have no fingerprint"),
        ({"json": {"fingerprint": {"codebook_size": 10}, "text_lengths": [9]}}, r"have the lengths \[9\]"),
    ],
)
def test_tokens_that_do_not_fit(members, told, make, tmp_path, capsys):
    good = [change(make.tokens(key), json={"fingerprint": {"codebook_size": 10}}) for key in "ab"]
    shards = make.shards(tmp_path / "shards", [*good, change(good[0], __key__="c", **members)])
    printed, status = look(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 1
    assert re.search(told, printed), printed


def test_missing_members_and_samples_that_are_no_clips(make, tmp_path, capsys):
    silent = {name: content for name, content in make.tokens("c").items() if name != "text.npy"}
    shards = make.shards(tmp_path / "shards", [make.tokens("a"), silent, {"__key__": "d", "txt": "no clip"}])
    printed, status = look(shards, capsys, clips=0)
    assert status == 1
    assert "c in " in printed
    assert "it has no text.npy" in printed
    assert "it has txt, which makes no clip" in printed


def test_the_sheet_never_lies_among_the_shards(videos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="among the shards"):
        inspect(str(videos), sheet=videos / "sheet.png")
    monkeypatch.chdir(videos)
    with pytest.raises(UserError, match="among the shards"):
        inspect(".")
    with pytest.raises(UserError, match="a folder that exists"):
        inspect(str(videos), sheet=tmp_path / "none" / "sheet.png")
    assert not list(videos.glob("*.png"))
