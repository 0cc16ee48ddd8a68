"""Which footage is worth training on: limits for videos, clips and captions, and a search for near-duplicates.

- A reason reads `what is wrong (the value; the limit)`, so that reasons are counted by what stands before ` (`.
- Motion and brightness are measured on frames shrunk to 32 × 32 pixels, where noise has been averaged out.
- Near-duplicates are found by a perceptual hash (the low frequencies of the picture:
  https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html) of three frames of a clip. It sees no
  colour: two clips that differ in nothing but their colours count as one.

Axis letters: t frames, c channels (3, red green blue), h w pixels.
"""

import html
import re
import unicodedata
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from t2v.errors import UserError
from t2v.video import VideoInfo

HASH_BITS = 192
"""Bits of a clip's hash: 64 each for its middle, first and last frame."""
_WORDS = HASH_BITS // 64


@dataclass(frozen=True)
class Filters:
    """Limits outside which footage is dropped; the defaults keep ordinary footage, still clips and copies too.

    Args:
        min_seconds: length of the shortest video that is kept.
        max_seconds: length of the longest video that is kept; null for no limit.
        min_height: least length of a video's shorter side in pixels.
        min_fps: least frame rate of a video; below it are slide shows.
        max_aspect: greatest ratio of a video's longer to its shorter side; null for no limit.
        min_motion: least mean difference between one frame of a clip and the next, in grey levels from 0 to 255; 0
            keeps clips that stand still, 0.5 drops them, noise of the sensor and the encoder included.
        min_brightness: least mean grey level of a clip, from 0 to 255; below it a clip is black.
        max_hash_distance: a clip is dropped as a near-duplicate where its hash differs from an earlier clip's in at
            most this many of 192 bits; null keeps all. Re-encoded copies differ in about 10, different clips in about
            90; 16 is a good value.
        min_words: least number of words in a caption; a Chinese or Japanese character counts as a word.
        max_words: greatest number of words in a caption; null for no limit.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    min_height: int = 0
    min_fps: float = 4.0
    max_aspect: float | None = 3.0
    min_motion: float = 0.0
    min_brightness: float = 4.0
    max_hash_distance: int | None = None
    min_words: int = 1
    max_words: int | None = 200

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [f"{name}={value} is below 0" for name, value in values.items() if value is not None and value < 0]
        for name in ("seconds", "words"):
            least, most = values[f"min_{name}"], values[f"max_{name}"]
            if most is not None and least > most:
                wrong.append(f"min_{name}={least} is above max_{name}={most}")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"max_aspect={self.max_aspect} is below 1, the aspect of a square")
        if self.max_hash_distance is not None and self.max_hash_distance >= (chance := HASH_BITS // 2):
            wrong.append(
                f"max_hash_distance={self.max_hash_distance} is not below {chance}, as far as any two clips are"
            )
        if wrong:
            raise UserError(f"No footage can be told apart by these filters: {'; '.join(wrong)}.")


def refuse_video(info: VideoInfo, filters: Filters) -> str | None:
    """Why a video is dropped by what its head says, or None.

    Args:
        info: what the head of the file says.
        filters: the limits.
    """
    seconds, shorter = info.frames / info.fps, min(info.height, info.width)
    aspect = max(info.height, info.width) / shorter
    if seconds < filters.min_seconds:
        return f"too short ({seconds:.1f} s; min_seconds is {filters.min_seconds:g})"
    if filters.max_seconds is not None and seconds > filters.max_seconds:
        return f"too long ({seconds:.1f} s; max_seconds is {filters.max_seconds:g})"
    if shorter < filters.min_height:
        return f"too small ({info.width}x{info.height} pixels; min_height is {filters.min_height})"
    if info.fps < filters.min_fps:
        return f"too few frames a second ({info.fps:.3g}; min_fps is {filters.min_fps:g})"
    if filters.max_aspect is not None and aspect > filters.max_aspect:
        return f"too wide or too tall ({info.width}x{info.height} pixels; max_aspect is {filters.max_aspect:g})"
    return None


def refuse_clip(frames: UInt8[Tensor, "t c h w"], filters: Filters) -> str | None:
    """Why a clip is dropped by what it shows, or None.

    Args:
        frames: the clip. A single frame is never refused for standing still.
        filters: the limits.
    """
    small = torch.cat([F.interpolate(frame[None].float(), (32, 32), mode="area") for frame in frames])
    red, green, blue = small.unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    if (brightness := grey.mean().item()) < filters.min_brightness:
        return f"black (mean grey level {brightness:.1f}; min_brightness is {filters.min_brightness:g})"
    if len(grey) > 1 and (motion := grey.diff(dim=0).abs().mean().item()) < filters.min_motion:
        return f"near-static (frames differ by {motion:.2f} grey levels; min_motion is {filters.min_motion:g})"
    return None


def perceptual_hash(frames: UInt8[Tensor, "t c h w"]) -> int:
    """The hash of a clip, in which clips that look alike differ in few of `HASH_BITS` bits.

    Args:
        frames: the clip, of any size.

    Raises:
        UserError: where the package imagehash is missing.
    """
    try:
        from imagehash import phash
    except ImportError as error:
        raise UserError("Near-duplicates are found with imagehash: run pip install 't2v[prepare]'.") from error
    bits = [
        phash(Image.fromarray(frames[t].permute(1, 2, 0).contiguous().numpy())).hash
        for t in (len(frames) // 2, 0, len(frames) - 1)
    ]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Duplicates:
    """The hashes of the clips so far, and the search among them.

    A new hash is compared with all others, in NumPy (exclusive or, and a count of bits): first in the 64 bits of the
    middle frame, then in all 192 where these are near enough. That is exact, and takes 24 bytes a clip.
    """

    def __init__(self, max_distance: int) -> None:
        """
        Args:
            max_distance: greatest number of bits in which the hashes of near-duplicates differ.
        """
        self.max_distance = max_distance
        self.keys: list[str] = []
        self._hashes = np.empty((_WORDS, 1024), np.uint64)

    def add(self, hash_: int, key: str) -> None:
        """Remember a clip.

        Args:
            hash_: its `perceptual_hash`.
            key: what `find` calls it.
        """
        if len(self.keys) == self._hashes.shape[1]:
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)], axis=1)
        self._hashes[:, len(self.keys)] = _words(hash_)
        self.keys.append(key)

    def find(self, hash_: int) -> str | None:
        """The key of the clip whose hash is nearest, the earliest of several; None where none is near enough.

        Args:
            hash_: a clip's `perceptual_hash`.
        """
        words, hashes = _words(hash_), self._hashes[:, : len(self.keys)]
        near = np.flatnonzero(np.bitwise_count(hashes[0] ^ words[0]) <= self.max_distance)
        if not near.size:
            return None
        distances = np.bitwise_count(hashes[:, near] ^ words[:, None]).sum(axis=0, dtype=np.int64)
        best = int(distances.argmin())
        return self.keys[near[best]] if distances[best] <= self.max_distance else None


def _words(hash_: int) -> np.ndarray:
    return np.frombuffer(hash_.to_bytes(HASH_BITS // 8, "big"), ">u8").astype(np.uint64)


_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_BLOCK_TAG = re.compile(r"</?(?:br|div|h[1-6]|li|ol|p|table|td|tr|ul)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z](?:[^<>\s]*>|[^<>=/\"']*[=/\"'][^<>]*>)|<!--[^<>]*-->", re.IGNORECASE)
_URL = re.compile(r"(?:\bhttps?://|\bwww\.)[^\s<>()\[\]\"]+", re.IGNORECASE)
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]")
_JOINERS = "\u200c\u200d"
"""They have no width, but emoji, Persian and the scripts of India are spelt with them."""

_STOCK = r"(?:royalty[- ]free )?stock (?:video|footage|clip|photo)s?(?: (?:video|footage|clip)s?)?"
_PHRASES = (
    rf"(?:{_STOCK}|royalty[- ]free|full hd|u?hd|[48]k|shutterstock|getty images|i?stock ?photo|pond5|adobe stock)"
)
_TAIL = re.compile(
    rf"(?:^|(?<=[.!?])\s+|\s*[,;:|(\[]\s*|\s+[-–—]\s+){_PHRASES}(?: (?:{_PHRASES}|video))*[\s.!)\]]*$", re.I
)
_HEAD = re.compile(rf"^(?:{_STOCK} of\s+|{_PHRASES}(?: video)?\s*(?:[:|]|\s[-–—])\s*)", re.I)

_SYLLABIC = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Kana and Chinese characters, which are written without spaces."""


def clean_caption(text: str, filters: Filters) -> tuple[str, str | None]:
    """A caption without what nobody says: markup, addresses, invisible characters, and the phrases of stock libraries.

    Args:
        text: the caption as it was found.
        filters: the limits.

    Returns:
        The cleaned caption, in one line; and the reason why it is refused, or None.
    """
    for _ in range(2):  # captions from the web are often escaped twice
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = "".join(" " if letter.isspace() else letter for letter in text if _is_visible(letter))
    text = _EMPTY_BRACKETS.sub("", _URL.sub("", _TAG.sub("", _BLOCK_TAG.sub(" ", text))))
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for _ in range(4):  # "…, 4K, stock footage"
        text = _HEAD.sub("", _TAIL.sub("", text))
    if not (words := count_words(text)):
        return "", "no caption"
    if words < filters.min_words:
        return text, f"caption too short ({words} word{'s' * (words > 1)}; min_words is {filters.min_words})"
    if filters.max_words is not None and words > filters.max_words:
        return text, f"caption too long ({words} words; max_words is {filters.max_words})"
    return text, None


def count_words(text: str) -> int:
    """How many words a caption has; a Chinese or Japanese character is one, punctuation and emoji are none."""
    return sum(len(_SYLLABIC.findall(word)) or 1 for word in text.split() if any(map(str.isalnum, word)))


def _is_visible(letter: str) -> bool:
    """Whether a character belongs to the text; control and format characters, halves and private ones do not."""
    return letter in _JOINERS or letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf", "Co", "Cs")
