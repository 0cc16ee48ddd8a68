"""Tables of captions: CSV, JSON lines, JSON or Parquet with one row per video, WebVid's CSV, and MSR-VTT's JSON.

- WebVid's CSV is recognized by its columns `videoid`, `page_dir` and `name`.
- MSR-VTT's JSON is recognized by its lists `videos` and `sentences`.
- Both name a video by its id, the stem of its file name, rather than by its path.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.captions import as_list
from t2v.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet", ".json")


class CaptionTable(NamedTuple):
    """A table of captions and its columns."""

    path: Path | None = None
    """The file; None to look for one in the source folder."""
    path_column: str = "path"
    caption_column: str = "caption"


class TableRow(NamedTuple):
    """A row of a table."""

    name: str
    """The video's path, or its id."""
    captions: list[str]
    extra: dict[str, Any]
    """The other columns, as JSON can store them."""
    is_id: bool
    """Whether `name` is the video's id rather than its path."""


def read_table(table: CaptionTable) -> Iterator[TableRow]:
    """Yield the rows of a table.

    Args:
        table: The table; its path must be given.

    Raises:
        UserError: If the file is missing or cannot be read, or lacks a column.
    """
    path = table.path
    assert path is not None
    content = _load(path)
    if isinstance(content, dict):
        yield from _read_msr_vtt(path, content)
        return
    is_table = isinstance(content, list) and content and all(isinstance(row, dict) for row in content)
    columns = list(content[0]) if is_table else []
    path_column, caption_column = table.path_column, table.caption_column
    is_webvid = path_column not in columns and {"videoid", "page_dir", "name"} <= set(columns)
    if is_webvid:
        path_column, caption_column = "videoid", "name"
    missing = [name for name in (path_column, caption_column) if name not in columns]
    if missing:
        raise UserError(
            f"'{path}' has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(map(str, columns)) or 'none'}: name the right ones with --path_column and --caption_column."
        )
    for row in content:
        name = _to_text(row.get(path_column)).strip()
        captions = [_to_text(caption) for caption in as_list(row.get(caption_column))]
        extra = {str(column): value for column, value in row.items() if column not in (path_column, caption_column)}
        yield TableRow(name, captions, _to_json(extra), is_webvid)


def _load(path: Path) -> Any:
    """Return the rows of a table as dictionaries, or any other content of a JSON file."""
    if not path.is_file():
        raise UserError(f"There is no caption file '{path}': correct --captions.")
    if path.suffix not in TABLE_SUFFIXES:
        raise UserError(f"'{path}' is not a table of captions: use a file that ends in {', '.join(TABLE_SUFFIXES)}.")
    read = _read_parquet if path.suffix == ".parquet" else _read_text
    try:
        return read(path)
    except UserError:
        raise
    except (ValueError, csv.Error, OSError) as error:
        raise UserError(f"'{path}' is not a readable {path.suffix[1:]} file ({error}).") from error


def _read_text(path: Path) -> Any:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".json":
            return json.load(file)
        lines = (line for line in file if line.strip())
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in lines]
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet files are read with pyarrow: run pip install -e ".[prepare]".') from error
    return parquet.read_table(path).to_pylist()  # raises ValueError or OSError


def _read_msr_vtt(path: Path, content: dict[str, Any]) -> Iterator[TableRow]:
    try:
        captions: defaultdict[str, list[str]] = defaultdict(list)
        for sentence in content["sentences"]:
            captions[sentence["video_id"]].append(sentence["caption"])
        for video in content["videos"]:
            name = video["video_id"]
            extra = {key: value for key, value in video.items() if key != "video_id"}
            yield TableRow(name, captions.get(name, []), extra, is_id=True)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is neither a list of rows nor MSR-VTT's lists `videos` and `sentences`, joined by video_id "
            f"({type(error).__name__} {error}): give a CSV, JSON-lines or Parquet file."
        ) from error


def _to_text(value: Any) -> str:
    return "" if value is None else str(value)


def _to_json(extra: dict[str, Any]) -> dict[str, Any]:
    """Replace values that JSON cannot store by their text, such as dates of a Parquet file."""
    result: dict[str, Any] = json.loads(json.dumps(extra, default=str))
    return result
