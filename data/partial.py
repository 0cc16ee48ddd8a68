"""The folder of an incomplete output: one process writes it at a time, and only equal settings continue it."""

import json
from pathlib import Path
from typing import Any

from t2v.errors import UserError
from t2v.files import atomic_path, remove

Settings = dict[str, Any]
"""Everything that determines an output, by name; stored as json."""


def begin_or_continue(partial: Path, path: Path, settings: Settings) -> None:
    """Store the settings of a new output, or check that those of an interrupted one are equal.

    Half-written files (`*.partial*`, `*.current`) of the interrupted run are removed.

    Args:
        partial: The folder, locked by this process.
        path: The file of the settings.
        settings: Those of this run.

    Raises:
        UserError: If an earlier run wrote the folder with other settings.
    """
    stored = read_settings(path)
    if stored not in (None, settings):
        raise UserError(
            f"'{partial}' holds an interrupted run with other settings; what differs: "
            f"{differences(stored or {}, settings)}. Repeat its settings to continue it, or delete it."
        )
    for leftover in [*partial.rglob("*.partial*"), *partial.rglob("*.current")]:
        remove(leftover)
    if stored is None:
        write_settings(path, settings)
    else:
        print(f"Continuing '{partial}'.", flush=True)


def differences(stored: Settings, settings: Settings) -> str:
    """Return in words which settings differ."""
    names = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    return ", ".join(
        "the videos or their captions" if name == "source" else f"{name} ({stored.get(name)}, now {settings.get(name)})"
        for name in names
    )


def read_settings(path: Path) -> Settings | None:
    """Return stored settings, or None if there are none."""
    try:
        settings: Settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return settings


def write_settings(path: Path, settings: Settings) -> None:
    """Store settings."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
