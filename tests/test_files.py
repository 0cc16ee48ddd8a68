"""Atomic writes: a file or folder appears complete or not at all."""

import errno
import os
import signal
from pathlib import Path

import pytest

from t2v.files import atomic_path, remove
from tests.support import forked

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_appears_when_the_context_ends(tmp_path):
    path = tmp_path / "out.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
    assert contents(tmp_path) == {"out.txt": "new"}


def test_a_file_replaces_an_older_one(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with atomic_path(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"out.txt": "new"}


def test_a_folder_appears_when_the_context_ends(tmp_path):
    path = tmp_path / "model"
    with atomic_path(path) as temporary:
        (temporary / "part").mkdir(parents=True)
        (temporary / "part" / "weights").write_text("w")
        (temporary / "config").write_text("c")
        assert not path.exists()
    assert contents(tmp_path) == {"model/part/weights": "w", "model/config": "c"}


def test_a_folder_replaces_an_empty_folder_only(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "old").write_text("old")
    with atomic_path(empty) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    with pytest.raises(OSError, match="full"), atomic_path(full) as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert contents(tmp_path) == {"empty/new": "new", "full/old": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error, folder, old):
    path = tmp_path / "out"
    if old:
        path.write_text(old)

    def write() -> None:
        with atomic_path(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "part" if folder else temporary).write_text("incomplete")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(tmp_path) == ({"out": old} if old else {})
    assert len(list(tmp_path.iterdir())) == len(contents(tmp_path))


def test_a_full_disk_leaves_no_partial_file(tmp_path):
    """The size limit of the process makes a real write fail with an `OSError`, as a full disk does."""
    script = f"""
import resource, signal
from t2v.files import atomic_path

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with atomic_path({str(tmp_path / "out")!r}) as temporary:
    temporary.write_bytes(bytes(5000))
"""
    pytest.importorskip("resource")
    assert "OSError: [Errno 27] File too large" in forked.run("-c", script).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("old", [None, "old"])
def test_a_killed_process_leaves_no_incomplete_file_under_the_name(tmp_path, old):
    path = tmp_path / "out.txt"
    if old:
        path.write_text(old)
    script = f"""
import os, signal
from t2v.files import atomic_path

with atomic_path({str(path)!r}) as temporary:
    temporary.write_text("incomplete")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert forked.run("-c", script).returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == old
    with atomic_path(path) as temporary:  # a later process writes the file all the same
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out"):
        pass


def test_remove_takes_files_folders_links_and_missing_paths(tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    (folder / "inner").mkdir(parents=True)
    file.write_text("kept")
    link.symlink_to(folder)
    remove(link)
    assert (folder / "inner").exists()
    for path in (folder, tmp_path / "missing", file):
        remove(path)
    assert list(tmp_path.iterdir()) == []
