"""Checkpoints on disk: one file, or a folder to which every rank of a sharded model wrote its share.

- A folder is in the format of `torch.distributed.checkpoint`, for any number of ranks to read. Beside the shares lies
  ``meta.pt`` with everything that is no tensor. It is written last and removed first, so a folder that has it is
  complete.
- A new checkpoint is written under another name and gets its own when it is complete; only then the old one goes. What
  a killed process leaves behind is never taken for a checkpoint.
- torch reads its part of a folder with pickle, unlike a file: take folders from your own runs only.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from t2v.errors import UserError

MARKER = "meta.pt"
"""Of a complete folder."""
PARTIAL = ".partial"
"""Ends the name of a checkpoint that is being written."""


def is_complete(path: str | Path) -> bool:
    """Whether there is a checkpoint at a path, of either kind, and all of it."""
    path = Path(path)
    return (path / MARKER).is_file() if path.is_dir() else path.is_file()


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder of shares, be it complete or not."""
    path = Path(path)
    return path.is_dir() and ((path / MARKER).is_file() or any(path.glob("*.distcp")))


def read_checkpoint(path: str | Path, optimizers: bool = False) -> dict[str, Any]:
    """A checkpoint as Lightning lays it out, every tensor whole.

    Args:
        path: a .ckpt file or folder.
        optimizers: whether all that training goes on from is wanted of a folder, which takes several times the memory
            of the weights; a file's tensors are read when they are used.

    Raises:
        UserError: where a folder was not written to its end.
    """
    path = Path(path)
    if not path.is_dir():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    checkpoint = read_marker(path)
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    places: dict[str, tuple[Any, ...]] = metadata.planner_data
    wanted: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if optimizers or places[name][0] == "state_dict":
            wanted[name] = None
            if isinstance(entry, TensorStorageMetadata):
                wanted[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it shall be
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    read: dict[Any, Any] = {}
    if any(place[0] == "current_model_state" for place in places.values()):
        read["current_model_state"] = {}  # that it is there tells that the weights are an average
    for name, value in wanted.items():
        *parents, last = places[name]
        inner = read
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    states = [read.pop(name) for name in sorted(name for name in read if name.startswith("optimizer_"))]
    for state in states:
        state["param_groups"] = [group for _, group in sorted(state["param_groups"].items())]
    if states:
        read["optimizer_states"] = states
    return checkpoint | read


def read_marker(folder: Path) -> dict[str, Any]:
    """All of a sharded checkpoint that is no tensor.

    Raises:
        UserError: where it was not written to its end.
    """
    if not (folder / MARKER).is_file():
        raise UserError(
            f"'{folder}' is a folder without {MARKER}, so no checkpoint, or one that was not written to its end: give "
            "another, or `last` for the newest complete one."
        )
    return torch.load(folder / MARKER, map_location="cpu", weights_only=True)


def put(new: Path, path: Path) -> None:
    """Gives a complete checkpoint its name, in the place of an older one.

    A folder cannot be exchanged in one go. In between, the older one is called ``NAME-old.ckpt``, so that there is a
    complete one at any moment that `last*.ckpt` finds.
    """
    old = path.with_name(f"{path.stem}-old{path.suffix}")
    if path.exists():
        remove(old)
        path.replace(old)
    new.replace(path)
    remove(old)


def remove(path: Path) -> None:
    """Removes a checkpoint of either kind, a folder's marker first; nothing happens where there is none."""
    if path.is_dir():
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
