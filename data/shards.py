"""Shards: WebDataset tar files, written completely or not at all, and read by offset.

A sample is a run of tar members with one key: `KEY.mp4`, `KEY.txt`, `KEY.json`, as `video2dataset` writes them, or
`KEY.tokens.npy`, `KEY.text.npy`, … . The index of `shard-000000.tar` is `shard-000000.index.json` beside it.
"""

import glob
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from data.index import COMPRESSIONS, check_header, load_index, make_index, read_range, unpack, with_retries
from data.members import find_video
from data.progress import ProgressBar
from t2v.errors import UserError
from t2v.files import atomic_path

SHARD_SUFFIXES = (".tar", *COMPRESSIONS)
"""Ends of the names of shards, in lower case."""
_CHAINED = ("blockcache", "cached", "dir", "filecache", "libarchive", "simplecache", "tar", "zip")
"""Protocols that fsspec joins to another address by `::`."""
_THREADS = 16
"""Remote shards that are indexed at a time: most of the time is waiting. Local ones are indexed one after the other:
threads that take turns with Python's lock took twice as long."""
_FOLDER = "it is a folder"
_MAX_GAP = 2**20
"""Bytes between two members of a sample above which each member is read in its own request."""


class Sample(NamedTuple):
    """One sample: its members in a shard, and the length and size of its clip."""

    key: str
    shard: str
    """Path or address of the tar."""
    members: dict[str, tuple[int, int]]
    """Offset and size in bytes of each member, by its extension."""
    frames: int = 0
    """Frames of the video or of the tokens; 0 if there is neither, or it is corrupt."""
    fps: float = 0.0
    """Stored frames per second; 0 for tokens."""
    height: int = 0
    """Height in pixels, or in tokens."""
    width: int = 0
    """Width in pixels, or in tokens."""
    reason: str = ""
    """Why the video or the tokens are corrupt, if `frames` is 0."""
    captions: int = 0
    """Number of captions in its txt and json."""
    flaw: str = ""
    """Why its captions cannot be read; empty if they can."""

    @property
    def video(self) -> str | None:
        """The extension of its video, or None if it has none."""
        return find_video(self.members)


class SkippedSample(NamedTuple):
    """A sample that cannot be used, and why."""

    key: str
    """Empty if a tar is truncated or damaged between two samples, so that the key is not known."""
    shard: str
    """Path or address of the tar."""
    reason: str


class ShardSet:
    """The samples of a set of shards.

    It can be used in a process that was forked from the one that created it.

    Args:
        path: A folder of shards, one tar, or a pattern such as `clips/shard-00*.tar` or
            `s3://bucket/clips-{000000..000099}.tar`; a local path or any address that fsspec opens. Several are a list,
            or are joined by `::`. Compressed tars (.tgz, .tar.gz, …) are unpacked once, into the cache folder. Tars
            whose name begins with a dot are incomplete, and left out.
        command: The command that writes such shards, for messages.

    Attributes:
        path: The path, for messages; several are joined by commas.
        samples: All samples, shard after shard in the order of the paths and of their names.
        skipped: Members that form no sample: truncated, with a key that occurs twice, a link, or a name that leads out
            of the folder; and shards that are no tar or empty, or a link to nothing. They are never read.
        sources: For each shard, which of the paths it belongs to.

    Raises:
        UserError: If a path has no shard, or no shard can be read.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], command: str = "python -m data.prepare") -> None:
        paths = [path] if isinstance(path, str | Path) else path
        self.path = ", ".join(os.fspath(each) for each in paths)
        if not paths:
            raise UserError("There are no shards to open: the list of their paths is empty.")
        self._command = command
        self._filesystems: dict[tuple[int, str], AbstractFileSystem] = {}
        self._addresses: dict[str, str] = {}
        self.sources: dict[str, int] = {}
        self.skipped: list[SkippedSample] = []
        try:
            for source, each in enumerate(paths):
                self._find(os.fspath(each), source)
            indices = self._load_indices()
            self._check_ranges(indices)
        except FileNotFoundError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise UserError(
                f"No shards (*.tar) in '{self.path}': there is no {error.filename or error}{cause}; write them "
                f"by `{command}`, or correct the path."
            ) from error
        except OSError as error:
            raise UserError(
                f"Cannot open the shards in '{self.path}' ({error}): try again, or correct the path."
            ) from error
        self.samples = [
            Sample(key, shard, _members(entry.pop("members")), **entry)
            for shard, index in indices.items()
            for key, entry in index["samples"].items()
        ]
        for shard, index in indices.items():
            empty = [("", "it has no samples")] if not index["samples"] else []
            self.skipped += [SkippedSample(key, shard, reason) for key, reason in index["skipped"] or empty]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: Sample, *extensions: str) -> dict[str, bytes]:
        """Read members of a sample, in one request if they are close together.

        Args:
            sample: One of `samples`.
            extensions: Members to read, such as "mp4"; those that the sample does not have are left out.

        Returns:
            The members' bytes by their extension.

        Raises:
            OSError: If the shard cannot be read.
            ValueError: If another tar is in its place.
        """
        ranges = {extension: sample.members[extension] for extension in extensions if extension in sample.members}
        if not ranges:
            return {}
        start = min(offset for offset, _ in ranges.values()) - tarfile.BLOCKSIZE  # with the header
        stop = max(offset + size for offset, size in ranges.values())
        if stop - start > sum(size + tarfile.BLOCKSIZE for _, size in ranges.values()) + _MAX_GAP:
            return {name: self.read(sample, name)[name] for name in ranges}
        content = self._read(sample.shard, start, stop)
        members = {}
        for name, (offset, size) in ranges.items():
            check_header(content[offset - start - tarfile.BLOCKSIZE : offset - start], sample.key, size)
            members[name] = content[offset - start : offset - start + size]
        return members

    def address(self, sample: Sample) -> str:
        """Return the path of a sample's shard on this machine, or its address with protocol."""
        address = self._addresses[sample.shard]
        return sample.shard if "://" not in address else self._filesystem(sample.shard).unstrip_protocol(sample.shard)

    def _filesystem(self, shard: str) -> AbstractFileSystem:
        """Return the file system of a shard; each process has its own, since connections do not survive a fork."""
        address = self._addresses[shard]
        # The parent's object is kept: deleting it would close its connections.
        key = os.getpid(), address if "::" in address else address.partition("://")[0] * ("://" in address)
        if key not in self._filesystems:
            self._filesystems[key] = fsspec.url_to_fs(address)[0]
        return self._filesystems[key]

    def _read(self, shard: str, start: int, stop: int) -> bytes:
        return read_range(self._filesystem(shard), shard, start, stop)

    def _find(self, path: str, source: int) -> None:
        """Find the shards that a path stands for."""
        found: dict[str, str] = {}
        addresses = _expand(path)
        for address in addresses:
            filesystem, root = fsspec.url_to_fs(address)
            for shard in _find(filesystem, root):
                if shard != root and (reason := _no_file(filesystem, shard)):
                    self.skipped.append(SkippedSample("", shard, reason))
                elif _without_query(shard).lower().endswith(tuple(COMPRESSIONS)):
                    found.setdefault(os.fspath(unpack(filesystem, shard)), "")
                else:
                    found.setdefault(shard, address)
        if not found:
            filesystem, root = fsspec.url_to_fs(addresses[0])
            cause = "nothing there ends in .tar" if filesystem.exists(root) else "the folder does not exist"
            cause = "; ".join(f"{each.shard}: {each.reason}" for each in self.skipped[:3]) or cause
            raise UserError(
                f"No shards (*.tar) in '{path}': {cause}; write them by `{self._command}`, or correct the path."
            )
        for shard, address in found.items():
            self._addresses.setdefault(shard, address or shard)
            self.sources.setdefault(shard, source)

    def _load_indices(self) -> dict[str, dict[str, Any]]:
        """Return the index of each shard; make those that are missing. A shard that is no tar has no samples."""
        shards = list(self._addresses)
        indices: dict[str, dict[str, Any]] = {}
        is_remote = any("://" in address for address in self._addresses.values())
        with ThreadPoolExecutor(_THREADS if is_remote else 1) as pool:
            loaded = pool.map(lambda shard: load_index(self._filesystem(shard), shard), shards)
            indices = {shard: index for shard, index in zip(shards, loaded, strict=True) if index is not None}
            missing = [shard for shard in shards if shard not in indices]
            if missing:
                made = pool.map(self._make_index, missing)
                indices |= zip(missing, ProgressBar(made, "indexing shards", len(missing), unit="shard"), strict=True)
        errors = [index["error"] for index in indices.values() if "error" in index]
        if len(errors) == len(shards):
            raise errors[0]
        return {shard: indices[shard] for shard in shards}

    def _make_index(self, shard: str) -> dict[str, Any]:
        try:
            return make_index(self._filesystem(shard), shard)
        except UserError as error:
            reason = str(error).removeprefix(f"'{shard}' is ").partition(": ")[0]
            return {"samples": {}, "skipped": [("", reason)], "error": error}

    def _check_ranges(self, indices: dict[str, dict[str, Any]]) -> None:
        """Read one byte of the first remote shard, since some servers return whole files instead of parts."""
        for shard, index in indices.items():
            if "://" in self._addresses[shard] and index["samples"]:
                offset, size = next(iter(next(iter(index["samples"].values()))["members"].values()))
                self._read(shard, offset, offset + min(size, 1))
                return


class ShardWriter:
    """Writes samples into numbered shards; a shard gets its name only when it is complete.

    An incomplete shard is removed if the context ends in an exception. A key that the shard already contains starts the
    next shard.

    Args:
        folder: Folder for the shards; created if it does not exist.
        samples_per_shard: Largest number of samples in a shard.
        prefix: First part of the shards' names.
        first: Number of the first shard.

    Attributes:
        samples: Number of samples written so far.
        shards: Number of the next shard to complete.
        complete: Number of samples in the complete shards.
    """

    def __init__(
        self, folder: str | Path, samples_per_shard: int = 1000, prefix: str = "shard", first: int = 0
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard} must be at least 1.")
        self.folder, self.samples_per_shard, self.prefix = Path(folder), samples_per_shard, prefix
        self.samples = self.complete = 0
        self.shards = first
        self._keys: set[str] = set()
        self._tar: Any = None
        self._shard = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        else:  # `atomic_path` removes the incomplete shard
            self._tar = None
            self._shard.__exit__(kind, error, traceback)

    def write(self, sample: dict[str, Any]) -> None:
        """Write one sample.

        Args:
            sample: The key as `__key__`, and the members by their extension: bytes, `str` for txt, a dictionary for
                json, an array for npy.

        Raises:
            ValueError: If the key is empty or contains a dot.
        """
        key = sample["__key__"]
        if not key or "." in key.rsplit("/", 1)[-1]:
            raise ValueError(
                f"key {key!r} must not be empty or contain a dot: what follows the first dot is the member's extension"
            )
        if key in self._keys:
            self._close()
        if self._tar is None:
            self._open()
        self._tar.write(sample)
        self._keys.add(key)
        self.samples += 1
        if len(self._keys) == self.samples_per_shard:
            self._close()

    def _open(self) -> None:
        from webdataset.writer import TarWriter  # takes seconds to import, and only writing needs it

        self._path = self.folder / f"{self.prefix}-{self.shards:06d}.tar"
        temporary = self._shard.enter_context(atomic_path(self._path))
        file = self._shard.enter_context(temporary.open("wb"))
        self._tar = TarWriter(file, mtime=0)  # equal samples give equal bytes
        self._shard.callback(self._tar.close)

    def _close(self) -> None:
        """Complete the open shard, if any, and index it."""
        if self._tar is None:
            return
        self._tar = None
        self._keys.clear()
        self._shard.close()
        make_index(*fsspec.url_to_fs(str(self._path)))
        self.shards += 1
        self.complete = self.samples


def _members(entry: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {extension: (offset, size) for extension, (offset, size) in entry.items()}


def _expand(path: str) -> list[str]:
    """Return the addresses that a path with `::` and braces stands for, after a check that fsspec opens them.

    A path that exists is one. `::` joins several, as in WebDataset, but not the parts of fsspec's `simplecache::s3://…`.
    """
    if Path(path).exists():
        return [path]
    parts: list[str] = []
    for part in path.split("::"):
        if parts and parts[-1].partition("://")[0] in _CHAINED:
            parts[-1] += f"::{part}"
        else:
            parts.append(part)
    try:
        addresses = [each for part in parts for each in (braceexpand(part) if "{" in part else [part])]
        for address in {address.partition("://")[0]: address for address in addresses}.values():
            fsspec.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"Cannot open '{path}' ({error}): install the package, or correct the address.") from error
    return addresses


def _find(filesystem: AbstractFileSystem, root: str) -> list[str]:
    """Return the shards that a path without braces stands for; one tar is returned without a check that it exists."""
    is_folder = _no_file(filesystem, root) == _FOLDER  # it may be called clips.tar
    is_one = is_shard(root) and not is_folder
    if is_one and (not glob.has_magic(_without_query(root)) or with_retries(filesystem.isfile, root)):
        return [root]
    pattern = f"{glob.escape(root.rstrip('/'))}/*" if with_retries(filesystem.isdir, root) else root
    found = [path for path in with_retries(filesystem.glob, pattern) if is_shard(path) and not _is_hidden(path)]
    ends = {path: _end(path) for path in found}
    stems = {_without_query(path).removesuffix(end) for path, end in ends.items() if end.lower() == ".tar"}
    return sorted(
        path
        for path, end in ends.items()
        if end.lower() == ".tar" or _without_query(path).removesuffix(end) not in stems
    )


def _end(address: str) -> str:
    """Return the end of a shard's name that makes it a shard, as it is written."""
    name = _without_query(address)
    return name[-max(len(suffix) for suffix in SHARD_SUFFIXES if name.lower().endswith(suffix)) :]


def _no_file(filesystem: AbstractFileSystem, path: str) -> str:
    """Return why a local path is no file that can be read, or an empty string; remote ones are not checked."""
    if not isinstance(filesystem, LocalFileSystem) or Path(path).is_file():
        return ""
    if Path(path).is_dir():
        return _FOLDER
    return "it is a link to nothing" if Path(path).is_symlink() else "it is no file"


def is_shard(name: str) -> bool:
    """Return whether a file is a shard by its name."""
    return _without_query(name).lower().endswith(SHARD_SUFFIXES)


def _is_hidden(address: str) -> bool:
    return _without_query(address).rpartition("/")[2].startswith(".")


def _without_query(address: str) -> str:
    """Return an address without the query of a URL."""
    return address.partition("?")[0] if "://" in address else address
