"""Shards: WebDataset tar files, written whole or not at all, and read by offset.

A sample is a run of tar members with one key: `KEY.mp4`, `KEY.txt`, `KEY.json`, as `video2dataset` writes them, or
`KEY.tokens.npy`, `KEY.text.npy`, … . Beside `shard-000000.tar` lies `shard-000000.index.json`: where each member
stands, and how long and how large each clip is. Shards made elsewhere get their index by one scan of the tar headers.
"""

import glob
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from tqdm import tqdm

from t2v.errors import UserError
from t2v.video import DecodeError, probe

_INDEX_VERSION = 1


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


class ShardSet:
    """The samples of a set of shards.

    Args:
        path: a folder of shards, one tar, or a pattern such as `clips/shard-00*.tar`; a local path or any address that
            fsspec knows.

    Attributes:
        samples: every sample, shard after shard in the order of their names.

    Raises:
        UserError: where there is no shard, or one cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        self.filesystem, root = fsspec.url_to_fs(self.path)
        shards = _find(self.filesystem, root)
        if not shards:
            raise UserError(
                f"No shards (*.tar) in '{self.path}': "
                + ("the folder does not exist" if not self.filesystem.exists(root) else "nothing there ends in .tar")
                + "; make them with `python -m data.prepare`, or correct the path."
            )
        indices = {shard: index for shard in shards if (index := _stored_index(self.filesystem, shard)) is not None}
        if missing := [shard for shard in shards if shard not in indices]:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                made = pool.map(_make_index, repeat(self.filesystem), missing)
                indices |= zip(missing, tqdm(made, "indexing shards", len(missing), unit="shard"), strict=True)
        self.samples = [
            Sample(key, shard, {name: (at, size) for name, (at, size) in entry.pop("members").items()}, **entry)
            for shard in shards
            for key, entry in indices[shard]["samples"].items()
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: Sample, *extensions: str) -> dict[str, bytes]:
        """Read members of a sample, in one request.

        Args:
            sample: one of `samples`.
            extensions: which members, such as "mp4"; those the sample does not have are left out.

        Returns:
            The members' bytes by their extension.
        """
        places = {extension: sample.members[extension] for extension in extensions if extension in sample.members}
        if not places:
            return {}
        start = min(offset for offset, _ in places.values())
        stop = max(offset + size for offset, size in places.values())
        content = self.filesystem.cat_file(sample.shard, start, stop)
        return {name: content[offset - start : offset - start + size] for name, (offset, size) in places.items()}


class ShardWriter:
    """Write samples into numbered shards; a shard appears under its name only when it is complete.

    A shard that is not complete when the context ends in an exception is thrown away.

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
        if self._tar is None:
            self._open()
        self._tar.write(sample)
        self.samples += 1
        if self.samples % self.samples_per_shard == 0:
            self._close(keep=True)

    def _open(self) -> None:
        from webdataset.writer import TarWriter  # takes seconds to import, and only writing needs it

        name = f"{self.prefix}-{self.samples // self.samples_per_shard:06d}.tar"
        self._path = self.folder / name
        self._partial = self.folder / f".{name}.{os.getpid()}.partial"
        self._file = self._partial.open("wb")
        self._tar = TarWriter(self._file, mtime=0)  # the same samples make the same bytes

    def _close(self, keep: bool) -> None:
        tar, self._tar = self._tar, None
        try:
            tar.close()
            self._file.close()
            if keep:
                self._partial.replace(self._path)
                _make_index(*fsspec.url_to_fs(str(self._path)))
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def _find(filesystem: AbstractFileSystem, root: str) -> list[str]:
    if filesystem.isfile(root):
        return [root] if root.endswith(".tar") else []
    pattern = f"{glob.escape(root)}/*.tar" if filesystem.isdir(root) else root
    return sorted(path for path in filesystem.glob(pattern) if path.endswith(".tar"))


def _index_path(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.json"


def _stored_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any] | None:
    """The index beside a shard, or None where it is missing, not ours, or not of this tar."""
    path = _index_path(shard)
    try:
        index = json.loads(filesystem.cat_file(path))
        if index["version"] != _INDEX_VERSION or index["tar_size"] != filesystem.size(shard):
            return None
        older = filesystem.modified(path) < filesystem.modified(shard)
    except NotImplementedError:  # a file system without dates
        older = False
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if older else index


def _make_index(filesystem: AbstractFileSystem, shard: str) -> dict[str, Any]:
    """Scan a shard and store its index beside it where that can be written."""
    try:
        with filesystem.open(shard, "rb") as file:
            index = {
                "version": _INDEX_VERSION,
                "tar_size": filesystem.size(shard),
                "samples": _scan(file),
            }
    except tarfile.TarError as error:
        raise UserError(f"'{shard}' is not a tar file, or it is cut short ({error}): make or copy it again.") from error
    path = _index_path(shard)
    partial = f"{path}.{os.getpid()}.partial"
    with suppress(OSError):  # read-only: the index then lives in memory
        filesystem.pipe_file(partial, json.dumps(index).encode())
        filesystem.mv(partial, path)
    return index


def _scan(file: Any) -> dict[str, dict[str, Any]]:
    """Members of every sample of an open tar, and what its video or its tokens are like."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not (member.isfile() and stem and extension):
                continue
            entry = samples.setdefault(f"{folder}/{stem}" if folder else stem, {"members": {}})
            entry["members"][extension] = (member.offset_data, member.size)
    for entry in samples.values():
        if place := entry["members"].get("mp4"):
            with suppress(DecodeError):
                entry.update(probe(_read_at(file, *place))._asdict())
        elif place := entry["members"].get("tokens.npy"):
            with suppress(ValueError):
                frames, height, width = _npy_shape(_read_at(file, place[0], min(place[1], 1024)))
                entry.update(frames=frames, height=height, width=width)
    return samples


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _npy_shape(head: bytes) -> tuple[int, ...]:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]
