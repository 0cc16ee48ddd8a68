"""Where footage and captions come from: the videos of a source, whichever way it is laid out.

- A folder of videos, with a table of captions (CSV, JSON lines, JSON or Parquet) or a .txt beside each video.
- WebVid's CSV is known by its columns videoid, page_dir and name; its videos are found by their id, in any folder.
- MSR-VTT's JSON is known by its lists `videos` and `sentences`; its videos are found by their id likewise.
- Shards that `video2dataset` made, or this command: tar files with a video and a txt or json for each sample.

A video that comes up in several rows has several captions; all are kept.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare.dropped import Dropped, summary
from data.prepare.filters import Filters, clean_caption
from data.shards import ShardSet
from t2v.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet", ".json")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.parquet", "captions.json", "metadata.csv")


class Video(NamedTuple):
    """One video of the source."""

    name: str
    """Its path as the captions give it, or the tar and the key."""
    captions: list[str]
    """At least one; the first is the caption."""
    extra: dict[str, Any]
    """The other columns of its row; they go into the sample's json."""
    path: Path
    """The file, or the tar that holds it."""
    size: int
    """Bytes of the video."""
    offset: int | None = None
    """Where it begins in the tar; None for a file."""


class Row(NamedTuple):
    """What the source says about a video, before anything is checked."""

    name: str
    captions: list[str]
    extra: dict[str, Any]
    path: Path | None
    """The file, or the tar that holds it; None where there is none."""
    size: int = 0
    offset: int | None = None


def find_videos(
    source: Path, captions: Path | None, path_column: str, caption_column: str, filters: Filters
) -> tuple[list[Video], list[Dropped]]:
    """The captioned videos of a source, and the others with the reason why they are left out.

    Args:
        source: folder of videos or of shards, or one shard.
        captions: the table of captions, or None to look for one.
        path_column: column with the video's path.
        caption_column: column with the caption.
        filters: limits for the captions.

    Raises:
        UserError: where there are no videos or no captions.
    """
    dropped: list[Dropped] = []
    rows: Iterable[Row]
    if source.suffix == ".tar" and source.is_file():
        rows, told = _rows_of_shards(source, dropped), "none of its samples has a txt, or a json with a caption"
    elif not source.is_dir():
        raise UserError(f"There is no folder '{source}': give the folder that holds the videos.")
    else:
        files = _files(source)
        videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
        shards = [path for path in files if path.suffix == ".tar" and path.parent == source]
        if videos and shards:
            raise UserError(
                f"'{source}' holds both {len(videos)} videos and {len(shards)} shards (*.tar): "
                "put the ones to prepare into a folder of their own."
            )
        if shards:
            rows, told = _rows_of_shards(source, dropped), "none of its samples has a txt, or a json with a caption"
        elif videos:
            captions = captions or _find_captions(source, files)
            rows = _rows(source, videos, captions, path_column, caption_column, dropped)
            told = (
                f"'{captions}' names none of its {len(videos)} videos with a caption"
                if captions
                else f"there is no {', '.join(CAPTION_FILES)}, and no .txt beside its {len(videos)} videos"
            )
            told += f"; give --captions a file with the columns {path_column} and {caption_column}"
        else:
            raise UserError(
                f"No videos in '{source}': none of its files ends in {', '.join((*VIDEO_SUFFIXES, '.tar'))}."
            )
    kept = _check(rows, filters, dropped)
    if not kept and all(drop.reason in ("no caption", "missing file") for drop in dropped):
        raise UserError(f"No video in '{source}' has a caption: {told}.")
    if not kept:
        raise UserError(f"No video in '{source}' is kept: {summary(dropped)}.")
    return kept, dropped


def digest(videos: list[Video]) -> str:
    """Changes when a video is added, replaced by one of another size, or told about in other words."""
    told = hashlib.sha256()
    for video in videos:
        told.update(json.dumps([video.name, video.size, video.captions, video.extra]).encode() + b"\n")
    return told.hexdigest()[:16]


def _check(rows: Iterable[Row], filters: Filters, dropped: list[Dropped]) -> list[Video]:
    """The videos that are there and have a caption, each once; adds the others to `dropped`."""
    merged: dict[str, Row] = {}
    for row in rows:
        before = merged.setdefault(row.name, row)
        if before is not row:
            before.captions.extend(row.captions)
    videos = []
    for row in merged.values():
        cleaned = [clean_caption(text, filters) for text in row.captions]
        texts = list(dict.fromkeys(text for text, reason in cleaned if reason is None))
        if row.path is None:
            dropped.append(Dropped(row.name, None, "missing file"))
        elif not texts:
            reasons = [reason for _, reason in cleaned if reason is not None]
            dropped.append(Dropped(row.name, None, reasons[0] if reasons else "no caption"))
        else:
            size = row.size if row.offset is not None else row.path.stat().st_size
            videos.append(Video(row.name, texts, row.extra, row.path.absolute(), size, row.offset))
    return videos


def _files(folder: Path) -> list[Path]:
    found = (Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(found)


def _find_captions(source: Path, files: list[Path]) -> Path | None:
    """The table of captions in a folder, or None where each video has a .txt, or nothing has a caption.

    Raises:
        UserError: where several tables may be meant.
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
        raise UserError(f"'{source}' holds several tables ({names}): say with --captions which one has the captions.")
    return tables[0] if tables else None


def _rows(
    source: Path,
    videos: list[Path],
    captions: Path | None,
    path_column: str,
    caption_column: str,
    dropped: list[Dropped],
) -> list[Row]:
    """The rows of a folder of videos, and at the end one without a caption for each video that no row names."""
    if captions is None:
        return _rows_beside(source, videos, dropped)
    known, by_id = set(videos), {path.stem: path for path in reversed(videos)}
    rows = []
    for name, texts, extra, is_id in _read_table(captions, path_column, caption_column):
        path = by_id.get(name) if is_id else source / name
        if is_id and path:
            name = str(path.relative_to(source))
        rows.append(Row(name, texts, extra, path if path in known or (path and path.is_file()) else None))
    named = {row.path for row in rows if row.path}
    elsewhere = {path.resolve() for path in named - known}  # written in another way, or outside the folder
    unnamed = [path for path in videos if path not in named and not (elsewhere and path.resolve() in elsewhere)]
    return rows + [Row(str(path.relative_to(source)), [], {}, path) for path in unnamed]


def _rows_beside(source: Path, videos: list[Path], dropped: list[Dropped]) -> list[Row]:
    rows = []
    for path in videos:
        name, text = str(path.relative_to(source)), path.with_suffix(".txt")
        try:
            rows.append(Row(name, [text.read_text(encoding="utf-8-sig")], {}, path))
        except UnicodeDecodeError:
            dropped.append(Dropped(name, None, "caption is not UTF-8"))
        except FileNotFoundError:
            rows.append(Row(name, [], {}, path))
    return rows


def _read_table(
    path: Path, path_column: str, caption_column: str
) -> Iterator[tuple[str, list[str], dict[str, Any], bool]]:
    """Name, captions and other columns of every row, and whether the name is the video's id rather than its path.

    Raises:
        UserError: where there is no such table, or it lacks a column.
    """
    rows = _load(path)
    if isinstance(rows, dict):
        yield from _msr_vtt(path, rows)
        return
    is_table = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    columns = list(rows[0]) if is_table else []
    by_id = path_column not in columns and {"videoid", "page_dir", "name"} <= set(columns)
    if by_id:  # WebVid
        path_column, caption_column = "videoid", "name"
    missing = [name for name in (path_column, caption_column) if name not in columns]
    if missing:
        raise UserError(
            f"'{path}' has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(map(str, columns)) or 'none'}: name the right ones with --path_column and --caption_column."
        )
    for row in rows:
        extra = {str(name): value for name, value in row.items() if name not in (path_column, caption_column)}
        yield _text(row.get(path_column)).strip(), _texts(row.get(caption_column)), _plain(extra), by_id


def _load(path: Path) -> Any:
    """The rows of a table as dictionaries, or what else a JSON file holds."""
    if not path.is_file():
        raise UserError(f"There is no caption file '{path}': correct --captions.")
    if path.suffix not in TABLE_SUFFIXES:
        raise UserError(f"'{path}' is no table of captions that can be read: give one of {', '.join(TABLE_SUFFIXES)}.")
    try:
        if path.suffix == ".parquet":
            return _load_parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".json":
                return json.load(file)
            lines = (line for line in file if line.strip())
            return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(file))
    except (ValueError, csv.Error, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{path}' is not a readable {path.suffix[1:]} file ({error}).") from error


def _load_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files are read with pyarrow: run pip install 't2v[prepare]'.") from error
    return parquet.read_table(path).to_pylist()  # its errors are ValueError and OSError


def _msr_vtt(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any], bool]]:
    try:
        captions: dict[str, list[str]] = {}
        for sentence in content["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
        for video in content["videos"]:
            name = video["video_id"]
            yield name, captions.get(name, []), {key: value for key, value in video.items() if key != "video_id"}, True
    except (KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is neither a list of rows nor MSR-VTT's lists `videos` and `sentences`, joined by video_id "
            f"({type(error).__name__} {error}): give a CSV, JSON-lines or Parquet file."
        ) from error


def _rows_of_shards(source: Path, dropped: list[Dropped]) -> Iterator[Row]:
    shards = ShardSet(source)
    dropped += (Dropped(f"{Path(bad.shard).name}/{bad.key}", None, bad.reason) for bad in shards.bad)
    for sample in shards.samples:
        name = f"{Path(sample.shard).name}/{sample.key}"
        video = next((extension for extension in sample.members if f".{extension}" in VIDEO_SUFFIXES), None)
        try:
            # One by one, for the video may lie between the two.
            text = shards.read(sample, "txt").get("txt", b"").decode("utf-8-sig")
            told = json.loads(shards.read(sample, "json").get("json", b"{}"))
        except UnicodeDecodeError:
            dropped.append(Dropped(name, None, "caption is not UTF-8"))
            continue
        except ValueError:
            dropped.append(Dropped(name, None, "its json does not read"))
            continue
        if not isinstance(told, dict):
            told = {}
        captions = _texts(told.pop("captions", None)) or _texts(text.strip() or told.get("caption"))
        told.pop("caption", None)
        offset, size = sample.members[video] if video else (0, 0)
        yield Row(name, captions, told, Path(sample.shard) if video else None, size, offset)


def _texts(value: Any) -> list[str]:
    """The captions of a cell, which holds one or a list of them."""
    return [_text(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _plain(extra: dict[str, Any]) -> dict[str, Any]:
    """Other columns as json can hold them: a date of a Parquet file becomes its text."""
    return json.loads(json.dumps(extra, default=str))
