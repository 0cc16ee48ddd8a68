"""Clips of the game Flare, drawn from a stand-in for the game: each sprite is a square with a colour of its own."""

import csv
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from data.examples.flare import (
    ACTIONS,
    ARMOURS,
    CREATURES,
    CREDIT,
    FACINGS,
    FRAMES,
    GROUNDS,
    HAIR,
    SEXES,
    WEAPONS,
    FlareClip,
    captions_of,
    combinations,
    draw,
    make_flare,
    render,
)
from data.examples.flare_game import find_game, load_animation
from t2v.errors import UserError
from t2v.video import probe

NUMBERS = 2
GREEN = 60


def animation(*actions: str) -> str:
    lines = ["image=images/sheet.png", ""]
    for action in actions:
        kind = "looped" if action == "run" else "back_forth" if action == "stance" else "play_once"
        lines += [f"[{action}]", f"frames={NUMBERS}", "duration=400ms", f"type={kind}", "active_frame=1"]
        boxes = itertools.product(range(NUMBERS), range(8))
        lines += [f"frame={number},{facing},{10 * facing},{10 * number},10,10,5,10" for number, facing in boxes]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    root = tmp_path_factory.mktemp("game")
    core = root / "usr/share/games/flare/mods/fantasycore"
    sheet = np.zeros((10 * NUMBERS, 80, 4), dtype=np.uint8)
    for number, facing in itertools.product(range(NUMBERS), range(8)):
        colour = (30 * facing, GREEN + 100 * number, 200, 255)
        sheet[10 * number : 10 * number + 10, 10 * facing : 10 * facing + 10] = colour
    (core / "images/tilesets").mkdir(parents=True)
    Image.fromarray(sheet).save(core / "images/sheet.png")
    parts = [name for names in ARMOURS.values() for name in names if name]
    parts += [name for names in WEAPONS.values() for name in names]
    files = [f"avatar/{folder}/{name}" for folder in SEXES.values() for name in [*parts, *HAIR.values()]]
    files += [f"enemies/{name}" for name in CREATURES]
    for name in files:
        path = core / f"animations/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(animation(*ACTIONS))
    (core / "tilesetdefs").mkdir()
    for tileset, numbers in GROUNDS.values():
        tiles = [f"tile={number},0,{32 * i},64,32,32,16" for i, number in enumerate(numbers)]
        (core / f"tilesetdefs/tileset_{tileset}.txt").write_text("\n".join(tiles))
        red = np.linspace(0, 255, 64 * 32 * len(numbers)).reshape(-1, 64)
        picture = np.stack([red, 0 * red, 0 * red, 0 * red + 255], -1).astype(np.uint8)
        Image.fromarray(picture).save(core / f"images/tilesets/tileset_{tileset}.png")
    return root


@pytest.fixture(scope="module")
def mods(game):
    return find_game(game)


def test_each_pair_of_who_action_and_facing_is_trained_and_no_held_out_combination():
    train, held_out = combinations(held_out=False), combinations(held_out=True)
    assert len(train) == 7 * len(held_out) == 7 * (10 * len(ACTIONS) + 14 * 6)
    assert not set(train) & set(held_out)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(c[i], c[j]) for c in held_out} <= {(c[i], c[j]) for c in train}
    for part in (train, held_out):
        whos, actions, facings = (set(words) for words in zip(*part, strict=True))
        assert (len(whos), actions, facings) == (24, set(ACTIONS), set(FACINGS))


def test_clips_are_drawn_alike_for_equal_seeds_with_weapons_that_fit_their_action():
    clips = draw(held_out=True, clips=200, seed=3)
    assert clips == draw(True, 200, 3) != draw(True, 200, 4)
    assert {clip.ground for clip in clips} == set(GROUNDS)
    for clip in clips:
        assert clip.weapon in WEAPONS.get(clip.action, clip.weapon) or clip.who in CREATURES.values()
        for caption in captions_of(clip):
            assert all(re.search(rf"\b{word}\b", caption) for word in (clip.who, clip.facing, clip.ground))
            assert clip.weapon.replace("_", " ") in caption


@pytest.mark.parametrize("size", [64, 128])
def test_a_character_faces_and_acts_as_its_caption_says(mods, size):
    for facing, name in enumerate(FACINGS):
        video = render(FlareClip("a goblin", "die", name, "snow", "", seed=1), mods, size)
        assert video.shape == (FRAMES, 3, size, size)
        middle = video[:, :, round(0.8 * size) - 5, size // 2]  # inside the square, which ends at the feet
        assert (middle[:, 0] - 30 * facing).abs().max() <= 2
        assert abs(int(middle[-1, 1]) - GREEN - 100) <= 2  # who dies stays dead
    still, running = (
        render(FlareClip("a man in cloth", action, "east", "grass", "club", seed=1), mods, size).int()
        for action in ("stance", "run")
    )
    assert (still[1:, :, 0] == still[:-1, :, 0]).all()
    assert (running[1:, :, 0] != running[:-1, :, 0]).any()


def test_the_data_set_has_captions_attributes_and_credits(game, tmp_path, capsys):
    make_flare(tmp_path / "clips", game, train_clips=3, val_clips=2, num_workers=1)
    for part, captions in (("train", 9), ("val", 2)):
        with (tmp_path / "clips" / part / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == captions
        assert {row["credit"] for row in rows} == {CREDIT}
        info = probe(tmp_path / "clips" / part / rows[0]["path"])
        assert (info.frames, info.fps, info.height, info.width) == (FRAMES, 15, 64, 64)
    assert "CC-BY-SA 3.0" in (tmp_path / "clips/CREDITS.txt").read_text()
    make_flare(tmp_path / "clips", tmp_path / "gone", train_clips=3, val_clips=2)  # needs no game any more
    assert capsys.readouterr().out.count("complete already") == 2


def test_a_missing_or_other_game_is_an_error_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not contain the game Flare"):
        make_flare(tmp_path / "clips", tmp_path)
    assert not (tmp_path / "clips").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "flare.deb").write_bytes(b"no package")
    with pytest.raises(UserError, match=r"`dpkg-deb -x .*flare\.deb \.` failed"):
        make_flare(tmp_path / "clips", tmp_path / "flare.deb")
    assert not (tmp_path / "cache/t2v/flare-game").exists()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"`apt-get download flare-game` failed.*give --game"):
        make_flare(tmp_path / "clips")
    other = tmp_path / "fantasycore/animations/avatar/male/club.txt"
    other.parent.mkdir(parents=True)
    other.write_text("[stance]\nframes=4\n")
    with pytest.raises(UserError, match="give --game version"):
        load_animation(other)
