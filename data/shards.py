"""Shards: WebDataset tar files, written whole or not at all, and read by offset.

A sample is a run of tar members with one key: `KEY.mp4`, `KEY.txt`, `KEY.json`, as `video2dataset` writes them, or
`KEY.tokens.npy`, `KEY.text.npy`, … . Beside `shard-000000.tar` lies its index, `shard-000000.index.json`.
"""

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from tqdm import tqdm

from data.index import make_index, patiently, read_range, stored_index
from t2v.errors import UserError

_THREADS = 16
"""Shards that are indexed at a time: over a network it is the waiting that takes long."""
_GAP = 2**20
"""Members of a sample that stand further apart are read in two requests."""


class Sample(NamedTuple):
    """One sample: where it stands, and what its clip is like."""

    key: str
    shard: str
    """Path or address of the tar."""
    members: dict[str, tuple[int, int]]
    """Offset and size in bytes of each member, by its extension."""
    frames: int = 0
    """Frames of the video or of the tokens; 0 where there is neither, or where it does not decode."""
    fps: float = 0.0
    """Frames a second as stored; 0 for tokens."""
    height: int = 0
    """Height in pixels, or in tokens."""
    width: int = 0
    """Width in pixels, or in tokens."""
    reason: str = ""
    """Why the video or the tokens are broken, where `frames` is 0."""


class BadSample(NamedTuple):
    """What cannot be used, and why."""

    key: str
    """Empty where a tar is cut or damaged between two samples: nobody knows which stood there."""
    shard: str
    """Path or address of the tar."""
    reason: str


class ShardSet:
    """The samples of a set of shards.

    It may be used in a process that was forked from the one that made it.

    Args:
        path: a folder of shards, one tar, or a pattern such as `clips/shard-00*.tar` or
            `s3://bucket/clips-{000000..000099}.tar`; a local path or any address that fsspec knows.

    Attributes:
        samples: every sample, shard after shard in the order of their names.
        bad: what is no sample: cut off, a key that comes twice, a member that is a link or whose name leads out of the
            folder. The members are never read.

    Raises:
        UserError: where there is no shard, or one cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        self._filesystems: dict[int, AbstractFileSystem] = {}
        self._addresses = _addresses(self.path)
        try:
            shards, indices = self._open()
        except FileNotFoundError as error:
            raise UserError(
                f"No shards (*.tar) in '{self.path}': there is no {error.filename or error}"
                f"{f' ({error.__cause__})' if error.__cause__ else ''}; make them with `python -m data.prepare`, or "
                "correct the path."
            ) from error
        except OSError as error:
            raise UserError(f"Cannot open the shards in '{self.path}' ({error}): try again, or correct it.") from error
        self.samples = [
            Sample(key, shard, {name: (at, size) for name, (at, size) in entry.pop("members").items()}, **entry)
            for shard in shards
            for key, entry in indices[shard]["samples"].items()
        ]
        self.bad = [BadSample(key, shard, reason) for shard in shards for key, reason in indices[shard]["bad"]]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: Sample, *extensions: str) -> dict[str, bytes]:
        """Read members of a sample, in one request where they stand together.

        Args:
            sample: one of `samples`.
            extensions: which members, such as "mp4"; those the sample does not have are left out.

        Returns:
            The members' bytes by their extension.

        Raises:
            OSError: where the shard cannot be read, or can no longer be.
        """
        places = {extension: sample.members[extension] for extension in extensions if extension in sample.members}
        if not places:
            return {}
        start = min(offset for offset, _ in places.values())
        stop = max(offset + size for offset, size in places.values())
        if stop - start > sum(size for _, size in places.values()) + _GAP:
            return {name: self._read(sample.shard, at, at + size) for name, (at, size) in places.items()}
        content = self._read(sample.shard, start, stop)
        return {name: content[offset - start : offset - start + size] for name, (offset, size) in places.items()}

    @property
    def filesystem(self) -> AbstractFileSystem:
        """Where the shards are: one object a process, as a connection does not survive a fork."""
        process = os.getpid()
        if process not in self._filesystems:  # the parent's one stays: to close it would close the parent's connection
            self._filesystems[process] = fsspec.url_to_fs(self._addresses[0])[0]
        return self._filesystems[process]

    def _read(self, shard: str, start: int, stop: int) -> bytes:
        return read_range(self.filesystem, shard, start, stop)

    def _open(self) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """The shards' names in order, and their indices."""
        roots = [fsspec.url_to_fs(address)[1] for address in self._addresses]
        shards = list(dict.fromkeys(shard for root in roots for shard in _find(self.filesystem, root)))
        if not shards:
            raise UserError(
                f"No shards (*.tar) in '{self.path}': "
                + ("nothing there ends in .tar" if self.filesystem.exists(roots[0]) else "the folder does not exist")
                + "; make them with `python -m data.prepare`, or correct the path."
            )
        with ThreadPoolExecutor(_THREADS) as pool:
            indices = dict(zip(shards, pool.map(stored_index, repeat(self.filesystem), shards), strict=True))
            if missing := [shard for shard in shards if indices[shard] is None]:
                made = pool.map(make_index, repeat(self.filesystem), missing)
                indices |= zip(missing, tqdm(made, "indexing shards", len(missing), unit="shard"), strict=True)
        return shards, indices  # type: ignore[return-value]


class ShardWriter:
    """Write samples into numbered shards; a shard appears under its name only when it is complete.

    A shard that is not complete when the context ends in an exception is thrown away. A key that the shard has already
    begins the next one.

    Args:
        folder: where the shards go; made where it is missing.
        samples_per_shard: the size at which the next shard begins.
        prefix: what the shards' names begin with.

    Attributes:
        samples: number of samples written so far.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000, prefix: str = "shard") -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard} must be at least 1.")
        self.folder, self.samples_per_shard, self.prefix = Path(folder), samples_per_shard, prefix
        self.samples = 0
        self._shards = 0
        self._keys: set[str] = set()
        self._tar: Any = None

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tar is not None:
            self._close(keep=kind is None)

    def write(self, sample: dict[str, Any]) -> None:
        """Write one sample.

        Args:
            sample: the key under `__key__`, and the members by their extension: bytes, `str` for txt, a dictionary for
                json, an array for npy.
        """
        key = sample["__key__"]
        if not key or "." in key.rsplit("/", 1)[-1]:
            raise ValueError(
                f"key {key!r} must not be empty or have a dot: what follows the first dot is the member's name"
            )
        if key in self._keys:
            self._close(keep=True)
        if self._tar is None:
            self._open()
        self._tar.write(sample)
        self._keys.add(key)
        self.samples += 1
        if len(self._keys) == self.samples_per_shard:
            self._close(keep=True)

    def _open(self) -> None:
        from webdataset.writer import TarWriter  # takes seconds to import, and only writing needs it

        name = f"{self.prefix}-{self._shards:06d}.tar"
        self._path = self.folder / name
        self._partial = self.folder / f".{name}.{os.getpid()}.partial"
        self._file = self._partial.open("wb")
        self._tar = TarWriter(self._file, mtime=0)  # the same samples make the same bytes

    def _close(self, keep: bool) -> None:
        tar, self._tar = self._tar, None
        self._shards += 1
        self._keys.clear()
        try:
            tar.close()
            self._file.close()
            if keep:
                self._partial.replace(self._path)
                make_index(*fsspec.url_to_fs(str(self._path)))
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def _addresses(path: str) -> list[str]:
    """What the braces of a path stand for, all of them in a file system that is there."""
    try:
        addresses = list(braceexpand(path)) if "{" in path else [path]
        fsspec.url_to_fs(addresses[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"Cannot open '{path}' ({error}): install what is missing, or correct the address.") from error
    return addresses


def _find(filesystem: AbstractFileSystem, root: str) -> list[str]:
    """The shards that a path without braces stands for; whether a tar is there shows when its index is asked for."""
    if _is_tar(root) and (not glob.has_magic(_path(root)) or patiently(filesystem.isfile, root)):
        return [root]
    pattern = f"{glob.escape(root.rstrip('/'))}/*.tar" if patiently(filesystem.isdir, root) else root
    return sorted(path for path in patiently(filesystem.glob, pattern) if _is_tar(path))


def _is_tar(address: str) -> bool:
    return _path(address).endswith(".tar")


def _path(address: str) -> str:
    """An address without what the question mark of a URL begins."""
    return address.partition("?")[0] if "://" in address else address
