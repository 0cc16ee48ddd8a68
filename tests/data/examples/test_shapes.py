import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.examples.oracle import NOTHING, Answer, best_fits, recognize, recognize_file, shows
from data.examples.shapes import (
    BACKGROUND,
    COLOURS,
    DIRECTION_WORDS,
    DIRECTIONS,
    FPS,
    FRAMES,
    IMAGE_SIZE,
    LATTICE,
    SHAPE_WORDS,
    SHAPES,
    SHARED,
    SIZE_WORDS,
    SPEED_WORDS,
    STILL_WORDS,
    VAGUE,
    ShapeClip,
    combinations,
    draw,
    held_out_prompts,
    make_shapes,
    render,
    training_captions,
)
from t2v.video import probe


def pixels(clip):
    return render(clip).permute(0, 2, 3, 1).numpy()


def test_the_splits_share_all_attributes_and_no_combination():
    train, held_out = combinations(held_out=False), combinations(held_out=True)
    assert len(train) + len(held_out) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    assert not set(train) & set(held_out)
    for part in (train, held_out):
        colours, shapes, directions = (set(words) for words in zip(*part, strict=True))
        assert (colours, shapes, directions) == (set(COLOURS), set(SHAPES), set(DIRECTIONS))


def test_a_caption_names_the_attributes_of_its_clip():
    for clip, caption in draw(held_out=False, clips=400, seed=0):
        assert clip.colour in caption
        assert any(word in caption for word in SHAPE_WORDS[clip.shape])
        words = DIRECTION_WORDS.get(clip.direction) or [word for pair in STILL_WORDS for word in pair]
        assert any(word in caption for word in words)


@pytest.mark.usefixtures("unchecked_shapes")  # many small calls
def test_training_captions_are_true_and_shared_by_several_clips():
    drawn = list(draw(held_out=False, clips=3600, seed=0))
    captions = training_captions(drawn, seed=0)
    assert captions == training_captions(drawn, seed=0)
    assert all(texts[0] == own for texts, (_, own) in zip(captions, drawn, strict=True))
    common = Counter(text for texts in captions for text in texts)
    assert sum(common[text] > 1 for texts in captions for text in texts) > 0.8 * common.total()
    assert SHARED + VAGUE - 0.5 < common.total() / len(captions) <= SHARED + VAGUE
    words = [*((word, speed) for speed, some in SPEED_WORDS.items() for word in some)]
    words += [(f" {word} ", size) for size, some in SIZE_WORDS.items() for word in some]
    words += [(f" {word} ", shape) for shape, some in SHAPE_WORDS.items() for word in some]
    words += [(f" {colour} ", colour) for colour in COLOURS]
    words += [(word, direction) for direction, some in DIRECTION_WORDS.items() for word in some]
    for (clip, _), texts in zip(drawn, captions, strict=True):
        shown = {clip.colour, clip.shape, clip.direction, clip.size, clip.speed}
        for text in texts:
            assert {what for word, what in words if word in f" {text} "} <= shown
        for text in texts[:-VAGUE]:
            assert clip.colour in text
            assert any(word in text for word in SHAPE_WORDS[clip.shape])


def test_a_shape_moves_by_its_speed_within_the_picture():
    for clip, _ in draw(held_out=False, clips=150, seed=1):
        video = pixels(clip)
        assert video.shape == (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert clip.x % LATTICE == clip.y % LATTICE == 0
        covered = (video != np.array(BACKGROUND)).any(-1)
        areas = covered.sum((1, 2))
        assert (areas == areas[0]).all()
        dx, dy = DIRECTIONS[clip.direction]
        step = {"slow": 2, "fast": 4}[clip.speed]
        np.testing.assert_array_equal(np.roll(covered[0], (dy * step, dx * step), (0, 1)), covered[1])


def test_a_shape_stops_at_the_edge():
    video = pixels(ShapeClip("red", "square", "left", "small", "fast", x=28, y=20))
    columns = [np.flatnonzero((frame != np.array(BACKGROUND)).any((0, 2)))[0] for frame in video]
    assert columns == [28, 24, 20, 16, 12, 8, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_the_oracle_recognizes_every_clip():
    for clip, _ in [*draw(held_out=False, clips=144, seed=2), *held_out_prompts(1)]:
        assert recognize(pixels(clip)) == Answer.of(clip)


def test_every_frame_of_a_clip_is_most_similar_to_its_shape():
    for clip, _ in draw(held_out=True, clips=18, seed=4):
        assert shows(pixels(clip), clip.colour, clip.shape)


def test_a_shape_that_changes_or_fades_is_not_shown():
    clip = ShapeClip("red", "square", "left", "large", "slow", x=36, y=20)
    video = pixels(clip)
    turned = np.concatenate([video[:12], pixels(replace(clip, shape="circle"))[12:]])
    faded = np.concatenate([video[:12], video[12:] // 2])
    for changed in (turned, faded):
        assert recognize(changed)[:2] == ("red", "square")
        assert not shows(changed, "red", "square")
    assert [fit.shape for fit in best_fits(turned)] == 12 * ["square"] + 4 * ["circle"]


def test_the_oracle_finds_nothing_in_an_empty_clip():
    background = np.broadcast_to(np.array(BACKGROUND, np.uint8), (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3))
    assert recognize(background) == NOTHING


def test_prompts_are_held_out_and_deterministic():
    prompts = held_out_prompts(2)
    assert prompts == held_out_prompts(2)
    assert len(prompts) == 2 * len(combinations(held_out=True))
    assert {(c.colour, c.shape, c.direction) for c, _ in prompts} == set(combinations(held_out=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(out, train_clips=6, val_clips=3, num_workers=1)
    return out


@pytest.mark.slow
def test_two_processes_draw_the_same_files(folder, tmp_path):
    make_shapes(tmp_path, train_clips=6, val_clips=3, num_workers=2)
    for part in ("train", "val"):
        for path in (folder / part).iterdir():
            assert path.read_bytes() == (tmp_path / part / path.name).read_bytes()


def test_the_files_show_the_attributes_in_their_table(folder, capsys):
    for part, count in (("train", 6), ("val", 3)):
        with (folder / part / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0])[:2] == ["path", "caption"]
        names = dict.fromkeys(row["path"] for row in rows)
        assert sorted(path.name for path in (folder / part).glob("*.mp4")) == list(names)
        assert len(names) == count
        assert (len(rows) > count) == (part == "train")
        for row in rows:
            path = folder / part / row["path"]
            info = probe(path)
            assert (info.frames, info.fps, info.height, info.width) == (FRAMES, FPS, IMAGE_SIZE, IMAGE_SIZE)
            assert recognize_file(path) == Answer(row["colour"], row["shape"], row["direction"])
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    make_shapes(folder, train_clips=6, val_clips=3)
    assert capsys.readouterr().out.count("complete already") == 2


def test_a_clip_does_not_depend_on_their_number():
    few, many = list(draw(True, 3, seed=0)), list(draw(True, 9, seed=0))
    assert many[:3] == few
    assert isinstance(few[0][0], ShapeClip)
