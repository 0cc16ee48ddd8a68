"""The headers of a tar.

Python's tarfile takes 60 µs for a header. So the headers of ordinary files are read directly here, and everything else
is left to tarfile: links, devices, long names, sparse files, and damage.
"""

import re
import tarfile
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

from data.index.remote import read_at

_COMPARED = 90
"""Longest key that is compared with the name in a header; longer names are stored elsewhere."""
_MAX_PAX = 2**12
"""Bytes of an extended header above which it is left to tarfile."""
_CHANGES = re.compile(rb" (path|size|linkpath|hdrcharset|GNU\.)")
"""Keys of an extended header that change the meaning of the next header; others are times and owners."""
_FILE, _PAX = (b"0", b"\0"), b"x"
"""Types of members."""


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    """Its name; bytes that are not UTF-8 are surrogates, as in tarfile."""
    offset: int
    """Where its content begins, in bytes."""
    size: int
    """Bytes of its content."""
    special: tarfile.TarInfo | None
    """Its description by tarfile; None for an ordinary file."""


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int


def read_members(tar: tarfile.TarFile, file: BufferedIOBase) -> Iterator[Member]:
    """Yield the members of a tar in order; `tar.offset` is where the next header should be.

    Args:
        tar: The tar, opened for reading.
        file: The file that it reads.

    Raises:
        tarfile.TarError: If a header is damaged.
    """
    offset = 0
    while True:
        header, start = (None, offset) if tar.pax_headers else _read_ordinary(file, offset)
        if header is None:
            file.seek(0)
            tar.firstmember, tar.offset = None, offset  # type: ignore[attr-defined]
            special = tar.next()
            tar.members.clear()  # type: ignore[attr-defined]
            if special is None:
                return
            offset = tar.offset
            yield Member(special.name, special.offset_data, special.size, special)
        else:
            content = start + tarfile.BLOCKSIZE
            offset = tar.offset = content + _round_up(header.size)
            yield Member(header.name.decode(tar.encoding or "utf-8", tar.errors), content, header.size, None)


def check_header(header: bytes, key: str, size: int) -> None:
    """Check the header before a member that is read at a place known from an index.

    Args:
        header: The block before the member.
        key: Key of its sample.
        size: Its size in bytes.

    Raises:
        ValueError: If it is the header of another member: the tar was changed or damaged after it was indexed.
    """
    name, field = header[:100].rstrip(b"\0"), header[124:136]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].rstrip(b"\0") + b"/" + name
    try:
        found = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
        same = found == size and (len(key) > _COMPARED or not key.isascii() or name.startswith(key.encode() + b"."))
    except (ValueError, IndexError):
        same = False
    if not same:
        raise ValueError("its shard is no longer the one that was indexed, or is damaged: start again")


def _read_ordinary(file: BufferedIOBase, offset: int) -> tuple[_Header | None, int]:
    """Return the header of the ordinary file at an offset, behind an extended header without effect, and its place."""
    header = _parse(read_at(file, offset, tarfile.BLOCKSIZE))
    if header and header.kind == _PAX and header.size <= _MAX_PAX:
        if _CHANGES.search(file.read(header.size)):
            return None, offset
        offset += tarfile.BLOCKSIZE + _round_up(header.size)
        header = _parse(read_at(file, offset, tarfile.BLOCKSIZE))
    is_ordinary = header and header.kind in _FILE and not header.name.endswith(b"/")
    return (header if is_ordinary else None), offset


def _parse(block: bytes) -> _Header | None:
    """Return what an intact header of the formats ustar and GNU says, or None for all others."""
    magic = block[257:263]
    has_prefix = any(block[345:346])
    if len(block) < tarfile.BLOCKSIZE or not magic.startswith(b"ustar") or (has_prefix and magic != b"ustar\0"):
        return None
    try:
        size, checksum = int(block[124:136].rstrip(b"\0 "), 8), int(block[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" ") or size < 0:
        return None
    name = block[:100].partition(b"\0")[0]
    if has_prefix:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(block[156:157], name, size)


def _round_up(size: int) -> int:
    """Return the bytes that a content takes in a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
