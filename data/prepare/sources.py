"""Finds the videos and captions of a source, in any of its layouts.

- A folder of videos, with a table of captions, or with a .txt or .json file next to each video; see `tables`.
- Shards of `video2dataset` or of this command: tar files with a video and a txt or json for each sample.

Both may be on this machine or at an address that fsspec opens. A video that occurs in several rows, or under several
names, has several captions; all are kept.
"""

import hashlib
import json
import mimetypes
import os
import posixpath
import re
import tempfile
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.captions import read_captions, read_metadata
from data.members import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, is_video
from data.prepare.captions import clean_caption
from data.prepare.dropped import Dropped, summarize
from data.prepare.files import File, is_remote, list_files, local_copy
from data.prepare.filters import Filters
from data.prepare.tables import LINE_FILES, TABLE_SUFFIXES, CaptionTable, Segment, read_table
from data.shards import SHARD_SUFFIXES, ShardSet, is_shard
from t2v.errors import UserError
from t2v.video import DecodeError, probe

CAPTION_FILES = (
    *(f"captions{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".json")),
    *(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")),
    *(captions for captions, _ in LINE_FILES),
)
"""Names of caption tables, in order of preference; other names are used only if there is a single table."""
_TYPES = mimetypes.MimeTypes()
"""The types of files that Python knows, the same on all machines."""
_PREVIEWS = (".lrv", ".lrf")
"""Files of small copies that cameras write beside their videos, under other names."""
_RESERVED = ("caption", "captions", "source", "start", "frames", "fps", "height", "width", "flaws")
"""Entries of a sample's json that this command writes."""
NO_CAPTIONS = "none"
"""Value of `captions` that prepares the videos without captions."""


class Video(NamedTuple):
    """A video of the source with its captions."""

    name: str
    """Its path as in the captions, or the names of the tar and the sample."""
    captions: list[str]
    """The first is the sample's txt; empty if the videos are prepared without captions."""
    extra: dict[str, Any]
    """The other columns of its row, which are added to the sample's json."""
    path: Path | str
    """The file, or the tar that contains it; text is an address."""
    size: int
    """Bytes of the video."""
    offset: int | None = None
    """First byte in the tar; None for a file."""
    segments: tuple[Segment, ...] = ()
    """Parts that have captions of their own; the rest of the video is then left out."""


class Row(NamedTuple):
    """A video as listed in the source, before any check."""

    name: str
    captions: list[str]
    extra: dict[str, Any]
    file: File | None
    """The file, or the tar that contains it, with the bytes of the video; None if it is missing."""
    offset: int | None = None
    segments: tuple[Segment, ...] = ()


def find_videos(
    source: Path | str, table: CaptionTable, filters: Filters, images: bool = False
) -> tuple[list[Video], list[Dropped]]:
    """Return the captioned videos of a source, and the dropped ones.

    Args:
        source: Folder of videos or of shards, or shards as `ShardSet` takes them.
        table: The table of captions, for a folder of videos. Its path may be an address; "none" is no captions, and
            None looks for captions in the source.
        filters: Limits for the captions.
        images: Also take pictures, except those next to a video of the same name.

    Raises:
        UserError: If there are no videos or no captions, or an option has no effect on this source.
    """
    dropped: list[Dropped] = []
    source = os.fspath(source)
    captions = None if table.path is None else os.fspath(table.path)
    captioned = captions != NO_CAPTIONS
    rows, no_captions = _find_rows(source, captions, table, images, dropped)
    if not captioned:
        rows = [row._replace(captions=[], segments=()) for row in rows]
    videos = _check(rows, filters, captioned, dropped)
    if not videos and all(drop.kind in ("no caption", "missing file") for drop in dropped):
        raise UserError(
            f"No video in '{source}' has a caption: {no_captions}, or --captions none to prepare them without captions."
        )
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
        values = [video.name, video.size, video.captions, video.extra]
        hash_.update(json.dumps([*values, video.segments] if video.segments else values).encode() + b"\n")
    return hash_.hexdigest()[:16]


def _find_rows(
    source: str, captions: str | None, table: CaptionTable, images: bool, dropped: list[Dropped]
) -> tuple[Iterable[Row], str]:
    """Return the rows of a source, and the likely cause if none of them has a caption."""
    columns = [name for name in ("path_column", "caption_column") if getattr(table, name)]
    if captions == NO_CAPTIONS and columns:
        raise _no_effect(columns, "with --captions none")
    files = [] if _is_shards(source) else list_files(source, dropped)
    shards = [file for file in files if "/" not in file.name and is_shard(file.name)]
    videos = _find_videos(files, images) if not shards else [file for file in files if is_video(file.name)]
    if videos and shards:
        raise UserError(
            f"'{source}' contains both {len(videos)} videos and {len(shards)} shards (*.tar): move those to prepare "
            "into a folder of their own."
        )
    if shards or _is_shards(source):
        given = [*(["captions"] if captions not in (None, NO_CAPTIONS) else []), *columns]
        if given:
            cause = "as the samples of shards contain their captions, which python -m data.recaption changes"
            raise _no_effect(given, f"on '{source}', {cause}")
        return _rows_of_shards(source, dropped), (
            "none of its samples has a txt, or a json with a caption; add captions by python -m data.recaption"
        )
    if not videos:
        pictures = sum(_is_image(file.name) for file in files)
        hint = f"; its {pictures} pictures give clips of one frame: --frames 1" if pictures and not images else ""
        if nested := next((file.shown for file in files if is_shard(file.name)), None):
            hint = f"; shards such as {nested} are read from the folder that they are in"
        raise UserError(
            f"No videos in '{source}': none of its {len(files)} files is a video, and no shard (.tar) is directly in "
            f"it{hint}."
        )
    if captions == NO_CAPTIONS:
        return [Row(file.shown, [], {}, file) for file in videos], ""
    names = f"the columns {table.path_column or 'path'} and {table.caption_column or 'caption'}"
    advice = f"give --captions a file with {names}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(captions) if captions else None
        if captions and is_remote(captions):
            path = local_copy(File(captions, captions), Path(folder))
        path = path or _find_captions(source, files, videos, Path(folder))
        if path is not None:
            cause = f"'{captions or path}' names none of its {len(videos)} videos with a caption"
            return _rows_of_table(source, videos, table._replace(path=path), dropped), f"{cause}; {advice}"
    if columns:
        raise _no_effect(columns, f"on '{source}', which has no table of captions")
    cause = f"there is no {', '.join(CAPTION_FILES)}, and no .txt or .json next to its {len(videos)} videos"
    return _rows_of_text_files(files, videos, dropped), f"{cause}; {advice}"


def _no_effect(options: list[str], cause: str) -> UserError:
    verb = "have" if len(options) > 1 else "has"
    return UserError(f"--{' and --'.join(options)} {verb} no effect {cause}: leave out.")


def _is_shards(source: str) -> bool:
    """Return whether a source is one or several shards by its name, not a folder."""
    return not Path(source).is_dir() and (is_shard(source) or "::" in source or bool(re.search(r"[{*\[]", source)))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _find_videos(files: list[File], images: bool) -> list[File]:
    """Return the files that are videos by their name, or by their content if their name has no known extension.

    Files beside a video of the same name belong to it, such as notes or a camera's previews.
    """
    videos = [file for file in files if is_video(file.name)]
    stems = {posixpath.splitext(file.name)[0] for file in videos}
    others = [file for file in files if not is_video(file.name) and posixpath.splitext(file.name)[0] not in stems]
    videos += [file for file in others if _is_unnamed_video(file)]
    if images:
        stems = {file.name.rpartition(".")[0] for file in videos}
        videos += [file for file in files if _is_image(file.name) and file.name.rpartition(".")[0] not in stems]
    return sorted(videos)


def _is_unnamed_video(file: File) -> bool:
    suffix = file.name.rpartition("/")[2].rpartition(".")[2].lower()
    if not isinstance(file.path, Path) or f".{suffix}" in (*TABLE_SUFFIXES, *SHARD_SUFFIXES, *_PREVIEWS):
        return False
    if _TYPES.guess_type(f"x.{suffix}")[0] or file.name.rpartition("/")[2].startswith(".") or not file.size:
        return False
    try:
        probe(file.path)
    except (DecodeError, PermissionError):
        return False
    return True


def _find_captions(source: str, files: list[File], videos: list[File], folder: Path) -> Path | None:
    """Return the table of captions in a folder, or None if there is none or the videos have .txt or .json files.

    A table that is not on this machine is copied into `folder`.

    Raises:
        UserError: If several tables could be meant.
    """
    top = {file.name: file for file in files if "/" not in file.name}
    stems = {composed(file.name.rpartition(".")[0]) for file in videos}
    for name in CAPTION_FILES:
        pair = dict(LINE_FILES).get(name)
        if name in top and (pair is None or pair in top):
            if pair:
                local_copy(top[pair], folder)
            return _table_path(source, top[name], folder)
    if any(composed(file.name.rpartition(".")[0]) in stems and _is_text(file.name) for file in files):
        return None
    tables = [
        file
        for name, file in top.items()
        if name.lower().endswith(TABLE_SUFFIXES)
        and stems.isdisjoint(composed(stem) for stem in (file.stem, file.stem.partition(".")[0]))
    ]
    if len(tables) > 1:
        names = ", ".join(file.name for file in tables)
        raise UserError(f"'{source}' contains several tables ({names}): select one with --captions.")
    return _table_path(source, tables[0], folder) if tables else None


def _table_path(source: str, file: File, folder: Path) -> Path:
    return Path(source, file.name) if isinstance(file.path, Path) else local_copy(file, folder)


def _is_text(name: str) -> bool:
    return name.rpartition(".")[2].lower() in TEXT_EXTENSIONS


def _rows_of_table(source: str, videos: list[File], table: CaptionTable, dropped: list[Dropped]) -> list[Row]:
    """Return the rows of a table, and one without a caption for each video that it does not name."""
    by_name = _by_spelling((file.name, file) for file in videos)
    by_path = {file.real_path: file for file in videos}
    by_id: defaultdict[str, list[File]] = defaultdict(list)
    for file in videos:
        by_id[composed(file.stem)].append(file)
    rows = []
    replaced: set[str] = set()
    for name, captions, columns, is_id, segments in read_table(table, dropped):
        extra = {column: value for column, value in columns.items() if column not in _RESERVED}
        replaced |= columns.keys() - extra.keys()
        if is_id:
            found = by_id.get(composed(name), [])
            if len(found) > 1:
                places = ", ".join(file.shown for file in found)
                dropped.append(Dropped(name, None, f"ambiguous id (it names {places})"))
                continue
            match = found[0] if found else None
        else:
            match = _spelt(by_name, posixpath.normpath(name)) or _find_file(source, name, by_path)
        rows.append(Row(match.shown if match else name, captions, extra, match, None, segments))
    if replaced:
        warnings.warn(
            f"The columns {', '.join(sorted(replaced))} of '{table.path}' are left out, since the json of a clip has "
            "entries of its own with these names: rename the columns to keep them.",
            stacklevel=2,
        )
    named = {row.file for row in rows}
    return rows + [Row(file.shown, [], {}, file) for file in videos if file not in named]


def composed(name: str) -> str:
    """Return a name with composed accents: macOS may store "é" as "e" and a combining accent."""
    return unicodedata.normalize("NFC", name)


def _by_spelling(named: Iterable[tuple[str, File]]) -> dict[str, File]:
    """Return files by their names, and by these with composed accents where no other file has that name."""
    by_name = dict(named)
    return {composed(name): file for name, file in by_name.items()} | by_name


def _spelt(by_name: dict[str, File], name: str) -> File | None:
    return by_name.get(name) or by_name.get(composed(name))


def _find_file(source: str, name: str, by_path: dict[Path | str, File]) -> File | None:
    """Return the file of a path that is spelt differently from those listed, or outside the folder."""
    if is_remote(source):
        return by_path.get(name)
    try:
        path = Path(source, name).absolute()
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # such as a name that is too long
        return None
    file = File(name, path, size or 0)
    return by_path.get(file.real_path) or (None if size is None else file)


def _rows_of_text_files(files: list[File], videos: list[File], dropped: list[Dropped]) -> Iterator[Row]:
    texts = _by_spelling(
        (f"{stem}.{end.lower()}", file) for file in files for stem, _, end in [file.name.rpartition(".")]
    )
    for video in videos:
        stem = video.name.rpartition(".")[0]
        named = {name: _spelt(texts, f"{stem}.{name}") for name in TEXT_EXTENSIONS}
        found = {name: file for name, file in named.items() if file}
        try:
            members = {name: file.read() for name, file in found.items()}
            extra = _without_captions(read_metadata(members))
            yield Row(video.shown, read_captions(members), extra, video)
        except ValueError as error:
            dropped.append(Dropped(video.shown, None, str(error)))
        except OSError as error:
            dropped.append(Dropped(video.shown, None, f"caption cannot be read ({error.strerror or error})"))


def _rows_of_shards(source: str, dropped: list[Dropped]) -> Iterator[Row]:
    shards = ShardSet(source)
    dropped += (Dropped(f"{Path(bad.shard).name}/{bad.key}".rstrip("/"), None, bad.reason) for bad in shards.skipped)
    for sample in shards.samples:
        name = f"{Path(sample.shard).name}/{sample.key}"
        if sample.flaw:
            dropped.append(Dropped(name, None, sample.flaw))
            continue
        # One at a time, as the video may be between the two.
        members = shards.read(sample, "txt") | shards.read(sample, "json")
        captions, extra = read_captions(members), _without_captions(read_metadata(members))
        if sample.video is None:
            yield Row(name, captions, extra, None)
        else:
            offset, size = sample.members[sample.video]
            address = shards.address(sample)
            path = address if is_remote(address) else Path(address).absolute()
            yield Row(name, captions, extra, File(name, path, size), offset)


def _without_captions(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in ("caption", "captions")}


def _check(rows: Iterable[Row], filters: Filters, captioned: bool, dropped: list[Dropped]) -> list[Video]:
    """Return the videos that exist and have a caption, each once; append the others to `dropped`."""
    merged: dict[Any, Row] = {}
    for row in rows:
        key = (row.file.real_path, row.offset) if row.file else row.name
        first = merged.setdefault(key, row)
        if first is not row:
            first.captions.extend(row.captions)
            merged[key] = first._replace(segments=first.segments + row.segments)
    videos = []
    for row in merged.values():
        cleaned = {text: clean_caption(text, filters) for text in row.captions}
        captions = list(dict.fromkeys(text for text, reason in cleaned.values() if reason is None))
        reasons = [reason for _, reason in cleaned.values() if reason is not None]
        segments = [segment._replace(caption=cleaned[segment.caption][0]) for segment in row.segments]
        if row.file is None:
            dropped.append(Dropped(row.name, None, "missing file"))
        elif captioned and not captions:
            dropped.append(Dropped(row.name, None, reasons[0] if reasons else "no caption"))
        else:
            kept = tuple(segment for segment in segments if segment.caption in captions)
            file = row.file
            videos.append(Video(row.name, captions, row.extra, file.path, file.size, row.offset, kept))
    return videos
