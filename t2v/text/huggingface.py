"""Base class of the encoders that run in `transformers`."""

import logging
import sys
import warnings
from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from t2v.batch import TextEmbedding
from t2v.errors import check_range
from t2v.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
"""torchao, which transformers imports, calls a function that PyTorch warns about."""


def hide_bar_in_logs() -> None:
    """Let transformers draw no bar of loaded weights where the standard error is no terminal."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


MAX_LENGTH = 256
"""Text tokens to which longer captions are truncated by default."""


class HuggingFaceTextEncoder(TextEncoder):
    """Text encoder with a tokenizer and a model of `transformers`.

    Args:
        max_length: Number of text tokens to which longer captions are truncated.
    """

    def __init__(self, max_length: int) -> None:
        check_range(self, "[1, inf)", max_length=max_length)
        self.max_length = max_length

    @property
    def _truncation(self) -> str:
        """The part of the name that says to how many text tokens captions are truncated, if not by default."""
        return "" if self.max_length == MAX_LENGTH else f", {self.max_length} text tokens"

    @abstractmethod
    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer."""

    @abstractmethod
    def _load_model(self) -> "PreTrainedModel":
        """Load the weights, in `self.dtype`."""

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._load_tokenizer()

    @cached_property
    def _model(self) -> "PreTrainedModel":
        return self._load_model().eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(self, caption: str) -> Float[Tensor, "l d"]:
        """Embed one caption; see `TextEncoder.embed`."""
        model = self._model.to(self.device, self.dtype)
        ids = torch.tensor([self._token_ids(caption)], device=self.device)
        tokens: Tensor = model(input_ids=ids).last_hidden_state[0].float()
        return tokens

    @torch.inference_mode()
    def encode_batch(self, captions: list[str]) -> TextEmbedding:
        """Embed captions, padded to the longest, in one pass; see `TextEncoder.encode_batch`."""
        if not captions:
            return self.encode(captions)
        model = self._model.to(self.device, self.dtype)
        unpadded = [torch.tensor(self._token_ids(caption)) for caption in captions]
        ids = pad_sequence(unpadded, batch_first=True).to(self.device)
        lengths = torch.tensor([len(each) for each in unpadded])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        tokens = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        return TextEmbedding(tokens.masked_fill(~mask[..., None], 0.0), mask)

    def _token_ids(self, caption: str) -> list[int]:
        ids: list[int] = self._tokenizer(caption, verbose=False).input_ids
        if len(ids) > self.max_length:
            warnings.warn(
                f"A caption of {len(ids)} text tokens is truncated to max_length={self.max_length}: "
                f"{caption[:60]!r}...",
                stacklevel=2,
            )
            ids = self._tokenizer(caption, truncation=True, max_length=self.max_length).input_ids
        return ids
