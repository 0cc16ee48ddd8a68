"""Files of MNIST's format."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from data.examples.handwriting import DIGIT_SIZE


def write_mnist(folder: Path, train: ArrayLike, held_out: ArrayLike) -> None:
    """Write an image of each digit, all pixels of which have one brightness, to both parts.

    Args:
        folder: Where to write.
        train: The brightness of digits 0, 1, …, in the training images.
        held_out: The same in the test images.
    """
    for part, brightness in (("train", np.asarray(train)), ("t10k", np.asarray(held_out))):
        images = np.broadcast_to(brightness[:, None, None], (len(brightness), DIGIT_SIZE, DIGIT_SIZE))
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(len(brightness)))):
            header = np.array([0x800 + array.ndim, *array.shape], dtype=">i4")
            (folder / f"{part}-{name}-ubyte").write_bytes(header.tobytes() + array.astype(np.uint8).tobytes())
