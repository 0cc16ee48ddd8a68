import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.inspect import inspect
from t2v.errors import UserError
from tests.support import forked
from tests.support.corpus import corrupted_corpus


def table(printed):
    """Return the values of the printed tables by name."""
    rows = [line.strip().split("  ", 1) for line in printed.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, value in rows if value.strip()}


def run_inspect(shards, capsys, **options):
    """Return the printed text and the exit status."""
    try:
        inspect(str(shards), **options)
    except SystemExit as end:
        return capsys.readouterr().out, end.code
    return capsys.readouterr().out, 0


def command(folder, *arguments):
    return forked.run("-m", "data.inspect", *arguments, cwd=folder)


def test_the_command_reports_and_draws_a_sheet(videos, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in videos.iterdir()}
    result = command(tmp_path, videos)
    assert result.returncode == 0, result.stderr
    found = table(result.stdout)
    assert found["shards"] == "3"
    assert found["samples"] == "10"
    assert found["members"] == "json 10, mp4 10, txt 10"
    assert (found["frames per clip"], found["frames per second"], found["width x height"]) == ("6", "8", "32x32")
    assert found["with a caption"] == "10; without 0"
    assert found["words per caption"] == "3"
    assert found["decoded to check"] == "10 of 10 clips"
    assert "No problems found." in result.stdout
    (sheet,) = tmp_path.iterdir()
    assert sheet.name == f"inspect-{videos.parent.name}-{videos.name}.png"
    assert {path.name: path.stat().st_mtime_ns for path in videos.iterdir()} == before
    assert command(tmp_path, tmp_path / "none").returncode == 2


def test_the_command_does_not_import_lightning():
    script = "import sys, data.inspect; sys.exit('lightning' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_sheet_shows_the_first_and_the_last_frame(make, tmp_path, capsys):
    make.shards(tmp_path / "shards", [make.video("a", frames=16), make.video("b", frames=16)])
    _, status = run_inspect(tmp_path / "shards", capsys, sheet=tmp_path / "sheet.png", clips=1, frames=2)
    assert status == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    greys = {int(grey) for grey in np.unique(sheet[40:100])}  # below the lines of text
    assert {0, 255} <= greys
    assert any(abs(grey - 15 * 8) <= 2 for grey in greys)  # the last frame
    assert not any(20 < grey < 100 for grey in greys)  # no other


def test_token_shards_are_reported_and_drawn(make, tmp_path, capsys):
    several = make.tokens("b", text_tokens=5)
    several["json"] = {**several["json"], "captions": ["one", "and another one"], "text_lengths": [2, 3]}
    shards = make.shards(tmp_path / "shards", [make.tokens("a"), several])
    printed, status = run_inspect(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 0, printed
    found = table(printed)
    assert found["frames x height x width"] == "6x2x2"
    assert found["codes used"] == "6, from 0 to 5"
    assert found["captions per clip"] == "1 to 3, median 2"
    assert found["text tokens per caption"] == "2 to 3, median 3"
    assert found["width of text embedding"] == "8 (float16)"
    assert found["fingerprint: tokenizer"] == "abc"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    coloured = {tuple(pixel) for pixel in sheet.tolist() if len(set(pixel)) > 1}
    assert len(coloured) == 6  # as many as there are codes


def test_every_problem_of_a_corrupted_corpus_is_reported(tmp_path, capsys):
    shards, skipped = corrupted_corpus(tmp_path / "shards")
    printed, status = run_inspect(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 1
    assert f"{len(skipped)} problems found" in printed
    for key, shard in skipped:
        assert f"{key} in {shards / shard}: " in printed


@pytest.mark.parametrize(("decode", "problems"), [(-1, 1), (0, 0)])
def test_a_damaged_video_is_found_by_decoding(decode, problems, make, tmp_path, capsys):
    shards = make.shards(tmp_path / "shards", [make.video(key) for key in "abc"])
    make.damage(shards, "b")
    printed, status = run_inspect(shards, capsys, sheet=tmp_path / "sheet.png", decode=decode)
    assert status == problems
    assert ("b in " in printed) == bool(problems)
    assert (tmp_path / "sheet.png").exists()


def change(sample, **members):
    return {**sample, **{name.replace("_", "."): content for name, content in members.items()}}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tokens_npy": np.full((6, 2, 2), 99, np.uint16)}, "are from 99 to 99, outside the codebook \\(0 to 9\\)"),
        ({"tokens_npy": np.zeros((6, 2, 2), np.float32)}, "are float32 of shape"),
        ({"tokens_npy": np.zeros((6, 4), np.uint16)}, r"of shape \(6, 4\)"),
        ({"text_npy": np.full((3, 8), np.nan, np.float16)}, "are not finite"),
        ({"text_npy": np.zeros(8, np.float16)}, r"has the shape \(8,\)"),
        (
            {"json": {"fingerprint": {"codebook_size": 10, "size": 64}}},
            "2 different fingerprints, which differ in size",
        ),
        ({"json": {"caption": "without a fingerprint"}}, "1 samples have no fingerprint"),
        ({"json": {"fingerprint": {"codebook_size": 10}, "text_lengths": [9]}}, r"have the lengths \[9\]"),
    ],
)
def test_inconsistent_token_shards_are_reported(members, message, make, tmp_path, capsys):
    good = [change(make.tokens(key), json={"fingerprint": {"codebook_size": 10}}) for key in "ab"]
    shards = make.shards(tmp_path / "shards", [*good, change(good[0], __key__="c", **members)])
    printed, status = run_inspect(shards, capsys, sheet=tmp_path / "sheet.png")
    assert status == 1
    assert re.search(message, printed), printed


def test_samples_without_needed_members_are_reported(make, tmp_path, capsys):
    silent = {name: content for name, content in make.tokens("c").items() if name != "text.npy"}
    shards = make.shards(tmp_path / "shards", [make.tokens("a"), silent, {"__key__": "d", "txt": "no clip"}])
    printed, status = run_inspect(shards, capsys, clips=0)
    assert status == 1
    assert "c in " in printed
    assert "it has no text.npy" in printed
    assert "it has txt, but no video and no tokens" in printed


def test_the_sheet_is_not_written_among_the_shards(videos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="among the shards"):
        inspect(str(videos), sheet=videos / "sheet.png")
    monkeypatch.chdir(videos)
    with pytest.raises(UserError, match="among the shards"):
        inspect(".")
    with pytest.raises(UserError, match="a folder that exists"):
        inspect(str(videos), sheet=tmp_path / "none" / "sheet.png")
    assert not list(videos.glob("*.png"))
