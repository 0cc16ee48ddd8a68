"""Tables of captions: one row per video, in the forms that the field uses.

- CSV, TSV, JSON lines, JSON or Parquet with a column for the video's path and one for its caption, under the names of
  `COLUMNS` or any other; a JSON object of path and caption; `videos.txt` and `prompts.txt`, line by line.
- WebVid's CSV (`videoid`, `page_dir`, `name`), MSR-VTT's JSON (lists `videos` and `sentences`) and Panda-70M's CSV
  (`videoID`, `timestamp`, `caption`) name a video by its id, the stem of its file name, rather than by its path.

A row that is not of the table's form is left out and named with its line. No value is turned into text.
"""

import ast
import csv
import io
import warnings
from collections import defaultdict
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from data.captions import parse_json, texts
from data.members import is_video
from data.prepare.dropped import Dropped
from t2v.errors import UserError

COLUMNS = (("path", "caption"), ("file_name", "text"), ("file_name", "caption"), ("video", "caption"))
"""Columns of path and caption that are recognized: this command's, Hugging Face's, and OpenVid-1M's."""
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
LINE_FILES = (("prompts.txt", "videos.txt"), ("prompt.txt", "videos.txt"))
"""Files with the captions and with the paths of the videos, a line each."""


class CaptionTable(NamedTuple):
    """A table of captions and its columns."""

    path: Path | str | None = None
    """The file or its address; None to look for one in the source folder."""
    path_column: str | None = None
    """None for one of `COLUMNS`, or a known data set's."""
    caption_column: str | None = None


class Segment(NamedTuple):
    """Part of a video with a caption of its own."""

    start: float
    """Start in the video in seconds."""
    end: float
    caption: str


class TableRow(NamedTuple):
    """A row of a table."""

    name: str
    """The video's path, or its id."""
    captions: list[str]
    extra: dict[str, Any]
    """The other columns, as JSON can store them."""
    is_id: bool
    """Whether `name` is the video's id rather than its path."""
    segments: tuple[Segment, ...] = ()
    """Parts of the video that have captions of their own; the rest of it has none."""


class _Layout(NamedTuple):
    path: str
    caption: str
    is_id: bool = False
    times: str | None = None
    """Column with the start and end of the parts that have captions of their own."""


class _Record(NamedTuple):
    place: str
    """Line or row number, for messages."""
    row: dict[str, Any]


def read_table(table: CaptionTable, dropped: list[Dropped]) -> list[TableRow]:
    """Return the rows of a table; append those that are not of its form to `dropped`.

    Args:
        table: The table; its path must be given, and on this machine.
        dropped: Dropped videos and rows.

    Raises:
        UserError: If the file is missing or cannot be read, or lacks a column.
    """
    path = table.path
    assert isinstance(path, Path)
    bad: list[tuple[str, str]] = []
    header: list[str] = []
    content = _load(path, bad, header)
    if isinstance(content, dict):
        if table.path_column or table.caption_column:
            raise UserError(
                f"--path_column and --caption_column have no effect: '{path}' is MSR-VTT's JSON; leave them out."
            )
        rows = list(_read_msr_vtt(path, content, bad))
    else:
        if bad and not content:
            raise UserError(f"No row of '{path}' is of its form, such as {bad[0][0]}: {bad[0][1]}; correct the table.")
        columns = header or list(dict.fromkeys(name for record in content for name in record.row))
        layout = _find_layout(path, table, columns)
        rows, left_out = [], set[str]()
        for place, row in content:
            try:
                rows.append(_read_row(row, layout, left_out))
            except ValueError as error:
                bad.append((place, str(error)))
        if left_out:
            warnings.warn(
                f"The columns {', '.join(sorted(left_out))} of '{path}' are left out: JSON cannot store their values.",
                stacklevel=2,
            )
    dropped += (Dropped(f"{path.name} {place}", None, f"invalid row ({reason})") for place, reason in bad)
    return rows


def _load(path: Path, bad: list[tuple[str, str]], header: list[str]) -> list[_Record] | dict[str, Any]:
    """Return the rows of a table, or MSR-VTT's lists.

    Args:
        path: The file.
        bad: Place and reason of rows that are not of the table's form are added to it.
        header: The columns of a table with a header are added to it.
    """
    if not path.is_file():
        raise UserError(f"There is no caption file '{path}': correct --captions.")
    pair = next((other for captions, other in LINE_FILES if path.name == captions), None)
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES and not pair:
        raise UserError(
            f"'{path}' is not a table of captions: use a file that ends in {', '.join(TABLE_SUFFIXES)}, or prompts.txt "
            "beside videos.txt."
        )
    try:
        if pair:
            return _read_line_files(path, path.with_name(pair))
        if suffix == ".parquet":
            return _read_parquet(path)
        lines = _read_lines(path)
        if suffix == ".json":
            return _read_json(path, "".join(lines), bad)
        if suffix == ".jsonl":
            return list(_read_json_lines(lines, bad))
        return _read_csv(path, lines, "\t" if suffix == ".tsv" else ",", bad, header)
    except UserError:
        raise
    except (ValueError, csv.Error, OSError) as error:
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file ({error}).") from error


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 with their ends, as CSV needs them."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is in UTF-16: save it as UTF-8")
    try:
        return list(io.StringIO(content.decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8") from error


def _read_csv(
    path: Path, lines: list[str], delimiter: str, bad: list[tuple[str, str]], header: list[str]
) -> list[_Record]:
    """Return the rows of a CSV or TSV file with a header; after a bad row it is read again from the next line."""
    records = _split_csv(lines, delimiter, bad)
    header += [name.strip() for name in next(records, (0, []))[1]]
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise UserError(f"'{path}' has two columns of one name ({', '.join(named)}): rename or remove one.")
    found = []
    for line, values in records:
        place = f"line {line}"
        if len(values) < len(header):
            bad.append((place, f"{len(values)} values for {len(header)} columns"))
        elif any(value.strip() for value in values[len(header) :]):
            bad.append((place, f"{len(values)} values for {len(header)} columns: text with commas must be in quotes"))
        else:
            found.append(_Record(place, {name: value for name, value in zip(header, values, strict=False) if name}))
    return found


def _split_csv(lines: list[str], delimiter: str, bad: list[tuple[str, str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the values of each row with the number of its first line."""
    start = 0  # lines before this one are done
    while start < len(lines):
        remaining = (lines[number] for number in range(start, len(lines)))
        reader = csv.reader(remaining, delimiter=delimiter, strict=True)
        first = start
        restart = len(lines)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                bad.append((f"line {first + 1}", f"{error}; is a quotation mark not closed?"))
                restart = first + 1
                break
            stop = start + reader.line_num
            if any(_is_row(line, delimiter, len(values)) for line in lines[first + 1 : stop]):
                bad.append((f"line {first + 1}", "a quotation mark is not closed before the next row"))
                restart = first + 1
                break
            if any(values):
                yield first + 1, values
            first = stop
        start = restart


def _is_row(line: str, delimiter: str, columns: int) -> bool:
    """Return whether a line inside a quoted text is a row by itself: it names a video, in as many columns."""
    values = next(csv.reader([line], delimiter=delimiter), [])
    return columns > 1 and len(values) == columns and any(is_video(value.strip()) for value in values)


def _read_json_lines(lines: list[str], bad: list[tuple[str, str]]) -> Iterator[_Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = parse_json(line, unique_keys=True)
            except ValueError as error:
                bad.append((f"line {number}", f"no valid JSON: {error}"))
                continue
            yield from _as_record(f"line {number}", row, bad)


def _as_record(place: str, row: Any, bad: list[tuple[str, str]]) -> Iterator[_Record]:
    if isinstance(row, dict):
        yield _Record(place, row)
    else:
        bad.append((place, "no JSON object"))


def _read_json(path: Path, text: str, bad: list[tuple[str, str]]) -> list[_Record] | dict[str, Any]:
    content = parse_json(text, unique_keys=True)
    if isinstance(content, list):
        return [record for number, row in enumerate(content, 1) for record in _as_record(f"row {number}", row, bad)]
    if not isinstance(content, dict):
        return []
    if "videos" in content or "sentences" in content or not content:
        return content
    path_column, caption_column = COLUMNS[0]
    rows = {name: row if isinstance(row, dict) else {caption_column: row} for name, row in content.items()}
    return [_Record(f"'{name}'", {**row, path_column: name}) for name, row in rows.items()]


def _read_parquet(path: Path) -> list[_Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet files are read with pyarrow: run pip install -e ".[prepare]".') from error
    rows = parquet.read_table(path).to_pylist()  # raises ValueError or OSError
    return [_Record(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _read_line_files(captions: Path, videos: Path) -> list[_Record]:
    if not videos.is_file():
        raise UserError(f"There is no '{videos}' with the paths of the videos whose captions are in '{captions}'.")
    lines = [[line.strip() for line in _read_lines(path)] for path in (captions, videos)]
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"'{captions}' has {len(lines[0])} lines and '{videos}' {len(lines[1])}: line by line, each video has one "
            "caption, so add or remove lines."
        )
    rows = enumerate(zip(*lines, strict=True), 1)
    return [_Record(f"line {n}", {"path": path, "caption": text}) for n, (text, path) in rows if text or path]


def _find_layout(path: Path, table: CaptionTable, columns: list[str]) -> _Layout:
    """Return the columns to read."""
    given = (table.path_column, table.caption_column)
    if given == (None, None):
        if {"videoID", "timestamp", "caption"} <= set(columns):
            return _Layout("videoID", "caption", is_id=True, times="timestamp")
        if "path" not in columns and {"videoid", "page_dir", "name"} <= set(columns):
            return _Layout("videoid", "name", is_id=True)
        known = [names for names in COLUMNS if set(names) <= set(columns)]
        if known:
            return _Layout(*known[0])
    path_column, caption_column = COLUMNS[0]
    if given != (None, None):
        path_column = given[0] or next((name for name, _ in COLUMNS if name in columns), path_column)
        caption_column = given[1] or next((name for _, name in COLUMNS if name in columns), caption_column)
    missing = [name for name in (path_column, caption_column) if name not in columns]
    if missing:
        raise UserError(
            f"'{path}' has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(map(str, columns)) or 'none'}: name the right ones with --path_column and --caption_column."
        )
    return _Layout(path_column, caption_column)


def _read_row(row: dict[str, Any], layout: _Layout, left_out: set[str]) -> TableRow:
    """Return a row of a table; add the columns whose values JSON cannot store to `left_out`.

    Raises:
        ValueError: If the path or a caption is not text.
    """
    name = row.get(layout.path)
    if layout.is_id and type(name) is int:
        name = f"{name}"
    if not isinstance(name, str):
        raise ValueError(f"its {layout.path} is {'missing' if name is None else 'not text'}")
    if not name.strip() or "\0" in name:
        raise ValueError(f"its {layout.path} is empty" if not name.strip() else f"its {layout.path} is no path")
    extra = {}
    for column in [name for name in row if name not in (layout.path, layout.caption, layout.times)]:
        try:
            extra[column] = _to_json(row[column])
        except TypeError:
            left_out.add(column)
    value = row.get(layout.caption)
    if isinstance(value, float) and value != value:  # pandas' missing value
        value = None
    if layout.times:
        segments = tuple(_read_segments(row.get(layout.times), value))
        return TableRow(name.strip(), [segment.caption for segment in segments], extra, layout.is_id, segments)
    return TableRow(name.strip(), texts(value, layout.caption), extra, layout.is_id)


def _read_segments(times: Any, captions: Any) -> Iterator[Segment]:
    """Yield the captioned parts of a video of Panda-70M, whose CSV has lists in Python's notation."""
    try:
        lists = [ast.literal_eval(value) if isinstance(value, str) else value for value in (times, captions)]
        for (start, end), caption in zip(*lists, strict=True):
            yield Segment(_seconds(start), _seconds(end), *texts(caption, "caption"))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"its timestamp and caption are not lists of equal length: {error}") from error


def _seconds(timestamp: str) -> float:
    """Return a time such as `0:01:02.500` in seconds."""
    seconds = 0.0
    for part in timestamp.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _read_msr_vtt(path: Path, content: dict[str, Any], bad: list[tuple[str, str]]) -> Iterator[TableRow]:
    try:
        captions: defaultdict[str, list[str]] = defaultdict(list)
        for number, sentence in enumerate(content["sentences"], 1):
            try:
                captions[sentence["video_id"]] += texts(sentence["caption"], "caption")
            except ValueError as error:
                bad.append((f"sentence {number}", str(error)))
        for video in content["videos"]:
            name = video["video_id"]
            if not isinstance(name, str):
                raise TypeError("video_id is not text")
            extra = {key: _to_json(value) for key, value in video.items() if key != "video_id"}
            yield TableRow(name, captions.get(name, []), extra, is_id=True)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is neither a list of rows nor MSR-VTT's lists `videos` and `sentences`, joined by video_id "
            f"({type(error).__name__} {error}): give a CSV, JSON-lines or Parquet file."
        ) from error


def _to_json(value: Any) -> Any:
    """Return a value as JSON can store it.

    Raises:
        TypeError: If JSON cannot.
    """
    if isinstance(value, dict):
        return {key: _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} in JSON")
