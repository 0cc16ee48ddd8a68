"""Stored indices: `shard-000000.index.json` beside `shard-000000.tar`, or in the user's cache folder."""

import hashlib
import io
import json
import os
import re
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from data.index.remote import RemoteFile, read_at, with_retries
from data.index.tar import scan_tar
from t2v.errors import UserError
from t2v.files import atomic_path

_VERSION = 5
_BLOCK = 2**16
"""Bytes of one request while a tar is scanned: a header, the head of the clip and the small members behind it."""
_DATES = {"mtime", "created", "lastmodified", "last_modified", "updated", "etag"}
"""Names, in lower case without hyphens, under which file systems report values that change with the content."""
_COUNTS = (2, 64, 2**62)
"""Numbers of headers that are hashed together: the first and last, some, and all."""
_READ_ONLY_PROTOCOLS = {"github", "hf", "http", "https"}
"""Protocols over which no index is written: that would fail, or publish it."""


def load_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any] | None:
    """Return the stored index of a shard, or None if there is none or it belongs to another tar.

    Args:
        filesystem: The file system of the shard.
        shard: Path of the tar in it.

    Returns:
        `samples`: For each key the `members` (offset and size by extension) and the other fields of a `Sample`.
        `skipped`: Key and reason of each skipped sample.

    Raises:
        FileNotFoundError: If there is no such shard.
        OSError: If the file system cannot be reached.
    """
    info = with_retries(filesystem.info, shard)
    path = _index_path(shard)
    try:
        cached = _cache_path(filesystem, info)
        if cached.exists():
            index, is_older = json.loads(cached.read_text()), False
        else:
            index, is_older = json.loads(filesystem.cat_file(path)), _is_older(filesystem, path, shard)
        is_current = index["version"] == _VERSION and index["tar_size"] == info["size"]
        valid = is_current and _has_headers(filesystem, info, shard, index, is_older)
    except Exception:  # each file system has its own errors, and after any of them a new index can be made
        return None
    return index if valid else None


def make_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any]:
    """Scan a shard and store its index.

    Args:
        filesystem: The file system of the shard.
        shard: Path of the tar in it.

    Returns:
        The index; see `load_index`.

    Raises:
        UserError: If the file is not a tar.
        OSError: If it cannot be read.
    """
    info = with_retries(filesystem.info, shard)
    if info["size"] is None:
        raise UserError(
            f"The server of '{shard}' does not report the file's size, which reading by offset needs: copy the shards "
            "to another server or to a disk."
        )
    index: dict[str, Any] = {"version": _VERSION, "tar_size": info["size"]}
    try:
        with _open(filesystem, info, shard, _BLOCK) as file:
            index |= scan_tar(file, info["size"])
            places = _header_places(index)
            counts = _COUNTS if isinstance(filesystem, LocalFileSystem) else _COUNTS[:1]
            index["headers"] = {str(count): _hash_headers(file, places, count) for count in counts}
    except tarfile.TarError as error:
        raise UserError(f"'{shard}' is not a tar file ({error}): make or copy it again.") from error
    content = json.dumps(index).encode()
    if not _store_beside(filesystem, _index_path(shard), content):
        with suppress(OSError, RuntimeError):  # without a home folder or space the index stays in memory
            path = _cache_path(filesystem, info)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
    return index


def _index_path(shard: str) -> str:
    """Return the path of the index beside a shard; the query of a URL is kept."""
    return re.sub(r"\.tar(?=$|\?)", ".index.json", shard, flags=re.IGNORECASE)


def _cache_path(filesystem: AbstractFileSystem, info: dict[str, Any]) -> Path:
    """Return the path of a shard's index in the cache folder, which is different after the shard has changed."""
    tar = json.dumps([filesystem.unstrip_protocol(info["name"]), info["size"], dates(info)])
    return cache_folder() / "index" / f"{hashlib.sha256(tar.encode()).hexdigest()}.json"


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$XDG_CACHE_HOME/t2v`, by default `~/.cache/t2v`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v"


def dates(info: dict[str, Any]) -> dict[str, str]:
    """Return what a file system reports of a file that changes with its content, apart from its size."""
    return {name: str(info[name]) for name in sorted(info) if name.lower().replace("-", "") in _DATES}


def _open(filesystem: AbstractFileSystem, info: dict[str, Any], shard: str, block: int) -> io.BufferedReader:
    """Open a tar for reading in blocks of a number of bytes."""
    if isinstance(filesystem, LocalFileSystem):
        return io.BufferedReader(io.FileIO(info["name"]), block)
    return io.BufferedReader(RemoteFile(filesystem, shard, info["size"]), block)


def _is_older(filesystem: AbstractFileSystem, path: str, shard: str) -> bool:
    try:
        return bool(filesystem.modified(path) < filesystem.modified(shard))
    except NotImplementedError:  # a file system without dates
        return False


def _has_headers(
    filesystem: AbstractFileSystem, info: dict[str, Any], shard: str, index: dict[str, Any], is_older: bool
) -> bool:
    """Return whether a tar has the headers from which its index was made.

    Of a local tar some headers are compared, or all if it is newer than its index, such as a copy; of a remote tar the
    first and last if it is newer. What differs elsewhere shows when a sample is read.
    """
    is_local = isinstance(filesystem, LocalFileSystem)
    if not is_local and not is_older:
        return True
    counts = [str(count) for count in _COUNTS] if is_local else ["2"]
    count = max(set(counts[: 3 if is_older else 2]) & index["headers"].keys(), key=int)
    with _open(filesystem, info, shard, tarfile.BLOCKSIZE) as file:
        return bool(index["headers"][count] == _hash_headers(file, _header_places(index), int(count)))


def _header_places(index: dict[str, Any]) -> list[int]:
    """Return where the headers of the members begin, in bytes, in order; the first block is always one of them."""
    members = (member for sample in index["samples"].values() for member in sample["members"].values())
    return sorted({0, *(offset - tarfile.BLOCKSIZE for offset, _ in members)})


def _hash_headers(file: io.BufferedIOBase, places: list[int], count: int) -> str:
    """Return a hash of up to `count` of the headers, the first and last among them."""
    hash_ = hashlib.sha256()
    count = min(count, len(places) + 1)
    step = (len(places) - 1) / (count - 1)
    for number in sorted({round(i * step) for i in range(count)}):
        hash_.update(read_at(file, places[number], tarfile.BLOCKSIZE))
    return hash_.hexdigest()


def _store_beside(filesystem: AbstractFileSystem, path: str, content: bytes) -> bool:
    """Write an index on the shard's file system, local or remote, in one step; return whether that was possible."""
    protocols = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
    if not _READ_ONLY_PROTOCOLS.isdisjoint(protocols):
        return False
    temporary = f"{path}.{os.getpid()}.partial"
    try:
        filesystem.pipe_file(temporary, content)
        filesystem.mv(temporary, path)
    except (OSError, NotImplementedError):
        return False
    return True
