"""Training checkpoints on disk: one file, or for a sharded model a folder to which every rank writes its part.

- A folder has the format of `torch.distributed.checkpoint`, which any number of ranks can load, plus ``meta.pt`` with
  everything that is not a tensor. That file, the marker, is written last and removed first, so a folder that has it is
  complete.
- A new checkpoint is written beside the old one, synced to disk and renamed when it is complete; only then is the old
  one removed. Nothing is written to another folder, such as TMPDIR.
- torch reads part of a folder with pickle, unlike a file: use only folders from your own runs.
"""

import functools
import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

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
        UserError: If a folder is not a complete checkpoint, or a file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        check_intact(path)
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


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as one file, which appears when it is complete and may replace a file or a folder.

    Raises:
        OSError: If the folder cannot be written to or the disk is full. An older checkpoint is then unchanged.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_checkpoint(partial)  # of a run that was killed
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
        files.sync(partial)
        replace_checkpoint(partial, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides it behind an error of its own
            raise error.__context__ from None
        raise
    finally:
        files.remove(partial)


def saved_step(path: str | Path) -> int | None:
    """Return the optimizer step at which a checkpoint was saved, or None if it is damaged or incomplete.

    A file is read completely, to compare its checksums; of a folder, the names and sizes of its files are compared.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if (path / ".metadata").is_file():
                _check_parts(path)
            return int(read_marker(path)["global_step"])
        check_intact(path)
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # whatever torch or zipfile raise for the damage
        return None


def check_intact(path: str | os.PathLike[str]) -> None:
    """Compare the checksums of a checkpoint file, which torch does not; the file is read completely, but only once.

    Raises:
        UserError: If they differ. Other damage is reported by `torch.load`.
    """
    status = Path(path).stat()
    if not _checksums_match(os.fspath(path), status.st_size, status.st_mtime_ns):
        raise UserError(
            f"{path} is damaged: its checksums do not match its content. Give another checkpoint, or `last` for the "
            "newest complete one of a run."
        )


@functools.lru_cache
def _checksums_match(path: str, size: int, modified: int) -> bool:
    """Return whether the checksums of a zip file are right; true for other files. A file that changes is read again."""
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def model_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of the network that a LightningModule has as `model`, under the network's own names.

    Args:
        checkpoint: A checkpoint of either stage.
        path: Where it is from, for the message.

    Raises:
        UserError: If a weight is NaN or infinite.
    """
    stored = checkpoint["state_dict"].items()
    weights = {name.removeprefix("model."): value for name, value in stored if name.startswith("model.")}
    check_finite(weights, f"'{path}'")
    return weights


def check_finite(tensors: Mapping[str, Any], source: str) -> None:
    """Check that weights are finite.

    Args:
        tensors: The tensors by name; other values are ignored.
        source: Where the weights are from, with which the message begins.

    Raises:
        UserError: If a tensor has a value that is NaN or infinite.
    """
    weights = {name: value for name, value in tensors.items() if torch.is_tensor(value) and value.is_floating_point()}
    # The sum is quick, but that of finite values may overflow.
    bad = [name for name, value in weights.items() if not math.isfinite(_local(value).detach().float().sum())]
    bad = [name for name in bad if not _local(weights[name]).isfinite().all()]
    if bad:
        raise UserError(
            f"{source} cannot be used: {len(bad)} of {len(weights)} tensors have values that are NaN or infinite, the "
            f"first of them {bad[0]}, because its training diverged. Use a checkpoint from before, and train on with a "
            "lower learning rate."
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_parts(folder: Path) -> None:
    """Raise an error if a file of a sharded checkpoint is missing or too short."""
    stored = FileSystemReader(folder).read_metadata().storage_data
    for part in stored.values():
        if (folder / part.relative_path).stat().st_size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} is too short")


def partial_path(path: Path) -> Path:
    """Return the path to write a checkpoint to before `replace_checkpoint` renames it; the same on all ranks."""
    return path.with_name(f"{path.name}.partial")


def replace_checkpoint(new: Path, path: Path) -> None:
    """Rename a complete checkpoint to `path`, replacing an older one.

    A folder cannot be renamed over another. If one of both is a folder, the older one is therefore renamed to
    ``NAME-old.ckpt`` first, and removed last; at any moment, the pattern `last*.ckpt` finds a complete checkpoint.
    """
    old = path.with_name(f"{path.stem}-old{path.suffix}")
    if path.is_dir() or (new.is_dir() and path.exists()):
        remove_checkpoint(old)
        path.replace(old)
    new.replace(path)
    files.sync_folder(path.parent)
    remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file, a folder or a symbolic link, if it exists.

    A folder's marker is removed first, so that an interrupted removal does not leave a folder that seems complete.
    """
    if path.is_dir() and not path.is_symlink():
        (path / MARKER).unlink(missing_ok=True)
    files.remove(path)


def _allocate(metadata: Metadata, names: list[str]) -> dict[str, Any]:
    """Return empty tensors for the entries of a folder to load into, and None for other values."""
    entries: dict[str, Any] = {}
    for name in names:
        entry = metadata.state_dict_metadata[name]
        entries[name] = None
        if isinstance(entry, TensorStorageMetadata):
            entries[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    return entries


def _insert(tree: dict[Any, Any], keys: tuple[Any, ...], value: Any) -> None:
    """Set `tree[keys[0]][keys[1]]...` to a value, with new dicts where they are missing."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
