"""What the encoders that run through `transformers` share."""

import warnings
from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from t2v.batch import TextEmbedding
from t2v.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HuggingFaceTextEncoder(TextEncoder):
    """An encoder made of a `transformers` tokenizer and model.

    Args:
        max_length: Word pieces after which a caption is cut.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    @abstractmethod
    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer."""

    @abstractmethod
    def _load_model(self) -> "PreTrainedModel":
        """Load the weights."""

    @abstractmethod
    def _pool(self, tokens: Float[Tensor, "l d"]) -> Float[Tensor, " d"]:
        """Make one vector of a caption's word pieces."""

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._load_tokenizer()

    @cached_property
    def _model(self) -> "PreTrainedModel":
        return self._load_model().eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(self, caption: str) -> tuple[Float[Tensor, "l d"], Float[Tensor, " d"]]:
        """Embed one caption; see `TextEncoder.embed`."""
        model = self._model.to(self.device)
        ids = torch.tensor([self._word_pieces(caption)], device=self.device)
        tokens = model(input_ids=ids).last_hidden_state[0].float()
        return tokens, self._pool(tokens)

    @torch.inference_mode()
    def encode_together(self, captions: list[str]) -> TextEmbedding:
        """Embed captions, padded to the longest, in one pass; see `TextEncoder.encode_together`."""
        if not captions:
            return self.encode(captions)
        model = self._model.to(self.device)
        pieces = [torch.tensor(self._word_pieces(caption)) for caption in captions]
        ids = pad_sequence(pieces, batch_first=True).to(self.device)
        lengths = torch.tensor([len(ids) for ids in pieces])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        tokens = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
        pooled = [self._pool(alone[:length]) for alone, length in zip(tokens, lengths.tolist(), strict=True)]
        return TextEmbedding(tokens, mask, torch.stack(pooled))

    def _word_pieces(self, caption: str) -> list[int]:
        ids = self._tokenizer(caption, verbose=False).input_ids
        if len(ids) > self.max_length:
            warnings.warn(
                f"A caption of {len(ids)} word pieces is cut to {self.max_length}: {caption[:60]!r}...", stacklevel=2
            )
            ids = self._tokenizer(caption, truncation=True, max_length=self.max_length).input_ids
        return ids
