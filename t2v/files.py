"""Atomic writes, by which a file or folder appears under its name complete or not at all; locks of folders; hashes."""

import errno
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path

from t2v.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""Name of the file on which the lock of a folder is."""


@contextmanager
def atomic_path(path: str | Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` when the context ends.

    What is written under the temporary path, a file or a folder, is synced to disk before the rename, so that `path`
    never names an incomplete file, not even after a power failure. If the context ends by an exception, the temporary
    path is removed and an older `path` stays as it is. The temporary path keeps the suffix of `path` and contains the
    process id, so that processes do not write to each other's.

    Args:
        path: The file or folder to write. Its folder must exist. A file replaces an older file or link; a folder
            replaces an empty one, also where a link leads.
        keep_existing: Whether a folder that another process has written meanwhile stays in place of this one, as in a
            cache, where both are equal; by default it is an error.

    Raises:
        OSError: If the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    if path.is_symlink() and not path.is_file():  # a link to a folder, which a folder cannot replace
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    remove(temporary)
    try:
        yield temporary
        sync(temporary)
        try:
            temporary.replace(path)
        except OSError as error:
            if not keep_existing or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(path.parent)
    finally:
        remove(temporary)


def is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder, or in the nearest folder above it if it does not exist."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


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


@contextmanager
def locked(folder: Path, advice: str = "choose another folder") -> Iterator[None]:
    """Create a folder and lock it against other processes.

    The lock is one of the operating system's on a file in the folder, so it ends with the process that holds it,
    however that ends. It also holds between the machines of a network file system that supports it; where a folder
    cannot be locked, a warning says so.

    Args:
        folder: The folder.
        advice: What else to do if another process has locked it.

    Raises:
        UserError: If another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _open_locked(path, advice)
    try:
        yield
    finally:
        if _is_at(path, file):
            path.unlink()
        file.close()


def _open_locked(path: Path, advice: str) -> TextIOWrapper:
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read()
            file.close()
            who = _holder(holder)
            raise UserError(
                f"Another run is writing to {path.parent} ({who}): wait until it ends, stop it, or {advice}."
            ) from None
        except OSError as error:
            message = f"{path.parent} cannot be locked ({error.strerror}): start only one run in it at a time."
            warnings.warn(message, stacklevel=4)
            return file
        if _is_at(path, file):
            break
        file.close()  # its holder has just removed it
    file.truncate(0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}))
    file.flush()
    return file


def _is_at(path: Path, file: TextIOWrapper) -> bool:
    """Return whether a path is that of an open file, which may have been removed and written anew."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _holder(stored: str) -> str:
    try:
        found = json.loads(stored)
        return f"process {found['process']} on {found['host']}, since {found['started']}"
    except (ValueError, KeyError):  # it is being written
        return "another process"
