"""Example data sets, and the programs that judge videos generated from them."""

from pathlib import Path

from t2v.errors import UserError


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
