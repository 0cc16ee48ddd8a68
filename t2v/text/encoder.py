"""What every text encoder offers.

- Weights are loaded when the first caption comes, so that an encoder is free to construct, to print and to configure.
- `encode` takes every caption alone, without padding: its embedding is the same whatever else is in the batch, bit for
  bit, and the same when a prompt is encoded years after the training set. `encode_together` is for training sets: one
  pass for many captions, equal within rounding.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from t2v.batch import TextEmbedding


class TextEncoder(ABC):
    """Turns captions into embeddings; frozen, and no part of any model's weights."""

    device: torch.device = torch.device("cpu")

    @property
    @abstractmethod
    def name(self) -> str:
        """Which weights these are; token shards carry it, so that training and generation agree."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Length of every embedding vector."""

    @abstractmethod
    def embed(self, caption: str) -> tuple[Float[Tensor, "l d"], Float[Tensor, " d"]]:
        """Embed one caption.

        Args:
            caption: May be empty.

        Returns:
            One vector a word piece, at least one, and one vector for the whole caption; float32.
        """

    def to(self, device: torch.device | str) -> None:
        """Compute there, and return embeddings that lie there."""
        self.device = torch.device(device)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> TextEmbedding:
        """Embed captions.

        Args:
            captions: Any number, in any order; an empty string is a caption too.

        Returns:
            float32 embeddings on this encoder's device. Padding is zero.
        """
        if not captions:
            nothing = torch.zeros(0, 0, self.width, device=self.device)
            return TextEmbedding(nothing, nothing.new_zeros(0, 0, dtype=torch.bool), nothing.new_zeros(0, self.width))
        tokens, pooled = zip(*map(self.embed, captions), strict=True)
        ones = [torch.ones(len(t), dtype=torch.bool, device=t.device) for t in tokens]
        return TextEmbedding(
            tokens=pad_sequence(list(tokens), batch_first=True),
            mask=pad_sequence(ones, batch_first=True),
            pooled=torch.stack(pooled),
        )

    def encode_together(self, captions: list[str]) -> TextEmbedding:
        """Embed captions in one pass, where the encoder can: faster than `encode`, and equal to it within rounding.

        Args:
            captions: As for `encode`, no more than fit into memory at once.

        Returns:
            What `encode` returns.
        """
        return self.encode(captions)
