"""The index of a shard: where each member of each sample stands, what its clip is like, and which samples are bad.

- Made when a shard is written, or by one scan of the tar's headers; of a video only the box that describes it is read.
- Stored beside the shard, as `shard-000000.index.json`; where nothing can be written there, in the user's cache folder.
- A tar that is cut, or damaged in the middle, keeps the samples before that place.
- What a network refuses for a moment is asked for again; what it goes on refusing is an `OSError`, not a bad sample.
"""

import hashlib
import io
import json
import os
import re
import struct
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem

from t2v.errors import UserError
from t2v.video import DecodeError, VideoInfo, probe

_VERSION = 2
_WAITS = (0.25, 1.0, 4.0)
"""Seconds before a request that failed is made again."""
_BLOCK = 2**16
"""Bytes of one request while a tar is scanned: a header, the head of the clip and the small members behind it."""
_BOXES = 64
"""No mp4 has more boxes than this before the one that describes it."""
_DATES = {"mtime", "created", "lastmodified", "last_modified", "updated", "etag"}
"""What file systems call that which changes with the content, in lower case without hyphens."""

_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError)
"""What is no better a second later."""
_GUEST = {"github", "hf", "http", "https"}
"""Where an index is not stored beside the shards: to write there is to publish."""

_DESCRIBED = (b"avcC", b"hvcC", b"av1C")
"""H.264, H.265 and AV1 say in front what other codecs say in the first picture."""

T = TypeVar("T")


def patiently(function: Callable[..., T], *args: Any) -> T:
    """Call a file system, and again where it fails for a moment.

    Args:
        function: a method of the file system.
        args: its arguments.

    Raises:
        OSError: where waiting would not help, or the last attempt failed as well.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return function(*args)
        except _FINAL:
            raise
        except Exception as error:  # the library behind each file system has errors of its own
            if (wait := next(waits, None)) is None:
                raise OSError(
                    f"cannot read '{args[0]}' after {len(_WAITS) + 1} attempts: {str(error) or repr(error)}"
                ) from error
            time.sleep(wait)


def read_range(filesystem: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` up to `stop`.

    Raises:
        OSError: where they cannot be had.
    """
    content = patiently(filesystem.cat_file, path, start, stop)
    if len(content) != stop - start:
        raise OSError(
            f"'{path}' gave {len(content)} bytes where {stop - start} were asked for: "
            + ("it has become shorter." if len(content) < stop - start else "its server does not serve parts of files.")
        )
    return content


def stored_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any] | None:
    """The index of a shard that was made before, or None where there is none, or it is not of this tar.

    Args:
        filesystem: where the shard is.
        shard: its path there.

    Returns:
        `samples`: for each key the `members` (offset and size by extension) and the other fields of a `Sample`.
        `bad`: key and reason of each bad sample.

    Raises:
        FileNotFoundError: where there is no such shard.
    """
    info = patiently(filesystem.info, shard)
    path = _beside(shard)
    try:
        cached = _cached(filesystem, info)
        if cached.exists():
            index = json.loads(cached.read_text())
            older = False
        else:
            index = json.loads(filesystem.cat_file(path))
            older = _is_older(filesystem, path, shard)
        fits = index["version"] == _VERSION and index["tar_size"] == info["size"] and not older
    except Exception:  # as many kinds as there are file systems, and none matters: a new index can be made
        return None
    return index if fits else None


def make_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any]:
    """Scan a shard, and store its index; see `stored_index`.

    Raises:
        UserError: where it is no tar.
        OSError: where it cannot be read.
    """
    info = patiently(filesystem.info, shard)
    if info["size"] is None:
        raise UserError(f"The server of '{shard}' does not say how large it is: copy the shards to another place.")
    file = io.BufferedReader(_File(filesystem, shard, info["size"]), _BLOCK)
    try:
        index = {"version": _VERSION, "tar_size": info["size"], **_scan(file, info["size"])}
    except tarfile.TarError as error:
        raise UserError(f"'{shard}' is not a tar file ({error}): make or copy it again.") from error
    content = json.dumps(index).encode()
    if not _store_beside(filesystem, _beside(shard), content):
        with suppress(OSError, RuntimeError):  # no home, or a full one: the index then lives in memory
            path = _cached(filesystem, info)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(path)
    return index


def _beside(shard: str) -> str:
    return re.sub(r"\.tar(?=$|\?)", ".index.json", shard)


def _cached(filesystem: AbstractFileSystem, info: dict[str, Any]) -> Path:
    """Where the index of a shard is, of which none can be stored beside it; another tar there has another name."""
    dates = {name: str(info[name]) for name in sorted(info) if name.lower().replace("-", "") in _DATES}
    tar = json.dumps([filesystem.unstrip_protocol(info["name"]), info["size"], dates])
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "t2v" / "index" / f"{hashlib.sha256(tar.encode()).hexdigest()}.json"


def _is_older(filesystem: AbstractFileSystem, path: str, shard: str) -> bool:
    try:
        return filesystem.modified(path) < filesystem.modified(shard)
    except NotImplementedError:  # a file system without dates
        return False


def _store_beside(filesystem: AbstractFileSystem, path: str, content: bytes) -> bool:
    protocol = filesystem.protocol
    if not _GUEST.isdisjoint([protocol] if isinstance(protocol, str) else protocol):
        return False
    partial = f"{path}.{os.getpid()}.partial"
    try:
        filesystem.pipe_file(partial, content)
        filesystem.mv(partial, path)
    except (OSError, NotImplementedError):
        return False
    return True


class _File(io.RawIOBase):
    """A file of a file system, of which only what is read is fetched."""

    def __init__(self, filesystem: AbstractFileSystem, path: str, size: int) -> None:
        self.filesystem, self.path, self.size = filesystem, path, size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.size)
        if stop <= self.at:
            return 0
        content = read_range(self.filesystem, self.path, self.at, stop)
        buffer[: len(content)] = content
        self.at = stop
        return len(content)


class _Run:
    """Members of one key, one behind the other."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, tuple[int, int]] = {}
        self.clip: dict[str, Any] = {}
        self.reason = ""
        """Why it is bad."""


def _scan(file: Any, size: int) -> dict[str, Any]:
    """Samples and bad samples of an open tar of so many bytes."""
    runs: list[_Run] = []
    ending = ""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                key, extension = _split(member.name)
                refusal = _refusal(member)
                if member.isdir() or not (extension or refusal):
                    continue
                if not runs or runs[-1].key != key or extension in runs[-1].members:
                    runs.append(_Run(key))
                run = runs[-1]
                run.members[extension] = member.offset_data, member.size
                run.reason = run.reason or refusal
                if member.isfile() and not 0 <= member.size <= size - member.offset_data:
                    run.reason = f"the tar is cut short, or damaged, in its {extension}"
                    break
                if not run.reason:
                    run.clip |= _clip(file, extension, *run.members[extension])
            else:
                ending = (
                    "" if _read_at(file, tar.offset, tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "no end mark"
                )
        except (tarfile.TarError, ValueError, OverflowError) as error:  # of tarfile, from damaged headers
            ending = str(error)
        if ending:
            reason = f"the tar is cut short, or damaged, at byte {tar.offset} ({ending})"
            if runs and runs[0].members.keys() - runs[-1].members.keys():
                runs[-1].reason = reason
            else:
                runs.append(_Run(""))  # whichever stood there
                runs[-1].reason = reason
    return _sort(runs)


def _sort(runs: list[_Run]) -> dict[str, Any]:
    """Good samples and bad ones: members of a key may lie apart, but not a member that the key has already."""
    samples: dict[str, dict[str, Any]] = {}
    bad: list[tuple[str, str]] = []
    for run in runs:
        if run.reason:
            bad.append((run.key, run.reason))
        elif run.key not in samples:
            samples[run.key] = {"members": run.members, **run.clip}
        elif samples[run.key]["members"].keys() & run.members.keys():
            bad.append((run.key, "its key comes a second time in the tar"))
        else:
            samples[run.key]["members"] |= run.members
            samples[run.key] |= run.clip
    return {"samples": samples, "bad": bad}


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member. Without one, the key is its name."""
    name = name.encode(errors="surrogateescape").decode(errors="replace")
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension) if stem and extension else (name, "")


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member must not be touched, or nothing."""
    name = repr(member.name)
    if ".." in re.split(r"[/\\]", member.name) or re.match(r"[/\\]|\w:[/\\]", member.name):
        return f"the name {name} leads out of the folder"
    if not (member.isfile() or member.isdir()):
        return f"{name} is a {'link' if member.islnk() or member.issym() else 'device'}, not a file"
    if member.issparse():
        return f"{name} is stored with its zeros left out"
    if re.search("[\ud800-\udfff]", member.name):  # how Python shows bytes that are not
        return f"the name {name} is not UTF-8"
    return ""


def _clip(file: Any, extension: str, offset: int, size: int) -> dict[str, Any]:
    """What the video or the tokens are like, or why they are broken; nothing for other members."""
    try:
        if extension == "mp4":
            return _probe(file, offset, size)._asdict()
        if extension == "tokens.npy":
            shape = _npy_shape(_read_at(file, offset, min(size, 1024)))
            if len(shape) != 3:
                raise ValueError(f"its tokens have the shape {shape}, not (frames, height, width)")
            return dict(zip(("frames", "height", "width"), shape, strict=True))
    except ValueError as error:
        return {"reason": str(error)}
    return {}


def _probe(file: Any, offset: int, size: int) -> VideoInfo:
    """What the mp4 at a place says of itself, with as little of it read as will do."""
    if blank := _without_pictures(file, offset, size):
        with suppress(DecodeError):
            return probe(blank)
    return probe(_read_at(file, offset, size))


def _without_pictures(file: Any, offset: int, size: int) -> bytes:
    """An mp4 with zeros for its pictures, of which only the description is read; nothing where that does not serve.

    The description may stand before the pictures or behind them.
    """
    content, at = bytearray(size), 0
    found: set[bytes] = set()
    for _ in range(_BOXES):
        head = _read_at(file, offset + at, min(16, size - at))
        if len(head) < 16:
            break
        length, kind, long = struct.unpack(">I4sQ", head)
        length = long if length == 1 else length or size - at
        if kind in (b"moov", b"mdat") and length > size - at:
            raise DecodeError(f"it is cut short: {size} bytes are there of {at + length}")
        if not 8 <= length <= size - at or kind == b"moof":
            break
        content[at : at + 16] = head
        if kind in (b"ftyp", b"moov"):
            content[at : at + length] = _read_at(file, offset + at, length)
        found.add(kind)
        at += length
        if {b"moov", b"mdat"} <= found:
            return bytes(content) if any(name in content for name in _DESCRIBED) else b""
    return b""


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _npy_shape(head: bytes) -> tuple[int, ...]:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]
