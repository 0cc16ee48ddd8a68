"""Length, frame rate and size of an mp4 inside a tar, read without its pictures.

An mp4 is a sequence of boxes, each with a header of its length and kind. `moov` describes the video, `mdat` holds the
pictures; either may come first. See ISO/IEC 14496-12.
"""

import struct
from contextlib import suppress
from io import BufferedIOBase

from data.index.remote import read_at
from t2v.video import DecodeError, VideoInfo, probe

_MAX_BOXES = 64
"""Boxes to look at in search of the description."""
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
    description = _without_pictures(file, offset, size)
    if description:
        with suppress(DecodeError):
            return probe(description)
    return probe(read_at(file, offset, size))


def _without_pictures(file: BufferedIOBase, offset: int, size: int) -> bytes:
    """Return the mp4 with zeros for its pictures, or nothing if all of it must be read to describe it."""
    content = bytearray(size)
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
        content[position : position + 16] = header
        if kind in (b"ftyp", b"moov"):
            content[position : position + length] = read_at(file, offset + position, length)
        kinds.add(kind)
        position += length
        if {b"moov", b"mdat"} <= kinds:
            return bytes(content) if any(name in content for name in _SELF_DESCRIBED) else b""
    return b""


def _parse_header(header: bytes, remaining: int) -> tuple[int, bytes]:
    """Return the length of a box, header included, and its kind."""
    length, kind, long_length = struct.unpack(">I4sQ", header)
    if length == 0:  # up to the end of the file
        return remaining, kind
    return (long_length if length == 1 else length), kind
