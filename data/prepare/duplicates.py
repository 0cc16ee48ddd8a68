"""Near-duplicates, found by a perceptual hash of three frames of each clip.

The hash encodes the low frequencies of the picture
(https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html). It ignores colour: clips that differ
only in their colours count as near-duplicates.

Axis letters: t frames, c channels (3, red green blue), h w pixels, k 64-bit parts of a hash.
"""

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image
from torch import Tensor

from t2v.errors import UserError

HASH_BITS = 192
"""Bits of a clip's hash: 64 each for its middle, first and last frame."""


def perceptual_hash(frames: UInt8[Tensor, "t c h w"]) -> int:
    """Return the hash of a clip; the hashes of similar clips differ in few of `HASH_BITS` bits.

    Args:
        frames: The clip, of any size.

    Raises:
        UserError: If the package imagehash is missing.
    """
    try:
        from imagehash import phash
    except ImportError as error:
        raise UserError('Near-duplicates are found with imagehash: run pip install -e ".[prepare]".') from error
    bits = [
        phash(Image.fromarray(frames[t].permute(1, 2, 0).contiguous().numpy())).hash
        for t in (len(frames) // 2, 0, len(frames) - 1)
    ]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class HashSearch:
    """Finds the clip with the nearest hash among all earlier clips.

    A hash is compared with all others in NumPy (exclusive or, and a count of bits): first in the 64 bits of the middle
    frame, then in all 192 bits where these are near enough. The search is exact, and takes 24 bytes per clip.

    Args:
        max_distance: Largest number of bits in which the hashes of near-duplicates differ.

    Attributes:
        keys: Keys of all clips added so far.
    """

    def __init__(self, max_distance: int) -> None:
        self.max_distance = max_distance
        self.keys: list[str] = []
        self._hashes = np.empty((HASH_BITS // 64, 1024), np.uint64)

    def add(self, hash_: int, key: str) -> None:
        """Add a clip.

        Args:
            hash_: Its `perceptual_hash`.
            key: Its key, which `find` returns.
        """
        if len(self.keys) == self._hashes.shape[1]:
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)], axis=1)
        self._hashes[:, len(self.keys)] = _as_array(hash_)
        self.keys.append(key)

    def find(self, hash_: int) -> str | None:
        """Return the key of the clip with the nearest hash, the earliest of several, or None if none is near enough.

        Args:
            hash_: A clip's `perceptual_hash`.
        """
        parts, hashes = _as_array(hash_), self._hashes[:, : len(self.keys)]
        near = np.flatnonzero(np.bitwise_count(hashes[0] ^ parts[0]) <= self.max_distance)
        if not near.size:
            return None
        distances = np.bitwise_count(hashes[:, near] ^ parts[:, None]).sum(axis=0, dtype=np.int64)
        best = int(distances.argmin())
        return self.keys[near[best]] if distances[best] <= self.max_distance else None


def _as_array(hash_: int) -> UInt64[np.ndarray, " k"]:
    return np.frombuffer(hash_.to_bytes(HASH_BITS // 8, "big"), ">u8").astype(np.uint64)
