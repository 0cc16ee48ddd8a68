"""Finds the videos and captions of a source, in any of its layouts.

- A folder of videos, with a table of captions or with a .txt file next to each video; see `tables`.
- Shards of `video2dataset` or of this command: tar files with a video and a txt or json for each sample.

A video that occurs in several rows has several captions; all are kept.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.captions import read_captions, read_metadata
from data.prepare.captions import clean_caption
from data.prepare.dropped import Dropped, summarize
from data.prepare.filters import Filters
from data.prepare.tables import TABLE_SUFFIXES, CaptionTable, read_table
from data.shards import ShardSet
from t2v.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.parquet", "captions.json", "metadata.csv")
"""Names of caption tables, in order of preference; other names are used only if there is a single table."""


class Video(NamedTuple):
    """A video of the source with its captions."""

    name: str
    """Its path as in the captions, or the names of the tar and the sample."""
    captions: list[str]
    """At least one; the first is the sample's txt."""
    extra: dict[str, Any]
    """The other columns of its row, which are added to the sample's json."""
    path: Path
    """The file, or the tar that contains it."""
    size: int
    """Bytes of the video."""
    offset: int | None = None
    """First byte in the tar; None for a file."""


class Row(NamedTuple):
    """A video as listed in the source, before any check."""

    name: str
    captions: list[str]
    extra: dict[str, Any]
    path: Path | None
    """The file, or the tar that contains it; None if it is missing."""
    size: int = 0
    offset: int | None = None


def find_videos(source: Path, table: CaptionTable, filters: Filters) -> tuple[list[Video], list[Dropped]]:
    """Return the captioned videos of a source, and the dropped ones.

    Args:
        source: Folder of videos or of shards, or one shard.
        table: The table of captions, for a folder of videos.
        filters: Limits for the captions.

    Raises:
        UserError: If there are no videos or no captions.
    """
    dropped: list[Dropped] = []
    rows, no_captions = _find_rows(source, table, dropped)
    videos = _check(rows, filters, dropped)
    if not videos and all(drop.reason in ("no caption", "missing file") for drop in dropped):
        raise UserError(f"No video in '{source}' has a caption: {no_captions}.")
    if not videos:
        raise UserError(f"No video in '{source}' is kept: {summarize(dropped)}.")
    return videos, dropped


def digest(videos: list[Video]) -> str:
    """Return a hash that changes if a video is added or has another size, captions or metadata.

    Args:
        videos: All videos, in order.
    """
    hash_ = hashlib.sha256()
    for video in videos:
        hash_.update(json.dumps([video.name, video.size, video.captions, video.extra]).encode() + b"\n")
    return hash_.hexdigest()[:16]


def _find_rows(source: Path, table: CaptionTable, dropped: list[Dropped]) -> tuple[Iterable[Row], str]:
    """Return the rows of a source, and the likely cause if none of them has a caption."""
    if not source.is_dir() and not (source.suffix == ".tar" and source.is_file()):
        raise UserError(f"There is no folder '{source}': give the folder that contains the videos.")
    files = _list_files(source) if source.is_dir() else [source]
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    shards = [path for path in files if path.suffix == ".tar" and source in (path, path.parent)]
    if videos and shards:
        raise UserError(
            f"'{source}' contains both {len(videos)} videos and {len(shards)} shards (*.tar): move those to prepare "
            "into a folder of their own."
        )
    if shards:
        return _rows_of_shards(source, dropped), "none of its samples has a txt, or a json with a caption"
    if not videos:
        raise UserError(f"No videos in '{source}': none of its files ends in {', '.join((*VIDEO_SUFFIXES, '.tar'))}.")
    columns = f"give --captions a file with the columns {table.path_column} and {table.caption_column}"
    path = table.path or _find_captions(source, files)
    if path is None:
        cause = f"there is no {', '.join(CAPTION_FILES)}, and no .txt next to its {len(videos)} videos"
        return _rows_of_text_files(source, videos, dropped), f"{cause}; {columns}"
    cause = f"'{path}' names none of its {len(videos)} videos with a caption"
    return _rows_of_table(source, videos, table._replace(path=path)), f"{cause}; {columns}"


def _list_files(folder: Path) -> list[Path]:
    return sorted(Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)


def _find_captions(source: Path, files: list[Path]) -> Path | None:
    """Return the table of captions in a folder, or None if there is none or the videos have .txt files.

    Raises:
        UserError: If several tables could be meant.
    """
    for name in CAPTION_FILES:
        if (source / name).is_file():
            return source / name
    videos = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    if any(path.suffix == ".txt" and path.with_suffix("") in videos for path in files):
        return None
    tables = [
        path
        for path in files
        if path.parent == source and path.suffix in TABLE_SUFFIXES and path.with_suffix("") not in videos
    ]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"'{source}' contains several tables ({names}): select one with --captions.")
    return tables[0] if tables else None


def _rows_of_table(source: Path, videos: list[Path], table: CaptionTable) -> list[Row]:
    """Return the rows of a table, and one without a caption for each video that it does not name."""
    known = set(videos)
    by_id = {path.stem: path for path in reversed(videos)}  # the first of several with one id
    rows = []
    for name, captions, extra, is_id in read_table(table):
        path = by_id.get(name) if is_id else source / name
        if is_id and path is not None:
            name = str(path.relative_to(source))
        exists = path is not None and (path in known or path.is_file())
        rows.append(Row(name, captions, extra, path if exists else None))
    named = {row.path for row in rows if row.path is not None}
    other_spellings = {path.resolve() for path in named - known}  # paths spelt differently, or outside the folder
    for path in videos:
        is_named = path in named or (other_spellings and path.resolve() in other_spellings)
        if not is_named:
            rows.append(Row(str(path.relative_to(source)), [], {}, path))
    return rows


def _rows_of_text_files(source: Path, videos: list[Path], dropped: list[Dropped]) -> Iterator[Row]:
    for path in videos:
        name = str(path.relative_to(source))
        try:
            yield Row(name, [path.with_suffix(".txt").read_text(encoding="utf-8-sig")], {}, path)
        except UnicodeDecodeError:
            dropped.append(Dropped(name, None, "caption is not UTF-8"))
        except FileNotFoundError:
            yield Row(name, [], {}, path)


def _rows_of_shards(source: Path, dropped: list[Dropped]) -> Iterator[Row]:
    shards = ShardSet(source)
    dropped += (Dropped(f"{Path(bad.shard).name}/{bad.key}", None, bad.reason) for bad in shards.skipped)
    for sample in shards.samples:
        name = f"{Path(sample.shard).name}/{sample.key}"
        try:
            # One at a time, as the video may be between the two.
            members = shards.read(sample, "txt") | shards.read(sample, "json")
            captions, metadata = read_captions(members), read_metadata(members)
        except UnicodeDecodeError:
            dropped.append(Dropped(name, None, "caption is not UTF-8"))
            continue
        except ValueError:
            dropped.append(Dropped(name, None, "its json is invalid"))
            continue
        extra = {key: value for key, value in metadata.items() if key not in ("caption", "captions")}
        video = next((member for member in sample.members if f".{member}" in VIDEO_SUFFIXES), None)
        if video is None:
            yield Row(name, captions, extra, None)
        else:
            offset, size = sample.members[video]
            yield Row(name, captions, extra, Path(sample.shard), size, offset)


def _check(rows: Iterable[Row], filters: Filters, dropped: list[Dropped]) -> list[Video]:
    """Return the videos that exist and have a caption, each once; append the others to `dropped`."""
    merged: dict[str, Row] = {}
    for row in rows:
        if row.name in merged:
            merged[row.name].captions.extend(row.captions)
        else:
            merged[row.name] = row
    videos = []
    for row in merged.values():
        cleaned = [clean_caption(text, filters) for text in row.captions]
        captions = list(dict.fromkeys(text for text, reason in cleaned if reason is None))
        reasons = [reason for _, reason in cleaned if reason is not None]
        if row.path is None:
            dropped.append(Dropped(row.name, None, "missing file"))
        elif not captions:
            dropped.append(Dropped(row.name, None, reasons[0] if reasons else "no caption"))
        else:
            size = row.path.stat().st_size if row.offset is None else row.size
            videos.append(Video(row.name, captions, row.extra, row.path.absolute(), size, row.offset))
    return videos
