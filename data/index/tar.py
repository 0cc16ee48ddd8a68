"""Scan of a tar for the samples in it.

A sample is a run of members with one key; of a video only the description is read. A tar that is truncated, or damaged
in the middle, keeps the samples before that position.
"""

import io
import re
import tarfile
from functools import lru_cache
from io import BufferedIOBase
from typing import Any

import numpy as np

from data.captions import read_captions
from data.index.headers import Member, read_members
from data.index.mp4 import probe_mp4
from data.index.remote import read_at
from data.members import TEXT_EXTENSIONS, VIDEO_EXTENSIONS, find_video

_NPY_HEADER = 1024
"""Bytes to read of an npy file for its shape."""
_OUTSIDE = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^\w:[/\\]")
"""A name that leads out of the folder into which the tar might be unpacked."""
_MAX_TEXT = 2**22
"""Bytes of a txt or json above which it is not read."""


class _Run:
    """Consecutive members with one key.

    Args:
        key: The key; empty if it is not known.

    Attributes:
        members: Offset and size in bytes of each member, by its extension.
        clips: Length and size of each video or of the tokens, by extension; `reason` if they are corrupt.
        texts: Bytes of its txt and json, until `read_texts`.
        captions: Number of its captions.
        flaw: Why its captions cannot be read; empty if they can.
        reason: Why the run is no sample; empty if it is one.
    """

    def __init__(self, key: str, reason: str = "") -> None:
        self.key, self.reason = key, reason
        self.members: dict[str, tuple[int, int]] = {}
        self.clips: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, bytes] = {}
        self.captions, self.flaw = 0, ""

    def read_texts(self) -> None:
        """Count the captions, and forget the texts."""
        names = _plain_names(*self.members)
        try:
            self.captions = len(read_captions({names.get(name, name): text for name, text in self.texts.items()}))
        except ValueError as error:
            self.flaw = self.flaw or str(error)
        self.texts.clear()


def scan_tar(file: BufferedIOBase, size: int) -> dict[str, Any]:
    """Return the samples of a tar, and what is skipped in it.

    Args:
        file: The tar, opened for reading.
        size: Its size in bytes.

    Returns:
        `samples`: For each key the `members` (offset and size by extension), the length and size of the clip, and the
            number of its `captions`, or the `flaw` for which they cannot be read.
        `skipped`: Key and reason of each run of members that is no sample.

    Raises:
        tarfile.TarError: If the file is not a tar.
        OSError: If it cannot be read.
    """
    runs: list[_Run] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        damage = _scan_members(tar, file, size, runs)
        if runs:
            runs[-1].read_texts()
        if damage:
            reason = f"the tar is truncated or damaged at byte {tar.offset} ({damage})"
            if runs and runs[0].members.keys() - runs[-1].members.keys():  # the last run is incomplete
                runs[-1].reason = reason
            else:
                runs.append(_Run("", reason))
    return _merge(runs)


def _scan_members(tar: tarfile.TarFile, file: BufferedIOBase, size: int, runs: list[_Run]) -> str:
    """Append the members of a tar to `runs`; return why the tar ends early, or an empty string."""
    try:
        for member in read_members(tar, file):
            key, extension = _split_name(member.name)
            refusal = _refusal(member)
            if not (extension or refusal) or (member.special and member.special.isdir()):
                continue
            if not runs or runs[-1].key != key or extension in runs[-1].members:
                if runs:
                    runs[-1].read_texts()
                runs.append(_Run(key))
            run = runs[-1]
            run.members[extension] = member.offset, member.size
            run.reason = run.reason or refusal
            is_file = member.special is None or member.special.isfile()
            if is_file and not 0 <= member.size <= size - member.offset:
                run.reason = f"the tar is truncated or damaged in its {extension}"
                return ""
            if not run.reason:
                _describe(file, run, extension, member)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # from damaged headers
        return str(error)
    rest = read_at(file, tar.offset, min(size - tar.offset, 2 * tarfile.RECORDSIZE))
    if rest[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        return "no end mark"
    return "data after its end mark, as if another tar was appended: join tars by tar -A" if any(rest) else ""


def _merge(runs: list[_Run]) -> dict[str, Any]:
    """Join the runs of each key to one sample; a run with a member that its key already has is skipped."""
    merged: dict[str, _Run] = {}
    skipped: list[tuple[str, str]] = []
    for run in runs:
        if run.reason:
            skipped.append((run.key, run.reason))
        elif run.key not in merged:
            merged[run.key] = run
        elif merged[run.key].members.keys() & run.members.keys():
            skipped.append((run.key, "its key occurs twice in the tar"))
        else:
            first = merged[run.key]
            first.members |= run.members
            first.clips |= run.clips
            first.captions, first.flaw = first.captions + run.captions, first.flaw or run.flaw
    samples = {}
    for key, run in merged.items():
        try:
            samples[key] = _make_entry(run)
        except ValueError as error:
            skipped.append((key, str(error)))
    return {"samples": samples, "skipped": skipped}


def _make_entry(run: _Run) -> dict[str, Any]:
    """Return the entry of a sample.

    Raises:
        ValueError: If the sample has several videos.
    """
    clip = run.clips.get("tokens.npy") or run.clips.get(find_video(run.members) or "", {})
    names = _plain_names(*run.members)
    members = {names.get(name, name): where for name, where in run.members.items()}
    return {"members": members, **clip, "captions": run.captions, "flaw": run.flaw}


@lru_cache
def _plain_names(*members: str) -> dict[str, str]:
    """Return what `v2.mp4`, `v2.txt` and `v2.json` are called in a sample that has no other video, txt or json."""
    names = {}
    for kind in (VIDEO_EXTENSIONS, *({name} for name in TEXT_EXTENSIONS)):
        found = [name for name in members if name.rpartition(".")[2] in kind]
        if len(found) == 1 and "." in found[0]:
            names[found[0]] = found[0].rpartition(".")[2]
    return names


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension, in lower case, of a member; without an extension the key is its name.

    As in WebDataset, the extension follows the first dot of the file's name.
    """
    name = name.encode(errors="surrogateescape").decode(errors="replace")
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and extension else (name, "")


def _refusal(member: Member) -> str:
    """Return why a member must not be read, or an empty string."""
    name, special = member.name, member.special
    if _OUTSIDE.search(name):
        return f"the name {name!r} leads out of the folder"
    if special and not (special.isfile() or special.isdir()):
        return f"{name!r} is a {'link' if special.islnk() or special.issym() else 'device'}, not a file"
    if special and special.issparse():
        return f"{name!r} is stored as a sparse file"
    if not name.isascii() and re.search("[\ud800-\udfff]", name):  # Python's form of undecodable bytes
        return f"the name {name!r} is not UTF-8"
    return ""


def _describe(file: BufferedIOBase, run: _Run, extension: str, member: Member) -> None:
    """Note length and size of a video or of tokens, or the reason why they are corrupt, or read the texts."""
    kind = extension.rpartition(".")[2]
    if kind in TEXT_EXTENSIONS:
        run.texts[extension] = read_at(file, member.offset, min(member.size, _MAX_TEXT))
        if member.size > _MAX_TEXT:
            run.flaw = f"its {extension} has {member.size} bytes, more than {_MAX_TEXT}"
    elif kind in VIDEO_EXTENSIONS or extension == "tokens.npy":
        try:
            if extension != "tokens.npy":
                run.clips[extension] = probe_mp4(file, member.offset, member.size)._asdict()
                return
            shape = _npy_shape(read_at(file, member.offset, min(member.size, _NPY_HEADER)))
            if len(shape) != 3:
                raise ValueError(f"its tokens have the shape {shape}, not (frames, height, width)")
            run.clips[extension] = dict(zip(("frames", "height", "width"), shape, strict=True))
        except ValueError as error:
            run.clips[extension] = {"reason": str(error)}


def _npy_shape(content: bytes) -> tuple[int, ...]:
    """Return the shape of the array in an npy file, from the first bytes of the file."""
    is_first_version = content[6:7] == b"\1"
    return _parse_npy_header(content[: 10 + int.from_bytes(content[8:10], "little")] if is_first_version else content)


@lru_cache  # most arrays of a shard have the same shape
def _parse_npy_header(header: bytes) -> tuple[int, ...]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]
