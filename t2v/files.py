"""Atomic writes, by which a file or folder appears under its name complete or not at all, and hashes of files."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` when the context ends.

    What is written under the temporary path, a file or a folder, is synced to disk before the rename, so that `path`
    never names an incomplete file, not even after a power failure. If the context ends by an exception, the temporary
    path is removed and an older `path` stays as it is. The temporary path keeps the suffix of `path` and contains the
    process id, so that processes do not write to each other's.

    Args:
        path: The file or folder to write. Its folder must exist. A file replaces an older file; a folder replaces an
            empty one.

    Raises:
        OSError: If the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    remove(temporary)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        remove(temporary)


def sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allow_by_umask(path: Path) -> None:
    """Give a file the permissions that a new file has."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or all files of a folder, to disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the system can (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
