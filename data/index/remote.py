"""Reads of local and remote files, repeated if they fail for a moment."""

import io
import time
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

_WAITS = (0.25, 1.0, 4.0)
"""Seconds to wait before each further attempt."""
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError)
"""Errors that a further attempt would not change."""

T = TypeVar("T")


def with_retries(function: Callable[..., T], *args: Any) -> T:
    """Call a method of a file system, up to four times if it fails for a moment.

    Written by hand, since with tenacity it is as long and one dependency more.

    Args:
        function: A method of the file system.
        args: Its arguments; the first is a path.

    Raises:
        OSError: If a further attempt would not help, or the last attempt failed as well.
    """
    for wait in (*_WAITS, None):
        try:
            return function(*args)
        except _PERMANENT:
            raise
        except Exception as error:  # each file system's library has its own errors
            if wait is None:
                message = str(error) or repr(error)
                raise OSError(f"cannot read '{args[0]}' after {len(_WAITS) + 1} attempts: {message}") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def read_range(filesystem: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    """Return the bytes of a file from offset `start` up to `stop`.

    Raises:
        OSError: If the file cannot be read, or the file system returns another number of bytes.
    """
    content: bytes = with_retries(filesystem.cat_file, path, start, stop)
    if len(content) != stop - start:
        cause = "it has become shorter" if len(content) < stop - start else "its server does not serve parts of files"
        raise OSError(f"'{path}' returned {len(content)} bytes instead of {stop - start}: {cause}")
    return content


def read_at(file: BufferedIOBase, offset: int, size: int) -> bytes:
    """Return up to `size` bytes of an open file from an offset."""
    file.seek(offset)
    return file.read(size)


class RemoteFile(io.RawIOBase):
    """A file opened for reading, of which only the parts that are read are fetched.

    Args:
        filesystem: The file system.
        path: Path of the file in it.
        size: Size of the file in bytes.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str, size: int) -> None:
        self.filesystem, self.path, self.size = filesystem, path, size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size)
        if stop <= self.position:
            return 0
        content = read_range(self.filesystem, self.path, self.position, stop)
        buffer[: len(content)] = content
        self.position = stop
        return len(content)
