"""The output folder: checks an earlier one, locks the one being written, and publishes the complete shards.

A run writes to `OUT.partial`, together with its settings, so that only a run with equal settings continues it.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.prepare.dropped import Dropped
from data.prepare.packing import Clip
from data.prepare.report import KeptRow, write_report
from t2v.errors import UserError
from t2v.files import atomic_path, remove

Settings = dict[str, Any]
"""Everything that determines the shards, by name; stored as `prepare.json`."""


def is_complete(out: Path, settings: Settings) -> bool:
    """Return whether a folder holds the complete shards of these settings.

    Args:
        out: The output folder.
        settings: The settings of this run.

    Raises:
        UserError: If the folder holds anything else.
    """
    if not out.exists():
        return False
    stored = _read_settings(out / "prepare.json")
    if stored is None:
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"'{out}' exists already and holds no shards of this command: choose another folder.")
        return False
    if stored != settings:
        raise UserError(
            f"'{out}' holds shards made with other settings; what differs: {_differences(stored, settings)}. Delete "
            "it, or choose another folder."
        )
    return True


@contextmanager
def open_partial(partial: Path, settings: Settings) -> Iterator[None]:
    """Create the folder of an incomplete run, or continue in it, and lock it against other runs.

    Args:
        partial: The folder.
        settings: The settings of this run.

    Raises:
        UserError: If another run is writing the folder, or an earlier run wrote it with other settings.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, even if it is killed
        except BlockingIOError:
            raise UserError(
                f"Another run is writing '{partial}': wait for its end, or choose another folder."
            ) from None
        path = partial / "prepare.json"
        stored = _read_settings(path)
        if stored not in (None, settings):
            raise UserError(
                f"'{partial}' holds an interrupted run with other settings; what differs: "
                f"{_differences(stored or {}, settings)}. Repeat its settings to continue it, or delete it."
            )
        for leftover in [*partial.rglob("*.partial*"), *partial.rglob("*.current")]:
            remove(leftover)
        for name in ("clips", "shards"):
            (partial / name).mkdir(exist_ok=True)
        if stored is None:
            _write_settings(path, settings)
        else:
            print(f"Continuing '{partial}'.")
        yield


def publish(shards: Path, out: Path, clips: list[Clip], dropped: list[Dropped], settings: Settings) -> None:
    """Add the report and the settings to the shards, and rename their folder to the output folder.

    Args:
        shards: Folder of the complete shards.
        out: The output folder.
        clips: The kept clips, in order.
        dropped: Dropped videos and clips.
        settings: The settings of this run.
    """
    kept = [
        KeptRow(
            key=clip.key,
            source=clip.metadata["source"],
            caption=clip.captions[0] if clip.captions else "",
            seconds=clip.metadata["frames"] / clip.metadata["fps"],
            video_seconds=clip.video_seconds,
            video_width=clip.video_width,
            video_height=clip.video_height,
        )
        for clip in clips
    ]
    write_report(shards, kept, dropped, settings)
    _write_settings(shards / "prepare.json", settings)
    if out.exists():
        out.rmdir()
    shards.rename(out)


def _differences(stored: Settings, settings: Settings) -> str:
    names = [name for name, value in settings.items() if name not in stored or stored[name] != value]
    return ", ".join(
        "the videos or their captions" if name == "source" else f"{name} ({stored.get(name)}, now {settings[name]})"
        for name in names
    )


def _read_settings(path: Path) -> Settings | None:
    try:
        settings: Settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return settings


def _write_settings(path: Path, settings: Settings) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
