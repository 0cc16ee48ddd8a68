"""Training checkpoints on disk: one file, or for a sharded model a folder to which every rank writes its part.

- A folder has the format of `torch.distributed.checkpoint`, which any number of ranks can load, plus ``meta.pt`` with
  everything that is not a tensor. That file, the marker, is written last and removed first, so a folder that has it is
  complete.
- A new checkpoint is written under a temporary name and renamed when it is complete; only then is the old one removed.
- torch reads part of a folder with pickle, unlike a file: use only folders from your own runs.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from t2v import files
from t2v.errors import UserError

MARKER = "meta.pt"
"""The file that only a complete folder has."""


def is_complete(path: str | Path) -> bool:
    """Return whether a path is a complete checkpoint, a file or a folder."""
    path = Path(path)
    return (path / MARKER).is_file() if path.is_dir() else path.is_file()


def is_sharded(path: str | Path) -> bool:
    """Return whether a path is a sharded checkpoint, complete or not."""
    path = Path(path)
    return path.is_dir() and ((path / MARKER).is_file() or any(path.glob("*.distcp")))


def read_checkpoint(path: str | Path, optimizers: bool = False) -> dict[str, Any]:
    """Read a checkpoint in Lightning's layout, with unsharded tensors on the CPU.

    Args:
        path: A .ckpt file or folder.
        optimizers: Whether to read a folder's optimizer state too, which takes several times the memory of the weights.
            A file always has it, but its tensors are read from disk only when they are used.

    Raises:
        UserError: If a folder is not a complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content
    checkpoint = read_marker(path)
    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    keys: dict[str, tuple[Any, ...]] = metadata.planner_data
    entries = _allocate(
        metadata, [name for name in metadata.state_dict_metadata if optimizers or keys[name][0] == "state_dict"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # this is one process
        load(entries, storage_reader=reader, no_dist=True)
    stored: dict[Any, Any] = {}
    if any(parts[0] == "current_model_state" for parts in keys.values()):
        stored["current_model_state"] = {}  # even if empty, it marks that the weights are a moving average
    for name, value in entries.items():
        _insert(stored, keys[name], value)
    states = [stored.pop(name) for name in sorted(name for name in stored if name.startswith("optimizer_"))]
    for state in states:
        state["param_groups"] = [group for _, group in sorted(state["param_groups"].items())]
    if states:
        stored["optimizer_states"] = states
    return checkpoint | stored


def read_marker(folder: Path) -> dict[str, Any]:
    """Read everything of a sharded checkpoint that is not a tensor.

    Raises:
        UserError: If the folder is not a complete checkpoint.
    """
    if not (folder / MARKER).is_file():
        raise UserError(
            f"'{folder}' is a folder without {MARKER}, so it is not a checkpoint or was not written completely: give "
            "another, or `last` for the newest complete one."
        )
    content: dict[str, Any] = torch.load(folder / MARKER, map_location="cpu", weights_only=True)
    return content


def partial_path(path: Path) -> Path:
    """Return the path to write a checkpoint to before `replace_checkpoint` renames it; the same on all ranks."""
    return path.with_name(f"{path.name}.partial")


def replace_checkpoint(new: Path, path: Path) -> None:
    """Rename a complete checkpoint to `path`, replacing an older one.

    A folder cannot be renamed over another. The older one is therefore renamed to ``NAME-old.ckpt`` first, and removed
    last; at any moment, the pattern `last*.ckpt` finds a complete checkpoint.
    """
    old = path.with_name(f"{path.stem}-old{path.suffix}")
    if path.exists():
        remove_checkpoint(old)
        path.replace(old)
    new.replace(path)
    remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it exists.

    A folder's marker is removed first, so that an interrupted removal does not leave a folder that seems complete.
    """
    if path.is_dir():
        (path / MARKER).unlink(missing_ok=True)
    files.remove(path)


def _allocate(metadata: Metadata, names: list[str]) -> dict[str, Any]:
    """Return empty tensors for the entries of a folder to load into, and None for other values."""
    entries: dict[str, Any] = {}
    for name in names:
        entry = metadata.state_dict_metadata[name]
        entries[name] = None
        if isinstance(entry, TensorStorageMetadata):
            entries[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return entries


def _insert(tree: dict[Any, Any], keys: tuple[Any, ...], value: Any) -> None:
    """Set `tree[keys[0]][keys[1]]...` to a value, with new dicts where they are missing."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
