"""Compressed tars, unpacked once into the user's cache folder, since no part of them can be read by offset."""

import hashlib
import json
import shutil
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.compression import compr

from data.index.remote import with_retries
from data.index.store import cache_folder, dates
from data.progress import ProgressBar
from t2v.errors import UserError
from t2v.files import atomic_path

COMPRESSIONS = {
    ".tgz": "gzip",
    ".tar.gz": "gzip",
    ".tbz2": "bz2",
    ".tar.bz2": "bz2",
    ".txz": "xz",
    ".tar.xz": "xz",
    ".tar.zst": "zstd",
}
"""Compression by the end of the name, as fsspec calls it."""


def _folder() -> Path:
    return cache_folder() / "tars"


def is_unpacked(shard: str) -> bool:
    """Return whether a shard is the unpacked copy of a compressed tar."""
    return Path(shard).is_relative_to(_folder())


def unpack(filesystem: AbstractFileSystem, shard: str) -> Path:
    """Return the path of the unpacked copy of a compressed tar; it is made if there is none, or the tar has changed.

    Args:
        filesystem: The file system of the shard.
        shard: Path of the compressed tar in it.

    Raises:
        FileNotFoundError: If there is no such shard.
        UserError: If it cannot be unpacked, or there is no space.
    """
    info = with_retries(filesystem.info, shard)
    name = shard.partition("?")[0].rpartition("/")[2]
    suffix = next(suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix))
    compression = COMPRESSIONS[suffix]
    if compression not in compr:
        raise UserError(f"'{shard}' is compressed by {compression}: unpack it, or install the package zstandard.")
    tar = json.dumps([filesystem.unstrip_protocol(info["name"]), info["size"], dates(info)])
    key = hashlib.sha256(tar.encode()).hexdigest()[:16]
    path = _folder() / key / f"{name[: -len(suffix)]}.tar"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_path(path) as temporary,
            with_retries(filesystem.open, shard) as compressed,
            compr[compression](compressed, mode="rb") as content,
            temporary.open("wb") as file,
            ProgressBar.wrapattr(file, "write", desc=f"unpacking {name}", leave=False) as out,
        ):
            shutil.copyfileobj(content, out, 2**20)
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"'{shard}' cannot be unpacked into '{path.parent}' ({error.strerror}): set XDG_CACHE_HOME to a folder "
                "on another disk, or unpack it yourself."
            ) from error
        raise UserError(f"'{shard}' is truncated or damaged ({error}): copy it again.") from error
    return path
