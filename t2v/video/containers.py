"""What the header of a file says about the shape of the picture, which FFmpeg's Python binding does not report.

- mp4 and mov: the clean aperture (`clap`) and the display matrix (`tkhd`) of the first video track; ISO/IEC 14496-12.
- Matroska and webm: `PixelCrop…` and `ProjectionPoseRoll` of the first video track; RFC 9559.
"""

import struct
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

_MAX_HEADER = 2**26
"""Largest description in bytes that is searched."""
_MATROSKA_PARENTS = {0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x7670}
"""Segment, Tracks, TrackEntry, Video, Projection."""
_PIXEL_CROP = {0x54CC: 0, 0x54BB: 1, 0x54DD: 2, 0x54AA: 3}
_TRACK, _TRACK_TYPE, _CLUSTER, _POSE_ROLL = 0xAE, 0x83, 0x1F43B675, 0x7675


class Shape(NamedTuple):
    """How a container shows the pictures of its first video track.

    Attributes:
        crop: Pixels not to show, at the left, top, right and bottom of the stored picture.
        turned: Whether the picture is shown turned by a quarter, so that height and width are exchanged.
        plain: Whether the display matrix neither turns nor mirrors the picture.
    """

    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    turned: bool = False
    plain: bool = True


def read_shape(file: BufferedIOBase, container: str) -> Shape:
    """Return how a container shows its pictures.

    Args:
        file: The file; its position changes.
        container: FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2".
    """
    try:
        if "mp4" in container:
            return _read_mp4(file)
        if "matroska" in container:
            return _read_matroska(file)
    except (struct.error, IndexError, StopIteration, ZeroDivisionError):  # damaged: FFmpeg reports what matters of it
        pass
    return Shape()


def _read_mp4(file: BufferedIOBase) -> Shape:
    for kind, start, size in _boxes_of_file(file):
        if kind == b"moov" and size <= _MAX_HEADER:
            file.seek(start)
            moov = file.read(size)
            for track in _find(moov, b"trak"):
                if any(handler[8:12] == b"vide" for handler in _find(track, b"mdia", b"hdlr")):
                    return _shape_of_track(track)
    return Shape()


def _shape_of_track(track: bytes) -> Shape:
    crop, a, b = (0, 0, 0, 0), 1, 0
    matrix: tuple[int, ...] = (1, 0, 0, 0, 1)
    for header in _find(track, b"tkhd"):
        matrix = struct.unpack_from(">5i", header, 52 if header[0] == 1 else 40)
        a, b = abs(matrix[0]), abs(matrix[1])
    for table in _find(track, b"mdia", b"minf", b"stbl", b"stsd"):
        entry = next(mp4_boxes(table, 8))[1]
        width, height = struct.unpack_from(">2H", entry, 24)
        for box in (content for kind, content in mp4_boxes(entry, 78) if kind == b"clap"):
            wide, wide_by, high, high_by, x, x_by, y, y_by = struct.unpack(">2I2IiIiI", box[:32])
            left, top = x / x_by + (width - wide / wide_by) / 2, y / y_by + (height - high / high_by) / 2
            sides = left, top, width - left - wide / wide_by, height - top - high / high_by
            crop = tuple(max(0, round(side)) for side in sides)  # type: ignore[assignment]
    return Shape(crop, b > a, matrix[0] > 0 and matrix[4] > 0 and not (matrix[1] or matrix[3]))


def _boxes_of_file(file: BufferedIOBase) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and size of the content of each box of a file."""
    position = 0
    while True:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return
        size, kind = struct.unpack_from(">I4s", header)
        start = 8
        if size == 1 and len(header) == 16:
            size, start = struct.unpack_from(">Q", header, 8)[0], 16
        if size < start:
            return
        yield kind, position + start, size - start
        position += size


def mp4_boxes(content: bytes, position: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each box of an mp4 file (ISO/IEC 14496-12) from a position in bytes, up to damage."""
    while position + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        if size < 8:
            return
        yield kind, content[position + 8 : position + size]
        position += size


def _find(content: bytes, *path: bytes) -> Iterator[bytes]:
    """Yield the contents of the boxes at a path."""
    for kind, inner in mp4_boxes(content):
        if kind == path[0]:
            if len(path) == 1:
                yield inner
            else:
                yield from _find(inner, *path[1:])


def _read_matroska(file: BufferedIOBase) -> Shape:
    crop, roll, is_video = [0, 0, 0, 0], 0.0, False
    position = 0
    while True:
        file.seek(position)
        header = file.read(12)
        if not header:
            break
        identifier, id_length = _number(header, keep_marker=True)
        size, size_length = _number(header[id_length:])
        start = position + id_length + size_length
        if identifier == _CLUSTER or (identifier == _TRACK and is_video):
            break
        if identifier in _MATROSKA_PARENTS:
            position = start
            continue
        if identifier in (_TRACK_TYPE, _POSE_ROLL) or identifier in _PIXEL_CROP:
            file.seek(start)
            value = file.read(min(size, 8))
            number = int.from_bytes(value, "big")
            if identifier == _TRACK_TYPE:
                is_video = number == 1
            elif is_video and identifier == _POSE_ROLL:
                roll = struct.unpack(">d" if size == 8 else ">f", value)[0]
            elif is_video:
                crop[_PIXEL_CROP[identifier]] = number
        position = start + size
    left, top, right, bottom = crop
    return Shape((left, top, right, bottom), round(roll / 90) % 2 == 1, roll == 0)


def _number(header: bytes, keep_marker: bool = False) -> tuple[int, int]:
    """Return a variable-length number of EBML and its length in bytes."""
    length = 9 - header[0].bit_length()
    value = int.from_bytes(header[:length], "big")
    return (value if keep_marker else value & ((1 << 7 * length) - 1)), length
