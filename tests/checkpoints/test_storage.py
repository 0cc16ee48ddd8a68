"""Renaming and removing checkpoints."""

from pathlib import Path

import pytest
import torch

from t2v.checkpoints.storage import (
    MARKER,
    is_complete,
    is_sharded,
    partial_path,
    read_checkpoint,
    remove_checkpoint,
    replace_checkpoint,
)
from t2v.errors import UserError


def write(path: Path, kind: str, value: int = 0) -> Path:
    if kind == "file":
        torch.save({"step": value}, path)
    else:
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"")
        torch.save({"step": value}, path / MARKER)
    return path


def step(path: Path) -> int:
    return torch.load(path / MARKER if path.is_dir() else path)["step"]


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_a_checkpoint_replaces_an_older_one(tmp_path, old, new):
    path = tmp_path / "last.ckpt"
    if old:
        write(path, old, 1)
    replace_checkpoint(write(partial_path(path), new, 2), path)
    assert step(path) == 2
    assert is_complete(path)
    assert is_sharded(path) == (new == "folder")
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_older_one_survives_until_the_new_one_has_its_name(tmp_path, kind):
    path = write(tmp_path / "last.ckpt", kind, 1)
    with pytest.raises(FileNotFoundError):
        replace_checkpoint(tmp_path / "missing.ckpt", path)
    (found,) = tmp_path.glob("last*.ckpt")
    assert is_complete(found)
    assert step(found) == 1


def test_a_folder_without_marker_is_not_a_checkpoint(tmp_path):
    path = write(tmp_path / "last.ckpt", "folder")
    (path / MARKER).unlink()
    assert is_sharded(path)
    assert not is_complete(path)
    with pytest.raises(UserError, match=r"without meta\.pt"):
        read_checkpoint(path)


def test_removing_a_missing_checkpoint_does_nothing(tmp_path):
    remove_checkpoint(tmp_path / "missing.ckpt")
    remove_checkpoint(write(tmp_path / "file.ckpt", "file"))
    remove_checkpoint(write(tmp_path / "folder.ckpt", "folder"))
    assert list(tmp_path.iterdir()) == []
