"""Finding training checkpoints and reading how their model was built, on disk or remote (fsspec)."""

import os
import warnings
from pathlib import PurePath
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from t2v.checkpoints.storage import MARKER, check_intact, is_complete, saved_step
from t2v.errors import UserError, reason_of


def newest_last(folder: str) -> str | None:
    """Return the checkpoint of a folder to resume from, a file or a sharded checkpoint, or None if there is none.

    It is the ``last*.ckpt`` with the most optimizer steps. If those are damaged, or missing although there are other
    checkpoints, it is the ``*.ckpt`` with the most steps, and a warning says so. In a remote folder, whose checkpoints
    would have to be downloaded for their steps, the newest ``last*.ckpt`` is returned.

    Args:
        folder: Path or fsspec URL.

    Raises:
        UserError: If all checkpoints in the folder are damaged.
    """
    filesystem, root = fsspec.url_to_fs(folder)
    if not filesystem.isdir(root):
        return None
    # The folder is listed, because fsspec takes brackets in its name for a pattern.
    names = sorted(PurePath(path).name for path in filesystem.ls(root, detail=False))
    names = [name for name in names if name.endswith(".ckpt") and not name.startswith(".")]
    last = [name for name in names if name.startswith("last")]
    if not isinstance(filesystem, LocalFileSystem):
        newest = max(last, key=lambda name: filesystem.modified(f"{root}/{name}"), default=None)
        return newest and f"{folder.rstrip('/')}/{newest}"
    names = [name for name in names if is_complete(f"{root}/{name}")]  # others are of an interrupted save
    damaged: list[str] = []
    for group in ([name for name in names if name in last], [name for name in names if name not in last]):
        steps = {name: saved_step(f"{root}/{name}") for name in group}
        damaged += [name for name, step in steps.items() if step is None]
        complete = {name: step for name, step in steps.items() if step is not None}
        if not complete:
            continue
        newest = max(complete, key=lambda name: (complete[name], filesystem.modified(f"{root}/{name}")))
        if damaged or newest not in last:
            why = f"{' and '.join(damaged)} cannot be read" if damaged else "there is no last.ckpt"
            warnings.warn(
                f"In {folder}, {why}; using {newest}, the newest complete checkpoint (step {complete[newest]}).",
                stacklevel=2,
            )
        return f"{folder.rstrip('/')}/{newest}"
    if damaged:
        raise UserError(
            f"No checkpoint in {folder} can be read ({', '.join(damaged)}): the disk was full or the files are "
            "damaged. Give the path of another to --ckpt_path, or leave it out to start again."
        )
    return None


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path, or an address that fsspec reads, is on a local file system."""
    return isinstance(fsspec.url_to_fs(os.fspath(path))[0], LocalFileSystem)


def read_model_config(path: str) -> dict[str, Any] | None:
    """Return how the model of a checkpoint was built, as ``{"class_path": ..., "init_args": ...}``.

    Args:
        path: Path or fsspec URL of a file or of a sharded checkpoint.

    Returns:
        None if the checkpoint does not contain it.

    Raises:
        UserError: If there is no complete checkpoint at `path`, or it is a damaged file on this machine.
    """
    filesystem, inner = fsspec.url_to_fs(path)
    if not filesystem.exists(inner):
        raise UserError(f"There is no checkpoint at {path}: check the path given to --ckpt_path.")
    if filesystem.isdir(inner):
        inner = f"{inner}/{MARKER}"
        if not filesystem.exists(inner):
            raise UserError(
                f"{path} is a folder without {MARKER}, so it is not a checkpoint or was not written completely: give "
                "another to --ckpt_path, or `last` for the newest complete one."
            )
    try:
        if isinstance(filesystem, LocalFileSystem):
            check_intact(inner)
            checkpoint = torch.load(inner, map_location="cpu", weights_only=True, mmap=True)
        else:
            with filesystem.open(inner, "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        arguments = dict(checkpoint.get("hyper_parameters", {}))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this program, or it is damaged ({reason_of(error)}): give the "
            "path of a .ckpt file that `fit` wrote to --ckpt_path."
        ) from error
    arguments.pop("_instantiator", None)
    class_path = arguments.pop("_class_path", None)
    return {"class_path": class_path, "init_args": arguments} if class_path else None


def best_checkpoint(folder: str) -> str | None:
    """Return the checkpoint with the best monitored metric of a folder, or None if there is none.

    The last checkpoint names it, by a path that need not be right any more: the folder may have been moved.

    Args:
        folder: Path or fsspec URL.
    """
    last = newest_last(folder)
    if last is None:
        return None
    filesystem, inner = fsspec.url_to_fs(last)
    with filesystem.open(f"{inner}/{MARKER}" if filesystem.isdir(inner) else inner, "rb") as file:
        callbacks = torch.load(file, map_location="cpu", weights_only=True).get("callbacks", {})
    for state in callbacks.values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            path = f"{folder.rstrip('/')}/{PurePath(state['best_model_path']).name}"
            if filesystem.exists(fsspec.url_to_fs(path)[1]):
                return path
    return None
