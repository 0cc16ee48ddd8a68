"""The interface of text encoders.

- Weights are loaded when the first caption is embedded, so that constructing and printing an encoder is cheap.
- `encode` embeds every caption alone, without padding, so that its embedding does not depend on the batch, bit for bit.
  `encode_batch` is for training sets: one pass for many captions, equal to `encode` up to rounding.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from t2v.batch import TextEmbedding


class TextEncoder(ABC):
    """Base class of frozen text encoders. They are not part of a model and not in its checkpoints.

    Every argument of `__init__` must be an attribute of the same name, to be saved.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    """Type of the weights. Embeddings are float32."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name and revision of the weights; stored in token shards, so that generation uses the same encoder."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the embeddings."""

    @abstractmethod
    def embed(self, caption: str) -> Float[Tensor, "l d"]:
        """Embed one caption.

        Args:
            caption: May be empty.

        Returns:
            An embedding per text token, at least one; float32.
        """

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Set the device of the computation and of the embeddings, and the type of the weights.

        Args:
            device: The device.
            dtype: The type; unchanged by default.
        """
        self.device = torch.device(device)
        self.dtype = dtype or self.dtype

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> TextEmbedding:
        """Embed captions one by one.

        Args:
            captions: Any number of captions; they may be empty strings.

        Returns:
            float32 embeddings on this encoder's device, with zeros as padding.
        """
        if not captions:
            tokens = torch.zeros(0, 0, self.width, device=self.device)
            mask = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
            return TextEmbedding(tokens, mask)
        embedded = [self.embed(caption) for caption in captions]
        return TextEmbedding(
            tokens=pad_sequence(embedded, batch_first=True),
            mask=pad_sequence([torch.ones_like(tokens[:, 0], dtype=torch.bool) for tokens in embedded], True),
        )

    def encode_batch(self, captions: list[str]) -> TextEmbedding:
        """Embed captions in one pass if the encoder can; faster than `encode`, and equal to it up to rounding.

        Args:
            captions: As for `encode`; as many as fit into memory.

        Returns:
            As `encode`.
        """
        return self.encode(captions)
