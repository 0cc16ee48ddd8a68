"""Example data sets, and the programs that judge videos generated from them."""

import subprocess
from pathlib import Path

from t2v.errors import UserError


def run_command(command: list[str], folder: Path) -> None:
    """Run a command in a folder, without its output.

    Raises:
        ChildProcessError: If it does not exist or fails, with the last line that it wrote as the message.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise ChildProcessError(reason) from error


def is_complete(folder: Path) -> bool:
    """Return whether a folder of an example data set exists already, and print so.

    Raises:
        UserError: If the folder exists but is not an example data set.
    """
    if (folder / "captions.csv").exists():
        print(f"{folder} is complete already: nothing to do.")
        return True
    if folder.exists():
        raise UserError(
            f"'{folder}' exists but has no captions.csv, so it is not replaced: delete it, or choose another folder."
        )
    return False
