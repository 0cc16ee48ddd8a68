"""Atomic writes: a file or folder appears complete or not at all; locks of folders."""

import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path

import pytest

from t2v.errors import UserError
from t2v.files import LOCK, atomic_path, locked, remove
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


def test_the_folder_of_another_process_can_be_kept(tmp_path):
    path = tmp_path / "cache"
    with atomic_path(path, keep_existing=True) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("ours")
        path.mkdir()
        (path / "file").write_text("theirs")
    assert (path / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


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


def test_one_process_locks_a_folder(tmp_path):
    with locked(tmp_path / "out"):
        pid = os.fork()
        if not pid:
            try:
                with locked(tmp_path / "out", "go home"):
                    os._exit(1)
            except UserError as error:
                os._exit(0 if f"(process {os.getppid()} on " in str(error) and "or go home." in str(error) else 2)
        assert os.waitpid(pid, 0)[1] == 0
    assert not contents(tmp_path)
    with locked(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).exists()


def test_the_lock_of_another_process_is_not_removed(tmp_path):
    folder = tmp_path / "out"
    with locked(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / LOCK).write_text("of another")
    assert (folder / LOCK).read_text() == "of another"


def test_a_folder_on_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="out cannot be locked"), locked(tmp_path / "out"):
        pass
