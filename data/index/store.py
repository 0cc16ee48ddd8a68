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
        index = json.loads(cached.read_text() if cached.exists() else filesystem.cat_file(path))
        is_current = index["version"] == _VERSION and index["tar_size"] == info["size"]
        valid = is_current and _has_headers(filesystem, info, shard, index)
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
    index: dict[str, Any] = {"version": _VERSION, "tar_size": info["size"], "stamp": _stamp(info)}
    try:
        with _open(filesystem, info, shard, _BLOCK) as file:
            index |= scan_tar(file, info["size"])
            places = _header_places(index)
            index["ends"] = _hash_headers(file, [places[0], places[-1]])
            index["headers"] = _hash_headers(file, places) if isinstance(filesystem, LocalFileSystem) else ""
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
    return re.sub(r"\.tar(?=$|\?)", ".index.json", shard)


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


def _stamp(info: dict[str, Any]) -> dict[str, str]:
    """Return what changes if a file is replaced or written again: its inode and dates, but not that of its metadata."""
    if "ino" in info:
        return {"ino": str(info["ino"]), "mtime": str(info["mtime"])}
    return dates(info)


def _has_headers(filesystem: AbstractFileSystem, info: dict[str, Any], shard: str, index: dict[str, Any]) -> bool:
    """Return whether a tar has the headers that its index was made from.

    A local tar is always compared in its first and last header, and in all of them if it has another stamp, such as a
    copy. A remote tar is compared in its first and last header if it has another stamp.
    """
    is_local, same_stamp = isinstance(filesystem, LocalFileSystem), index["stamp"] == _stamp(info)
    if same_stamp and not is_local:
        return True
    places = _header_places(index)
    with _open(filesystem, info, shard, tarfile.BLOCKSIZE) as file:
        if is_local and not same_stamp and index["headers"]:
            return bool(index["headers"] == _hash_headers(file, places))
        return bool(index["ends"] == _hash_headers(file, [places[0], places[-1]]))


def _header_places(index: dict[str, Any]) -> list[int]:
    """Return where the headers of the members begin, in bytes, in order; the first block is always one of them."""
    members = (member for sample in index["samples"].values() for member in sample["members"].values())
    return sorted({0, *(offset - tarfile.BLOCKSIZE for offset, _ in members)})


def _hash_headers(file: io.BufferedIOBase, places: list[int]) -> str:
    hash_ = hashlib.sha256()
    for place in places:
        hash_.update(read_at(file, place, tarfile.BLOCKSIZE))
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
