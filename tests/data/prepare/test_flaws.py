import json

import numpy as np
import pytest

from data.examples.shapes import ShapeClip, render
from data.prepare import prepare
from data.prepare.cutting import cut, make_jobs, read_result
from data.prepare.filters import Filters
from data.prepare.flaws import Bars, Flaws, find_flaws
from data.prepare.sources import Video
from data.prepare.video_clips import ClipFormat
from data.shards import ShardSet
from t2v.video import probe, read_frames, write_mp4
from tests.data import corpus


@pytest.fixture
def source(tmp_path):
    """A folder of a video with black bars, one without flaws, and an interlaced one."""
    folder = tmp_path / "source"
    folder.mkdir()
    corpus.interlaced(folder / "unmarked.mp4", marked=False)
    corpus.boxed(folder / "boxed.mp4", 16, 0)
    write_mp4(folder / "plain.mp4", render(ShapeClip("red", "circle", "right", "large", "fast", 0, 5)), 10)
    return folder


def flaws_of(path):
    return find_flaws(path, probe(path), 60.0)


def test_interlaced_frames_are_found_where_they_are_not_marked(tmp_path):
    corpus.interlaced(tmp_path / "unmarked.mp4", marked=False)
    corpus.interlaced(tmp_path / "marked.mp4")
    texture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    corpus.encode(tmp_path / "texture.mp4", [np.roll(texture, 3 * i, 1) for i in range(12)])
    corpus.encode(tmp_path / "static.mp4", [texture] * 12)
    assert flaws_of(tmp_path / "unmarked.mp4") == Flaws(interlaced=True)
    for name in ("marked", "texture", "static"):
        assert flaws_of(tmp_path / f"{name}.mp4") == Flaws()


@pytest.mark.parametrize(("rows", "columns"), [(16, 0), (0, 20), (16, 20)])
def test_black_bars_are_found(rows, columns, tmp_path):
    corpus.boxed(tmp_path / "a.mp4", rows, columns)
    assert flaws_of(tmp_path / "a.mp4") == Flaws(bars=Bars(rows, rows, columns, columns))


def test_a_dark_video_a_dark_side_and_a_dark_background_are_no_bars(tmp_path):
    night = [picture // 16 for picture in corpus.moving(12)]
    corpus.encode(tmp_path / "night.mp4", night)
    floor = [np.pad(picture, ((0, 32), (0, 0), (0, 0))) for picture in corpus.moving(12)]
    corpus.encode(tmp_path / "floor.mp4", floor)
    write_mp4(tmp_path / "background.mp4", render(ShapeClip("white", "circle", "still", "large", "slow", 20, 20)), 10)
    for name in ("night", "floor", "background"):
        assert flaws_of(tmp_path / f"{name}.mp4") == Flaws()


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(), {"boxed": ["black bars"], "plain": [], "unmarked": ["interlaced frames"]}),
        (Filters(interlaced="deinterlace", bars="crop"), {"boxed": [], "plain": [], "unmarked": []}),
        (Filters(interlaced="drop", bars="drop"), {"plain": []}),
    ],
)
def test_flaws_are_named_mended_or_dropped(filters, kept, source, tmp_path):
    videos = [Video(path.stem, ["x"], {}, path, path.stat().st_size) for path in sorted(source.iterdir())]
    (job,) = make_jobs(videos, 3, tmp_path, ClipFormat(64, 10.0, 4, 0, filters, 60.0))
    cut(job)
    rows, dropped = read_result(job.result)
    assert {videos[row.video].name: row.flaws for row in rows} == kept
    assert [(drop.source, drop.kind) for drop in dropped] == [
        (name, {"boxed": "black bars", "unmarked": "interlaced frames"}[name])
        for name in ("boxed", "unmarked")
        if name not in kept
    ]
    if filters.bars == "crop":
        content = job.clips.read_bytes()
        frames = {
            videos[row.video].name: read_frames(content[row.offset : row.offset + row.size], [0])[0].float()
            for row in rows
        }
        assert frames["boxed"][:, :4].mean() > 40
        assert (frames["unmarked"][:, 9:-8] - frames["unmarked"][:, 8:-9]).abs().mean() < 1


@pytest.mark.slow  # starts processes
def test_flaws_that_are_kept_are_printed_and_in_the_json(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", "none", fps=10.0, frames=4, scenes=0.0, num_workers=1)
    shards = ShardSet(tmp_path / "out")
    rows = [json.loads(shards.read(sample, "json")["json"]) for sample in shards.samples]
    flaws = {"boxed.mp4": ["black bars"], "plain.mp4": None, "unmarked.mp4": ["interlaced frames"]}
    assert {row["source"]: row.get("flaws") for row in rows} == flaws
    printed = capsys.readouterr().out
    assert "named in their json; --filters.interlaced " in printed
    assert "named in their json; --filters.bars " in printed
