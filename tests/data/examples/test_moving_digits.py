"""Captioned Moving MNIST, drawn from images that stand for MNIST's."""

import csv
import re

import numpy as np
import pytest

from data.examples.handwriting import DIGIT_SIZE
from data.examples.moving_digits import (
    IMAGE_SIZE,
    MOTIONS,
    DigitsClip,
    captions_of,
    combinations,
    draw,
    make_digits,
    render,
)
from t2v.video import probe
from tests.support.digits import write_mnist


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory):
    """MNIST's files, in which digit d is a square of brightness 20·(d + 1), and 5 more if it is held out."""
    folder = tmp_path_factory.mktemp("handwriting")
    brightness = 20 * (np.arange(10) + 1)
    write_mnist(folder, brightness, brightness + 5)
    return folder


@pytest.mark.parametrize(("digits", "count", "held_out"), [(1, 20, 5), (2, 360, 180)])
def test_the_splits_share_digits_and_motions_and_no_caption(digits, count, held_out):
    train, val = combinations(digits, held_out=False), combinations(digits, held_out=True)
    assert (len(train), len(val)) == (count - held_out, held_out)
    assert len({*train, *val}) == count
    assert {part for combination in train for part in combination} >= {(1, MOTIONS[0]), (1, MOTIONS[1])}
    assert {digit for combination in train for digit, _ in combination} == set(range(10))
    assert {motion for combination in val for _, motion in combination} == set(MOTIONS)


def test_the_first_caption_is_that_of_the_literature():
    clip = DigitsClip(3, "up and down", 7, "left and right", seed=0)
    assert captions_of(clip)[0] == "digit 3 is moving up and down and digit 7 is moving left and right"
    assert captions_of(clip)[1:] == list(dict.fromkeys(captions_of(clip)[1:]))


def corners(video):
    """Return the top and the left edge of a bright square in each frame."""
    return np.array([np.argwhere(frame[0].numpy() > 10).min(0) for frame in video])


@pytest.mark.parametrize(("motion", "axis"), [("up and down", 0), ("left and right", 1)])
def test_a_digit_moves_along_its_axis_and_bounces_at_both_edges(motion, axis, handwriting):
    video = render(DigitsClip(4, motion, -1, "", seed=1), 60, handwriting=handwriting)
    assert video.shape == (60, 3, IMAGE_SIZE, IMAGE_SIZE)
    position = corners(video)
    assert len(set(position[:, 1 - axis])) == 1
    steps = np.diff(position[:, axis])
    assert max(abs(steps)) == 4  # 3.6, rounded
    assert position[:, axis].min() <= 2
    assert position[:, axis].max() >= IMAGE_SIZE - DIGIT_SIZE - 2
    assert {1, -1} <= set(np.sign(steps))


def test_held_out_clips_have_their_own_handwriting_and_overlaps_are_the_brighter_digit(handwriting):
    clip = DigitsClip(2, "up and down", 8, "left and right", seed=3)
    for held_out, brightness in ((False, {0, 60, 180}), (True, {0, 65, 185})):
        video = render(clip, 16, held_out, handwriting)
        assert set(video.unique().tolist()) == brightness
        assert ((video == max(brightness)).sum((1, 2, 3)) == 3 * DIGIT_SIZE**2).all()


def test_equal_seeds_draw_equal_clips_and_all_captions_of_a_split():
    clips = draw(2, held_out=True, clips=180, seed=5)
    assert clips == draw(2, held_out=True, clips=180, seed=5)
    assert [clip.seed for clip in clips] != [clip.seed for clip in draw(2, held_out=True, clips=180, seed=6)]
    assert {tuple(clip.parts) for clip in clips} == set(combinations(2, held_out=True))


def test_the_data_set_is_written_and_kept(tmp_path, handwriting, capsys):
    options = {"digits": 1, "frames": 20, "train_clips": 3, "val_clips": 2, "num_workers": 1}
    make_digits(tmp_path / "clips", **options, handwriting=handwriting)
    for split, captions in (("train", 12), ("val", 2)):
        folder = tmp_path / "clips" / split
        with (folder / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == captions
        assert all(re.search(rf"{row['digit']}.*{row['motion']}", row["caption"]) for row in rows)
        assert probe(folder / "000000.mp4").frames == 20
    make_digits(tmp_path / "clips", **options, handwriting=handwriting)
    assert "complete already" in capsys.readouterr().out
