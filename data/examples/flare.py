"""Animated characters of the free game Flare with captions: `python -m data.examples.flare OUT`.

Each clip shows one character, a person in armour with a weapon or a creature, that performs an action on one of four
grounds, with captions such as "a woman in chain mail shoots with a longbow facing east on snow". The clips are drawn
from the game's pre-rendered sprites: 16 frames at 15 frames per second.

- Who (10 kinds of person, 14 creatures), action and facing are held out in combination: an eighth of the combinations
  make up `val/` and do not occur in `train/`, though each pair of them does.
- Weapon and ground are drawn freely in both parts.
- `OUT/train` and `OUT/val` contain the mp4s and a `captions.csv` with path, caption and the attributes.

The sprites are those of the Debian package flare-game, which `apt-get download` fetches, or of a folder. They are by
Clint Bellanger and others, under CC-BY-SA 3.0 or later, and so are the clips: `OUT/CREDITS.txt` and the column `credit`
say so.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from data.examples import is_complete
from data.examples.flare_game import Animation, find_game, load_animation, load_tiles
from data.examples.writer import check_counts, write_split
from t2v.errors import run_tool
from t2v.files import atomic_path

FRAMES, FPS = 16, 15
CANVAS = 64
"""Pixels of the game in the width and height of a picture of 64 pixels."""
CANVAS_OF = {
    **dict.fromkeys(("antlion", "fire_ant", "goblin_elite", "ice_ant"), 80),
    **dict.fromkeys(("skeleton", "skeleton_archer", "skeleton_mage"), 80),
    **dict.fromkeys(("minotaur", "wyvern", "wyvern_air", "wyvern_fire", "wyvern_water"), 104),
}
"""The same for creatures that need more."""
FEET = (0.5, 0.8)
"""Where a character stands, from the left and from the top, as a fraction of the picture."""
PAUSE = 3
"""Frames of standing between two performances of an action."""
SPEED = 4.0
"""Pixels per frame by which the ground passes a running character."""
CREDIT = "flare-game by Clint Bellanger and others, CC-BY-SA 3.0 or later, https://flarerpg.org"

SEXES = {"man": "male", "woman": "female"}
ARMOURS = {
    "cloth": ("cloth_sandals", "cloth_pants", "cloth_gloves", "cloth_shirt", ""),
    "leather": ("leather_boots", "leather_pants", "leather_gloves", "leather_chest", "leather_hood"),
    "chain mail": ("chain_boots", "chain_greaves", "chain_gloves", "chain_cuirass", "chain_coif"),
    "plate armour": ("plate_boots", "plate_greaves", "plate_gauntlets", "plate_cuirass", "plate_helm"),
    "a mage's robe": ("mage_boots", "mage_skirt", "mage_sleeves", "mage_vest", "mage_hood"),
}
"""Sprites of feet, legs, hands, chest and head; without one of the head, hair."""
HAIR = {"man": "head_short", "woman": "head_long"}
WEAPONS = {
    "swing": (
        *("battle_axe", "club", "dagger", "greatsword", "hand_axe", "infantry_axe", "longsword", "mace", "maul"),
        *("shortsword", "smith_hammer", "war_hammer"),
    ),
    "shoot": ("greatbow", "longbow", "shortbow", "slingshot"),
    "cast": ("staff", "wand"),
}
"""Weapons by the action for which they are made."""
CREATURES = {
    "antlion": "an antlion",
    "fire_ant": "a fire ant",
    "goblin": "a goblin",
    "goblin_elite": "an elite goblin",
    "ice_ant": "an ice ant",
    "minotaur": "a minotaur",
    "skeleton": "a skeleton",
    "skeleton_archer": "a skeleton archer",
    "skeleton_mage": "a skeleton mage",
    "wyvern": "a wyvern",
    "wyvern_air": "an air wyvern",
    "wyvern_fire": "a fire wyvern",
    "wyvern_water": "a water wyvern",
    "zombie": "a zombie",
}
ACTIONS = {
    "stance": "stands",
    "run": "runs",
    "swing": "attacks",
    "shoot": "shoots",
    "cast": "casts a spell",
    "block": "blocks",
    "hit": "is hit",
    "die": "dies",
}
CREATURE_ACTIONS = ("stance", "run", "swing", "cast", "hit", "die")
FACINGS = ("west", "northwest", "north", "northeast", "east", "southeast", "south", "southwest")
"""As seen in the picture, in the order of the game's files."""
GROUNDS = {
    "grass": ("grassland", range(16, 32)),
    "snow": ("snowplains", range(16, 32)),
    "stone": ("dungeon", range(16, 20)),
    "red earth": ("cave", range(16, 32)),
}
"""Tileset of each ground, and its tiles."""
TEMPLATES = (
    "{who} {action} facing {facing} on {ground}",
    "on {ground}, {who} {action}, facing {facing}",
    "{who} that faces {facing} {action} on {ground}",
)


@dataclass(frozen=True)
class FlareClip:
    """Attributes of a clip.

    Attributes:
        who: Such as "a woman in chain mail" or "a goblin".
        action: One of `ACTIONS`.
        facing: One of `FACINGS`.
        ground: One of `GROUNDS`.
        weapon: Name of a weapon; "" for creatures.
        seed: Draws the tiles and the moment at which the clip begins.
        credit: Authors and licence of the sprites.
    """

    who: str
    action: str
    facing: str
    ground: str
    weapon: str
    seed: int
    credit: str = CREDIT


def people() -> dict[str, tuple[str, str]]:
    """Return sex and armour of each kind of person by its words."""
    return {f"a {sex} in {armour}": (sex, armour) for sex, armour in itertools.product(SEXES, ARMOURS)}


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """Return the combinations of who, action and facing of a split.

    Args:
        held_out: Whether to return those to validate or those to train on.
    """
    kinds = [*((who, tuple(ACTIONS)) for who in people()), *((who, CREATURE_ACTIONS) for who in CREATURES.values())]
    chosen = []
    for i, (who, actions) in enumerate(kinds):
        for j, (action, (k, facing)) in enumerate(itertools.product(actions, enumerate(FACINGS))):
            # A Latin pattern: one facing of each who and action is held out, another for each.
            if ((i + 3 * (j // len(FACINGS)) + k) % len(FACINGS) == 0) == held_out:
                chosen.append((who, action, facing))
    return chosen


def draw(held_out: bool, clips: int, seed: int) -> list[FlareClip]:
    """Return clips, cycling through the combinations of a split in random order.

    Args:
        held_out: Whether to use the held-out combinations or those to train on.
        clips: Number of clips.
        seed: Equal seeds give equal clips.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    pairs = combinations(held_out)
    order = itertools.islice(itertools.cycle(rng.permutation(len(pairs))), clips)
    drawn = []
    for index in order:
        who, action, facing = pairs[index]
        weapon = ""
        if who in people():
            weapons = WEAPONS.get(action) or [name for names in WEAPONS.values() for name in names]
            weapon = str(rng.choice(weapons))
        ground = str(rng.choice(list(GROUNDS)))
        drawn.append(FlareClip(who, action, facing, ground, weapon, int(rng.integers(2**31))))
    return drawn


def captions_of(clip: FlareClip) -> list[str]:
    """Return the caption of a clip, then its paraphrases."""
    words = {"who": clip.who, "action": ACTIONS[clip.action], "facing": clip.facing, "ground": clip.ground}
    if clip.weapon:
        words["action"] += f" with a {clip.weapon.replace('_', ' ')}"
    return [template.format(**words) for template in TEMPLATES]


def render(clip: FlareClip, game: Path, size: Literal[64, 128] = 64) -> UInt8[Tensor, "t 3 height width"]:
    """Draw a clip.

    Args:
        clip: The clip.
        game: The game's folder `mods`.
        size: Width and height in pixels; 128 shows all characters in the game's resolution, 64 each as large as fits.
    """
    rng = np.random.default_rng(clip.seed)
    facing = FACINGS.index(clip.facing)
    canvas = size if size == 128 else CANVAS_OF.get(_creature(clip.who), CANVAS)
    feet = round(FEET[0] * canvas), round(FEET[1] * canvas)
    layers = [load_animation(path) for path in _layers(clip, game, facing)]
    angle = (
        np.pi / 4 * (5 - facing)
    )  # the game counts clockwise from the southwest; here counterclockwise from the east
    velocity = np.array([np.cos(angle), -np.sin(angle) / 2]) * (SPEED if clip.action == "run" else 0)
    ground = _ground(clip.ground, game, canvas, rng)
    body = layers[len(layers) // 2]  # the first or the last may be the weapon
    moments = _moments(body, clip.action, int(rng.integers(4)))
    frames = []
    for t, (action, milliseconds) in enumerate(moments):
        left, top = (np.array(ground.size) - canvas) // 2 + np.rint((t - FRAMES / 2) * velocity).astype(int)
        picture = ground.crop((left, top, left + canvas, top + canvas))
        for layer in layers:
            layer.paste(picture, action, milliseconds, facing, feet)
        frames.append(picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).contiguous()


def _creature(who: str) -> str:
    """Return the game's name of a creature; "" for a person."""
    return next((name for name, words in CREATURES.items() if words == who), "")


def _layers(clip: FlareClip, game: Path, facing: int) -> list[Path]:
    """Return the animations of a clip's character, the farthest first."""
    folder = game / "fantasycore/animations"
    if clip.who not in people():
        return [folder / f"enemies/{_creature(clip.who)}.txt"]
    sex, armour = people()[clip.who]
    feet, legs, hands, chest, head = ARMOURS[armour]
    body = [feet, legs, hands, chest, head or HAIR[sex]]
    # The weapon is behind the body if the character faces away, as in the game's engine/hero_layers.txt.
    names = [clip.weapon, *body] if facing in (0, 1, 6, 7) else [*body, clip.weapon]
    return [folder / f"avatar/{SEXES[sex]}/{name}.txt" for name in names]


def _moments(animation: Animation, action: str, start: int) -> list[tuple[str, float]]:
    """Return what the character does in each frame, and for how long it has been doing so in milliseconds."""
    step = 1000 / FPS
    if animation.loops(action):
        return [(action, (t + start) * step) for t in range(FRAMES)]
    length = max(1, round(animation.duration(action) / step))
    if action == "die":
        return [(action, max(0, t - start) * step) if t >= start else ("stance", t * step) for t in range(FRAMES)]
    period = length + PAUSE
    moments = []
    for t in range(FRAMES):
        place = (t + period - start) % period
        moments.append((action, place * step) if place < length else ("stance", (place - length) * step))
    return moments


def _ground(name: str, game: Path, canvas: int, rng: np.random.Generator) -> Image.Image:
    """Return a ground larger than the picture, in random tiles."""
    tileset, numbers = GROUNDS[name]
    tiles = load_tiles(game, tileset, numbers)
    width, height = tiles[0].size
    margin = int(SPEED * FRAMES)
    ground = Image.new("RGBA", (canvas + margin, canvas + margin))
    for row in range(-1, 2 * ground.height // height + 1):
        for column in range(-1, ground.width // width + 1):
            tile = tiles[rng.integers(len(tiles))]
            ground.paste(tile, (column * width + row % 2 * width // 2, row * height // 2), tile)
    return ground


def make_flare(
    out: Path,
    game: Path | None = None,
    size: Literal[64, 128] = 64,
    train_clips: int = 24000,
    val_clips: int = 192,
    seed: int = 0,
    num_workers: int = 2,
) -> None:
    """Write captioned clips of the game Flare's characters: mp4 files, 16 frames at 15 frames per second.

    Args:
        out: Folder to create, with the folders `train` and `val` (held-out combinations) and `CREDITS.txt`.
        game: The game: a folder that contains `fantasycore` at any depth, or the file flare-game_*.deb. By default the
            Debian package is fetched by `apt-get download`.
        size: Width and height of the pictures.
        train_clips: Number of training clips.
        val_clips: Number of held-out clips.
        seed: Equal seeds give equal files.
        num_workers: Processes that draw and encode.
    """
    check_counts(train_clips=train_clips, val_clips=val_clips, num_workers=num_workers)
    mods: Path | None = None
    for split, count in (("train", train_clips), ("val", val_clips)):
        folder, held_out = out / split, split == "val"
        if is_complete(folder):
            continue
        mods = mods or find_game(game)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / "CREDITS.txt") as partial_path:
            partial_path.write_text(f"The clips are derived from {CREDIT}; they are under the same licence.\n")
        clips = draw(held_out, count, seed)
        captions = [captions_of(clip)[:1] if held_out else captions_of(clip) for clip in clips]
        write_split(folder, clips, captions, partial(render, game=mods, size=size), FPS, num_workers)
        print(f"{folder}: {count} clips.")


if __name__ == "__main__":
    run_tool(make_flare)
