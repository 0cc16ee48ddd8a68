"""The files of a source: a folder on this machine, or at any address that fsspec opens."""

import os
import shutil
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple
from urllib.parse import unquote

import fsspec
from fsspec.core import split_protocol

from data.index import with_retries
from data.prepare.dropped import Dropped
from t2v.errors import UserError


class File(NamedTuple):
    """A file of a source."""

    name: str
    """Its path relative to the source, with slashes."""
    path: Path | str
    """Its absolute path on this machine, or its address."""
    size: int = 0
    """Bytes."""

    @property
    def shown(self) -> str:
        """The name as text; bytes that are not UTF-8 are written as escapes."""
        return self.name.encode(errors="surrogateescape").decode(errors="backslashreplace")

    @property
    def stem(self) -> str:
        """The name without its folder and its last extension."""
        return self.name.rpartition("/")[2].rpartition(".")[0]

    @property
    def real_path(self) -> Path | str:
        """The path without links, or the address: two names of one file have the same."""
        return Path(os.path.realpath(self.path)) if isinstance(self.path, Path) else self.path

    def read(self) -> bytes:
        """Return the content of the file.

        Raises:
            OSError: If it cannot be read.
        """
        if isinstance(self.path, Path):
            return self.path.read_bytes()
        filesystem, path = fsspec.url_to_fs(self.path)
        content: bytes = with_retries(filesystem.cat_file, path)
        return content


def is_remote(source: str) -> bool:
    """Return whether a source is an address such as `s3://bucket/clips`, not a path on this machine."""
    return split_protocol(source)[0] not in (None, "file", "local")


def list_files(source: str, dropped: list[Dropped]) -> list[File]:
    """Return the files in a folder and the folders in it, by name; a folder that is linked several times is read once.

    Hidden folders, and those of an interrupted run of this command, are left out.

    Args:
        source: The folder.
        dropped: Links to files that do not exist, and folders that cannot be read, are added to it.

    Raises:
        UserError: If there is no such folder.
    """
    return sorted(_list_remote(source) if is_remote(source) else _list_local(Path(source), dropped))


def local_copy(file: File, folder: Path) -> Path:
    """Return the path of a file on this machine, copied into a folder if it is remote.

    Args:
        file: The file.
        folder: The folder for copies; it must exist.
    """
    if isinstance(file.path, Path):
        return file.path
    copy = folder / file.name.rpartition("/")[2]
    filesystem, path = fsspec.url_to_fs(file.path)
    with with_retries(filesystem.open, path) as remote, copy.open("wb") as local:
        shutil.copyfileobj(remote, local)
    return copy


def _list_local(source: Path, dropped: list[Dropped]) -> list[File]:
    if not source.is_dir():
        raise UserError(f"There is no folder '{source}': give the folder that contains the videos.")

    def name_unreadable(error: OSError) -> None:
        dropped.append(Dropped(str(error.filename), None, f"folder cannot be read ({error.strerror})"))

    files = []
    seen: set[str] = set()
    for root, folders, names in os.walk(source, followlinks=True, onerror=name_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_partial(Path(root, name)))
        if os.path.realpath(root) in seen:  # a link to a folder that is listed already
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(source).as_posix()
            try:
                status = path.stat()
            except OSError as error:
                cause = "a link to nothing" if path.is_symlink() else error.strerror
                dropped.append(Dropped(File(relative, path).shown, None, f"missing file ({cause})"))
                continue
            if not S_ISREG(status.st_mode):
                dropped.append(Dropped(File(relative, path).shown, None, "no file (a pipe or a device)"))
                continue
            files.append(File(relative, path.absolute(), status.st_size))
    return files


def _is_partial(folder: Path) -> bool:
    """Return whether an interrupted run has left a folder."""
    return folder.suffix == ".partial" and (folder / "prepare.json").exists()


def _list_remote(source: str) -> list[File]:
    try:
        filesystem, root = fsspec.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise UserError(f"Cannot open '{source}' ({error}): install the package, or correct the address.") from error
    found = with_retries(lambda root: filesystem.find(root, detail=True), root)
    if not found:
        raise UserError(f"There are no files at '{source}': correct the address; a server must list its folders.")
    prefix = root.rstrip("/") + "/"
    as_name = unquote if "http" in filesystem.protocol else str
    files = [
        File(as_name(path.removeprefix(prefix)), filesystem.unstrip_protocol(path), info.get("size") or 0)
        for path, info in found.items()
        if not path.endswith("/")
    ]
    return [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
