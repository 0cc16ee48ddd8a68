"""The output folder: checks an earlier one, locks the one being written, and publishes the complete shards.

A run writes to `OUT.partial`, together with its settings (`prepare.json`), so that only a run with equal settings
continues it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.partial import Settings, begin_or_continue, differences, read_settings, write_settings
from data.prepare.dropped import Dropped
from data.prepare.packing import Clip
from data.prepare.report import KeptRow, write_report
from t2v.errors import UserError
from t2v.files import locked


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
    stored = read_settings(out / "prepare.json")
    if stored is None:
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"'{out}' exists already and holds no shards of this command: choose another folder.")
        return False
    if stored != settings:
        raise UserError(
            f"'{out}' holds shards made with other settings; what differs: {differences(stored, settings)}. Delete "
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
    with locked(partial):
        begin_or_continue(partial, partial / "prepare.json", settings)
        for name in ("clips", "shards"):
            (partial / name).mkdir(exist_ok=True)
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
    write_settings(shards / "prepare.json", settings)
    if out.exists():
        out.rmdir()
    shards.rename(out)
