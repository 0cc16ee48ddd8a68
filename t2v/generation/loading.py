"""Reading a checkpoint to generate with, and the check of a folder to write."""

from pathlib import Path
from typing import Any

from t2v.checkpoints.storage import read_checkpoint
from t2v.errors import UserError, reason_of


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of stage 2.

    Raises:
        UserError: If it does not exist or is damaged.
    """
    if not path.exists():
        raise UserError(
            f"There is no checkpoint at '{path}': give the path of a .ckpt file that `fit` of stage 2 wrote."
        )
    try:
        return read_checkpoint(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"'{path}' is not a checkpoint, or it is damaged ({reason_of(error)}): give the path of a .ckpt file that "
            "`fit` of stage 2 wrote."
        ) from error


def check_target(folder: Path) -> None:
    """Check that a folder can be written: it does not exist, or is empty.

    Raises:
        UserError: If it is something else.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already and is not an empty folder: give another, or remove it.")
