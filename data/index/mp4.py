"""Length, frame rate and size of an mp4 inside a tar, read without its pictures.

An mp4 is a sequence of boxes, each with a header of its length and kind. `moov` describes the video, `mdat` holds the
pictures; either may come first. See ISO/IEC 14496-12.

FFmpeg takes a millisecond to open a video. So it is asked once for the size of all videos of the same coding, and the
length and rate of a video of constant rate are read from its tables; FFmpeg reads every other video.
"""

import io
import struct
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from io import BufferedIOBase
from itertools import chain, islice, repeat
from typing import Any

from data.index.remote import read_at
from t2v.video import DecodeError, VideoInfo, mp4_boxes, probe

_MAX_BOXES = 64
"""Boxes to look at in search of the description."""
_MAX_DESCRIPTION = 2**24
"""Bytes of a description that are read at once: that of some hours of video."""
_BLOCK, _LARGE_BLOCK = 2**13, 2**20
"""Bytes of one read of the description, and of a whole video."""
_SELF_DESCRIBED = (b"avcC", b"hvcC", b"av1C")
"""Codecs (H.264, H.265, AV1) whose parameters are in the description; others have them in the first picture."""
_PARENTS = (b"trak", b"edts", b"mdia", b"minf", b"stbl")
"""Boxes that contain the tables of a track."""
_MAX_FRAMES = 2**20
"""Longest video whose tables are read: some hours."""
_MAX_SIZES = 4096
"""Number of codings whose size is remembered."""
_sizes: dict[bytes, tuple[int, int]] = {}
"""Height and width as shown, by the boxes that determine them."""


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
        coding, length = _read_tables(known, size)
        shape = _sizes.get(coding)
        if length and shape:
            return VideoInfo(*length, *shape)
        with suppress(DecodeError):
            info = probe(io.BufferedReader(_Window(file, offset, size, known), _BLOCK))
            if coding:
                if len(_sizes) >= _MAX_SIZES:
                    _sizes.clear()
                _sizes[coding] = info.height, info.width
            return info
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
            moov = next(part for part in known.values() if part[4:8] == b"moov")
            is_complete = b"mvex" not in moov and any(name in moov for name in _SELF_DESCRIBED)  # mvex: in fragments
            return known if is_complete else {}
    return {}


def _read_tables(known: dict[int, bytes], size: int) -> tuple[bytes, tuple[int, float] | None]:
    """Return what determines the size of a video, and its frames and frames per second.

    Both are empty if the file has not exactly one video track; the second is None if its tables are damaged, or the
    rate or the edit list is not the simplest.
    """
    try:
        moov = next(part[8:] for part in known.values() if part[4:8] == b"moov")
        tracks = [_tables(content) for kind, content in mp4_boxes(moov) if kind == b"trak"]
        (track,) = [tables for tables in tracks if tables[b"hdlr"][8:12] == b"vide"]
        header = next(content for kind, content in mp4_boxes(moov) if kind == b"mvhd")
        coding = _without_bitrate(track[b"stsd"]) + track[b"tkhd"][-44:] + header[-64:-4]  # codec and size; matrices
    except (KeyError, ValueError, StopIteration, RecursionError):
        return b"", None
    try:
        return coding, _length(track, _timescale(header), size)
    except (ArithmeticError, LookupError, ValueError, struct.error):
        return coding, None


def _without_bitrate(codec: bytes) -> bytes:
    """Return the description of a codec without its box for the bit rate, which differs from video to video."""
    start = codec.find(b"btrt")
    return codec if start < 0 else codec[:start] + codec[start + 16 :]


def _tables(track: bytes) -> dict[bytes, bytes]:
    """Return the boxes of a track by their kind; the first of each kind."""
    tables: dict[bytes, bytes] = {}
    _collect(track, tables)
    return tables


def _collect(parent: bytes, tables: dict[bytes, bytes]) -> None:
    for kind, content in mp4_boxes(parent):
        tables.setdefault(kind, content)
        if kind in _PARENTS:
            _collect(content, tables)


def _length(track: dict[bytes, bytes], movie_scale: int, size: int) -> tuple[int, float] | None:
    """Return frames and frames per second of a track that shows all its frames, at a constant rate; otherwise None."""
    head = track[b"mdhd"]
    scale, duration = _timescale(head), struct.unpack_from(*((">Q", head, 24) if head[0] else (">I", head, 16)))[0]
    runs, frames, step = struct.unpack_from(">3I", track[b"stts"], 4)
    if runs != 1 or frames > _MAX_FRAMES or not _has_places(track, frames, size):
        return None
    first, last = 0, (frames - 1) * step
    if b"ctts" in track:
        rows = _rows(track[b"ctts"], ">2I")
        if track[b"ctts"][0] or sum(count for count, _ in rows) != frames:  # with negative delays, or damaged
            return None
        delays = chain.from_iterable(repeat(delay, count) for count, delay in rows)
        times = [number * step + delay for number, delay in enumerate(delays)]
        first, last = min(times), max(times)
    if b"elst" in track:
        layout = ">IQqI" if track[b"elst"][0] else ">IIiI"
        edits, shown, start, speed = struct.unpack_from(layout, track[b"elst"], 4)
        length = shown * scale / movie_scale
        if edits != 1 or speed != 2**16 or not start <= first <= last + step / 2 <= start + length:
            return None
        duration = min(duration, length)
    is_even = abs(duration - frames * step) < step / 2
    return (frames, _rate(scale, step)) if is_even else None


@lru_cache
def _rate(scale: int, step: int) -> float:
    """Return the frames per second of frames that take `step` of `scale` units per second, rounded as by `probe`."""
    return 1 / float(1 / Fraction(scale, step))


def _has_places(track: dict[bytes, bytes], frames: int, size: int) -> bool:
    """Return whether each frame has a place in a file of a size, in the order of the table."""
    same, stored = struct.unpack_from(">2I", track[b"stsz"], 4)
    if stored != frames:
        return False
    sizes = iter([same] * frames if same else struct.unpack_from(f">{frames}I", track[b"stsz"], 12))
    offsets = [row[0] for row in (_rows(track[b"stco"], ">I") if b"stco" in track else _rows(track[b"co64"], ">Q"))]
    rows = _rows(track[b"stsc"], ">3I")
    chunks: list[int] = []  # number of frames in each
    for (first, samples, _), end in zip(rows, [*(row[0] for row in rows[1:]), len(offsets) + 1], strict=True):
        if not 0 < end - first <= len(offsets):
            return False
        chunks += [samples] * (end - first)
    if len(chunks) != len(offsets) or sum(chunks) != frames:
        return False
    lengths = [sum(islice(sizes, samples)) for samples in chunks]
    following = [*offsets[1:], size]
    return all(start + length <= end for start, length, end in zip(offsets, lengths, following, strict=True))


def _rows(table: bytes, layout: str) -> list[tuple[int, ...]]:
    """Return the rows of a table of numbers."""
    end = 8 + struct.unpack_from(">I", table, 4)[0] * struct.calcsize(layout)
    if end > len(table):
        raise ValueError("a table is cut off")
    return list(struct.iter_unpack(layout, table[8:end]))


def _timescale(header: bytes) -> int:
    """Return the units per second of an mvhd or mdhd."""
    return int(struct.unpack_from(">I", header, 20 if header[0] else 12)[0])


def _parse_header(header: bytes, remaining: int) -> tuple[int, bytes]:
    """Return the length of a box, header included, and its kind."""
    length, kind, long_length = struct.unpack(">I4sQ", header)
    if length == 0:  # up to the end of the file
        return remaining, kind
    return (long_length if length == 1 else length), kind
