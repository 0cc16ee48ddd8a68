"""Clips of token shards, with the embeddings of their captions."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.captions import read_embedded_captions, read_metadata
from data.datasets.base import Clips
from data.members import TOKEN_TEXT_MEMBERS, missing_text
from data.plan import Bucket
from data.shards import Sample, ShardSet
from t2v.batch import TextEmbedding, TokenBatch

_NPY = b"\x93NUMPY\x01\x00"
"""First bytes of an npy file of version 1.0."""


class TokenClip(NamedTuple):
    """One clip of a `TokenBatch`."""

    tokens: Int[Tensor, "t h w"]
    text: Float[Tensor, "l d"]
    caption: str
    key: str


class TokenClips(Clips):
    """Tokenized clips with the embeddings of their captions.

    Args:
        shards: Shards whose samples have tokens.npy, text.npy and json.
        buckets: Length of the clips; of a longer clip a random window is taken.
        skipped_samples: JSON-lines file for the samples that cannot be used; see `Clips`.

    Raises:
        UserError: If no clip is left.
    """

    _kind = "tokens.npy"

    def __init__(self, shards: ShardSet, buckets: Sequence[Bucket], skipped_samples: Path | None = None) -> None:
        super().__init__(shards, buckets, skipped_samples=skipped_samples)

    @staticmethod
    def collate(clips: list[TokenClip]) -> TokenBatch:
        """Stack clips of equal length; shorter texts are padded with zeros, and the mask is False there."""
        tokens, texts, captions, keys = zip(*clips, strict=True)
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        text = TextEmbedding(pad_sequence(list(texts), batch_first=True), mask)
        return TokenBatch(torch.stack(tokens), text, list(captions), list(keys))

    @property
    def batch_bytes(self) -> int:
        """Upper bound of the size of a batch in bytes; text may be stored in half precision."""
        text = max(sample.members["text.npy"][1] for sample in self.samples)
        frame = 8 * max(sample.height * sample.width for sample in self.samples)
        return max(bucket.batch_size * (bucket.frames * frame + 3 * text) for bucket in self.buckets)

    def _member(self, sample: Sample) -> str | None:
        return "tokens.npy" if "tokens.npy" in sample.members else None

    def _flaw(self, sample: Sample, captioned: bool) -> str:
        return sample.flaw or missing_text(sample.members)

    def _load(self, sample: Sample, bucket: Bucket, rng: np.random.Generator | None) -> TokenClip:
        """Load a clip with one of its captions: a random one, or the first without a generator."""
        members = self.shards.read(sample, "tokens.npy", *TOKEN_TEXT_MEMBERS)
        tokens = _array(members["tokens.npy"])[self.window(sample, bucket, rng)].astype(np.int64)
        texts = _array(members["text.npy"])  # of all captions, one after another
        captions, lengths = read_embedded_captions(read_metadata(members), texts.shape[0] if texts.ndim else 0)
        if texts.ndim != 2:
            raise ValueError(f"its text.npy has the shape {texts.shape}, not (text tokens, width)")
        i = 0 if rng is None else int(rng.integers(len(captions)))
        start = sum(lengths[:i])
        text = torch.from_numpy(texts[start : start + lengths[i]].astype(np.float32))
        return TokenClip(torch.from_numpy(tokens), text, captions[i], sample.key)


def _array(content: bytes) -> Shaped[np.ndarray, "..."]:
    """Return the array of an npy file, read-only."""
    if not content.startswith(_NPY):
        return np.load(io.BytesIO(content), allow_pickle=False)
    start = len(_NPY) + 2 + int.from_bytes(content[8:10], "little")
    shape, fortran_order, dtype = _npy_header(content[:start])
    array = np.frombuffer(content, dtype, math.prod(shape), start)
    return array.reshape(shape, order="F" if fortran_order else "C")


@lru_cache
def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse a header; cached, since that takes longer than all else of a token clip, and few headers differ."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(content[len(_NPY) :]))
