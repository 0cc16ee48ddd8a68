"""Length, frame rate and size of an mp4 inside a tar, read without its pictures.

An mp4 is a sequence of boxes, each with a header of its length and kind. `moov` describes the video, `mdat` holds the
pictures; either may come first. See ISO/IEC 14496-12.
"""

import io
import struct
from contextlib import suppress
from io import BufferedIOBase
from typing import Any

from data.index.remote import read_at
from t2v.video import DecodeError, VideoInfo, probe

_MAX_BOXES = 64
"""Boxes to look at in search of the description."""
_MAX_DESCRIPTION = 2**24
"""Bytes of a description that are read at once: that of some hours of video."""
_BLOCK, _LARGE_BLOCK = 2**13, 2**20
"""Bytes of one read of the description, and of a whole video."""
_SELF_DESCRIBED = (b"avcC", b"hvcC", b"av1C")
"""Codecs (H.264, H.265, AV1) whose parameters are in the description; others have them in the first picture."""


def probe_mp4(file: BufferedIOBase, offset: int, size: int) -> VideoInfo:
    """Return what the head of an mp4 states, after reading as little of it as possible.

    Args:
        file: The file that contains the mp4.
        offset: Where it starts, in bytes.
        size: Its size in bytes.

    Raises:
        DecodeError: If it is not a video.
    """
    known = _describe(file, offset, size)
    if known:
        with suppress(DecodeError):
            return probe(io.BufferedReader(_Window(file, offset, size, known), _BLOCK))
    return probe(io.BufferedReader(_Window(file, offset, size), _LARGE_BLOCK))


class _Window(io.RawIOBase):
    """A part of a file, opened for reading; its memory does not grow with the size of the part.

    Args:
        file: The file.
        offset: Where the part starts, in bytes.
        size: Its size in bytes.
        known: Contents by their position in the part, to read zeros everywhere else; None to read the file.
    """

    def __init__(self, file: BufferedIOBase, offset: int, size: int, known: dict[int, bytes] | None = None) -> None:
        self._file, self._offset, self._size, self._known = file, offset, size, known
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = min(start + len(buffer), self._size)
        if stop <= start:
            return 0
        if self._known is None:
            content = read_at(self._file, self._offset + start, stop - start)
        else:
            zeros = bytearray(stop - start)
            for at, part in self._known.items():
                first, last = max(start, at), min(stop, at + len(part))
                if first < last:
                    zeros[first - start : last - start] = part[first - at : last - at]
            content = bytes(zeros)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _describe(file: BufferedIOBase, offset: int, size: int) -> dict[int, bytes]:
    """Return the mp4 without its pictures, as contents by position; empty if all must be read to describe it."""
    known: dict[int, bytes] = {}
    kinds: set[bytes] = set()
    position = 0
    for _ in range(_MAX_BOXES):
        header = read_at(file, offset + position, min(16, size - position))
        if len(header) < 16:
            break
        length, kind = _parse_header(header, size - position)
        if kind in (b"moov", b"mdat") and length > size - position:
            raise DecodeError(f"it is truncated: it has {size} of {position + length} bytes")
        if not 8 <= length <= size - position or kind == b"moof":  # damaged, or in fragments
            break
        is_known = kind in (b"ftyp", b"moov") and length <= _MAX_DESCRIPTION
        known[position] = read_at(file, offset + position, length) if is_known else header
        kinds.add(kind)
        position += length
        if {b"moov", b"mdat"} <= kinds:
            return known if any(name in part for name in _SELF_DESCRIBED for part in known.values()) else {}
    return {}


def _parse_header(header: bytes, remaining: int) -> tuple[int, bytes]:
    """Return the length of a box, header included, and its kind."""
    length, kind, long_length = struct.unpack(">I4sQ", header)
    if length == 0:  # up to the end of the file
        return remaining, kind
    return (long_length if length == 1 else length), kind
