"""Scan of a tar for the samples in it.

A sample is a run of members with one key; of a video only the description is read. A tar that is truncated, or damaged
in the middle, keeps the samples before that position.
"""

import io
import re
import tarfile
from io import BufferedIOBase
from typing import Any

import numpy as np

from data.index.mp4 import probe_mp4
from data.index.remote import read_at

_NPY_HEADER = 1024
"""Bytes to read of an npy file for its shape."""


class _Run:
    """Consecutive members with one key.

    Args:
        key: The key; empty if it is not known.

    Attributes:
        members: Offset and size in bytes of each member, by its extension.
        clip: Length and size of the video or the tokens; `reason` if they are corrupt.
        reason: Why the run is no sample; empty if it is one.
    """

    def __init__(self, key: str, reason: str = "") -> None:
        self.key, self.reason = key, reason
        self.members: dict[str, tuple[int, int]] = {}
        self.clip: dict[str, Any] = {}


def scan_tar(file: BufferedIOBase, size: int) -> dict[str, Any]:
    """Return the samples of a tar, and what is skipped in it.

    Args:
        file: The tar, opened for reading.
        size: Its size in bytes.

    Returns:
        `samples`: For each key the `members` (offset and size by extension) and the length and size of the clip.
        `skipped`: Key and reason of each run of members that is no sample.

    Raises:
        tarfile.TarError: If the file is not a tar.
        OSError: If it cannot be read.
    """
    runs: list[_Run] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        damage = _scan_members(tar, file, size, runs)
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
        for member in tar:
            key, extension = _split_name(member.name)
            refusal = _refusal(member)
            if member.isdir() or not (extension or refusal):
                continue
            if not runs or runs[-1].key != key or extension in runs[-1].members:
                runs.append(_Run(key))
            run = runs[-1]
            run.members[extension] = member.offset_data, member.size
            run.reason = run.reason or refusal
            if member.isfile() and not 0 <= member.size <= size - member.offset_data:
                run.reason = f"the tar is truncated or damaged in its {extension}"
                return ""
            if not run.reason:
                run.clip |= _describe(file, extension, *run.members[extension])
    except (tarfile.TarError, ValueError, OverflowError) as error:  # from damaged headers
        return str(error)
    has_end_mark = read_at(file, tar.offset, tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    return "" if has_end_mark else "no end mark"


def _merge(runs: list[_Run]) -> dict[str, Any]:
    """Join the runs of each key to one sample; a run with a member that its key already has is skipped."""
    samples: dict[str, dict[str, Any]] = {}
    skipped: list[tuple[str, str]] = []
    for run in runs:
        if run.reason:
            skipped.append((run.key, run.reason))
        elif run.key not in samples:
            samples[run.key] = {"members": run.members, **run.clip}
        elif samples[run.key]["members"].keys() & run.members.keys():
            skipped.append((run.key, "its key occurs twice in the tar"))
        else:
            samples[run.key]["members"] |= run.members
            samples[run.key] |= run.clip
    return {"samples": samples, "skipped": skipped}


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension of a member; without an extension the key is its name."""
    name = name.encode(errors="surrogateescape").decode(errors="replace")
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension) if stem and extension else (name, "")


def _refusal(member: tarfile.TarInfo) -> str:
    """Return why a member must not be read, or an empty string."""
    name = repr(member.name)
    if ".." in re.split(r"[/\\]", member.name) or re.match(r"[/\\]|\w:[/\\]", member.name):
        return f"the name {name} leads out of the folder"
    if not (member.isfile() or member.isdir()):
        return f"{name} is a {'link' if member.islnk() or member.issym() else 'device'}, not a file"
    if member.issparse():
        return f"{name} is stored as a sparse file"
    if re.search("[\ud800-\udfff]", member.name):  # Python's form of undecodable bytes
        return f"the name {name} is not UTF-8"
    return ""


def _describe(file: BufferedIOBase, extension: str, offset: int, size: int) -> dict[str, Any]:
    """Return length and size of a video or of tokens, or the reason why they are corrupt; nothing of other members."""
    try:
        if extension == "mp4":
            return probe_mp4(file, offset, size)._asdict()
        if extension == "tokens.npy":
            shape = _npy_shape(read_at(file, offset, min(size, _NPY_HEADER)))
            if len(shape) != 3:
                raise ValueError(f"its tokens have the shape {shape}, not (frames, height, width)")
            return dict(zip(("frames", "height", "width"), shape, strict=True))
    except ValueError as error:
        return {"reason": str(error)}
    return {}


def _npy_shape(header: bytes) -> tuple[int, ...]:
    """Return the shape of the array in an npy file, from the first bytes of the file."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]
