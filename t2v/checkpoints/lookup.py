"""Finding training checkpoints and reading how their model was built, on disk or remote (fsspec)."""

from pathlib import PurePath
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from t2v.checkpoints.storage import MARKER
from t2v.errors import UserError


def newest_last(folder: str) -> str | None:
    """Return the newest complete ``last*.ckpt`` of a folder, a file or a sharded checkpoint, or None.

    Args:
        folder: Path or fsspec URL.
    """
    filesystem, root = fsspec.url_to_fs(folder)
    modified = {}
    for path in filesystem.glob(f"{root}/last*.ckpt"):
        written_last = f"{path}/{MARKER}" if filesystem.isdir(path) else path
        if filesystem.exists(written_last):
            modified[path] = filesystem.modified(written_last)
    if not modified:
        return None
    newest = max(modified, key=modified.__getitem__)
    return f"{folder.rstrip('/')}/{PurePath(newest).name}"


def read_model_config(path: str) -> dict[str, Any] | None:
    """Return how the model of a checkpoint was built, as ``{"class_path": ..., "init_args": ...}``.

    Args:
        path: Path or fsspec URL of a file or of a sharded checkpoint.

    Returns:
        None if the checkpoint does not contain it.

    Raises:
        UserError: If there is no complete checkpoint at `path`.
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
            checkpoint = torch.load(inner, map_location="cpu", weights_only=True, mmap=True)
        else:
            with filesystem.open(inner, "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        arguments = dict(checkpoint.get("hyper_parameters", {}))
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{path} is not a checkpoint of this program, or it is damaged ({type(error).__name__}: {reason}): "
            "give the path of a .ckpt file that `fit` wrote to --ckpt_path."
        ) from error
    arguments.pop("_instantiator", None)
    class_path = arguments.pop("_class_path", None)
    return {"class_path": class_path, "init_args": arguments} if class_path else None
