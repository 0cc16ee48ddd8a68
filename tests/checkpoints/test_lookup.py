"""Which checkpoint of a folder is resumed."""

import os
from pathlib import Path

import pytest
import torch

from t2v.checkpoints.lookup import newest_last
from t2v.checkpoints.storage import MARKER
from t2v.errors import UserError


def write(folder: Path, name: str, step: int, time: int, damage: str = "") -> None:
    path = folder / name
    torch.save({"global_step": step, "weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 255
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"" if damage == "empty" else content)
    os.utime(path, (time, time))


@pytest.mark.parametrize("name", ["run", "run [1]", "run *?", "läufe"])
def test_the_step_decides_not_the_time(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert newest_last(str(folder)) is None
    write(folder, "last.ckpt", step=20, time=1)
    write(folder, "last-v1.ckpt", step=10, time=2)
    write(folder, "epoch=3.ckpt", step=30, time=3)
    assert newest_last(f"{folder}/") == f"{folder}/last.ckpt"


@pytest.mark.parametrize("damage", ["cut", "byte", "empty"])
def test_damaged_checkpoints_are_passed_over(tmp_path, damage):
    write(tmp_path, "last.ckpt", step=30, time=3, damage=damage)
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(last\.ckpt\)"):
        newest_last(str(tmp_path))
    write(tmp_path, "step=10.ckpt", step=10, time=2)
    write(tmp_path, "step=20.ckpt", step=20, time=1)
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read; using step=20\.ckpt.* \(step 20\)"):
        assert newest_last(str(tmp_path)) == f"{tmp_path}/step=20.ckpt"
    (tmp_path / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"there is no last\.ckpt; using step=20\.ckpt"):
        newest_last(str(tmp_path))


def test_an_incomplete_folder_is_passed_over(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    write(tmp_path, "last-old.ckpt", step=5, time=1)
    assert newest_last(str(tmp_path)) == f"{tmp_path}/last-old.ckpt"
    assert not (tmp_path / f"last.ckpt/{MARKER}").exists()
