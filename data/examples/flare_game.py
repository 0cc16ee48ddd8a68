"""Finds the game Flare, and reads its animations and tiles."""

import shutil
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from data.examples import run_command
from data.index import cache_folder
from t2v.errors import UserError
from t2v.files import atomic_path

_NEEDED = ("fantasycore/animations/avatar", "fantasycore/tilesetdefs")


@dataclass(frozen=True)
class Sprite:
    """A picture in a sheet, and the offset of the character's feet in it."""

    box: tuple[int, int, int, int]
    offset: tuple[int, int]


@dataclass(frozen=True)
class Section:
    """One action of an animation; sprites by number and facing."""

    frames: int
    milliseconds: float
    kind: str
    sprites: dict[tuple[int, int], Sprite]


@dataclass(frozen=True)
class Animation:
    """The sprites of a character or of a part of one.

    Attributes:
        sheet: File of the sheet.
        sections: The actions by name.
    """

    sheet: Path
    sections: dict[str, Section]

    def loops(self, action: str) -> bool:
        """Return whether an action goes on forever."""
        return self.sections[action].kind != "play_once"

    def duration(self, action: str) -> float:
        """Return the time of one performance in milliseconds."""
        return self.sections[action].milliseconds

    def paste(self, picture: Image.Image, action: str, milliseconds: float, facing: int, feet: tuple[int, int]) -> None:
        """Draw the character at a moment of an action; nothing if the part has no sprite there."""
        section = self.sections.get(action)
        if section is None:
            return
        n = section.frames
        number = int(milliseconds * n / section.milliseconds)
        if section.kind == "looped":
            number %= n
        elif section.kind == "back_forth":
            number = min(number % (2 * n), 2 * n - 1 - number % (2 * n))
        sprite = section.sprites.get((min(number, n - 1), facing))
        if sprite is None:
            return
        part = _sheet(self.sheet).crop(sprite.box)
        picture.alpha_composite(part, _inside(feet, sprite, part), _source(feet, sprite))


def _inside(feet: tuple[int, int], sprite: Sprite, part: Image.Image) -> tuple[int, int]:
    return max(0, feet[0] - sprite.offset[0]), max(0, feet[1] - sprite.offset[1])


def _source(feet: tuple[int, int], sprite: Sprite) -> tuple[int, int]:
    """Return the corner of the sprite that is inside the picture."""
    return max(0, sprite.offset[0] - feet[0]), max(0, sprite.offset[1] - feet[1])


@cache
def load_animation(path: Path) -> Animation:
    """Read an animation.

    Raises:
        UserError: If the file is missing or has another format.
    """
    mod = next(parent for parent in path.parents if parent.name == "fantasycore")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sheet, sections, name = None, {}, ""
        values: dict[str, str] = {}
        sprites: dict[tuple[int, int], Sprite] = {}
        for line in [*lines, "["]:
            key, _, value = line.strip().partition("=")
            if line.startswith("["):
                if name:
                    time = values["duration"]
                    milliseconds = float(time.removesuffix("ms")) if time.endswith("ms") else 1000 * float(time[:-1])
                    sections[name] = Section(int(values["frames"]), milliseconds, values["type"], sprites)
                name, values, sprites = line.strip("[] \n"), {}, {}
            elif key == "image":
                sheet = mod / value.split(",")[0]
            elif key == "frame":
                number, facing, x, y, width, height, left, top = map(int, value.split(",")[:8])
                sprites[number, facing] = Sprite((x, y, x + width, y + height), (left, top))
            else:
                values[key] = value
    except (OSError, KeyError, ValueError) as error:
        raise _other_version(path, error) from error
    if sheet is None:
        raise _other_version(path, "it names no image")
    return Animation(sheet, sections)


@cache
def load_tiles(game: Path, tileset: str, numbers: range) -> list[Image.Image]:
    """Return flat tiles of a tileset by their numbers."""
    path = game / f"fantasycore/tilesetdefs/tileset_{tileset}.txt"
    try:
        lines = [line[5:].split(",") for line in path.read_text(encoding="utf-8").splitlines() if line[:5] == "tile="]
        boxes = {int(line[0]): tuple(map(int, line[1:5])) for line in lines}
        sheet = _sheet(game / f"fantasycore/images/tilesets/tileset_{tileset}.png")
        corners = [boxes[number] for number in numbers]
    except (OSError, KeyError, ValueError) as error:
        raise _other_version(path, error) from error
    return [sheet.crop((x, y, x + width, y + height)) for x, y, width, height in corners]


def find_game(path: Path | None) -> Path:
    """Return the game's folder `mods`, after fetching the game if no path is given.

    Args:
        path: A folder that contains the game at any depth, or the file of its Debian package.

    Raises:
        UserError: If the game is not there, or cannot be fetched.
    """
    if path is None or path.is_file():
        folder = cache_folder() / "flare-game"
        if path is not None or not folder.exists():
            _unpack(path, folder)
        path = folder
    for candidate in [path, *sorted(path.rglob("mods"))]:
        if all((candidate / needed).is_dir() for needed in _NEEDED):
            return candidate.absolute()
    raise UserError(
        f"'{path}' does not contain the game Flare ({' and '.join(_NEEDED)}): give --game the folder or the .deb file "
        "of Debian's flare-game."
    )


def _unpack(package: Path | None, folder: Path) -> None:
    """Unpack the Debian package into a folder, after fetching it if it is not given."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if package is not None and folder.exists():
        shutil.rmtree(folder)
    with atomic_path(folder, keep_existing=True) as temporary:
        temporary.mkdir()
        if package is None:
            print("Fetching flare-game (123 MB) by apt-get download", flush=True)
            _run(
                ["apt-get", "download", "flare-game"], temporary, "there is no package flare-game without Debian's apt"
            )
            package = next(temporary.glob("*.deb"))
        _run(["dpkg-deb", "-x", str(package.absolute()), "."], temporary, f"'{package}' is not a Debian package")
        for fetched in temporary.glob("*.deb"):
            fetched.unlink()


def _run(command: list[str], folder: Path, cause: str) -> None:
    try:
        run_command(command, folder)
    except ChildProcessError as error:
        raise UserError(
            f"`{' '.join(command)}` failed ({error}), probably since {cause}: give --game the folder of the game "
            "Flare or the .deb file of Debian's flare-game."
        ) from error


@lru_cache(maxsize=96)
def _sheet(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGBA")
    except OSError as error:
        raise _other_version(path, error) from error


def _other_version(path: Path, reason: object) -> UserError:
    return UserError(f"{path} cannot be used ({reason}): give --game version 1.14 of flare-game.")
