"""T5 and Flan-T5 encoders (https://arxiv.org/abs/1910.10683), common in text-to-video; XXL has width 4096."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from t2v.errors import UserError
from t2v.text.huggingface import MAX_LENGTH, HuggingFaceTextEncoder, hide_bar_in_logs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config


class T5TextEncoder(HuggingFaceTextEncoder):
    """Encoder of a T5 model. Text tokens are the last hidden states.

    Args:
        path_or_name: A folder saved by `transformers`, or a name on the Hugging Face hub, such as `google/t5-v1_1-xxl`.
        max_length: Number of text tokens to which longer captions are truncated.
    """

    def __init__(self, path_or_name: str, max_length: int = MAX_LENGTH) -> None:
        super().__init__(max_length)
        self.path_or_name = path_or_name

    @property
    def name(self) -> str:
        """Name of the folder or repository, with its revision if it is from the hub, and the truncation."""
        revision = getattr(self._config, "_commit_hash", None)
        return Path(self.path_or_name).name + (f"@{revision[:12]}" if revision else "") + self._truncation

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self._config.d_model)

    @cached_property
    def _config(self) -> "T5Config":
        from transformers import T5Config

        try:
            return T5Config.from_pretrained(self.path_or_name)
        except OSError as error:
            raise UserError(
                f"There is no T5 at {self.path_or_name!r}, neither a folder with config.json, weights and tokenizer "
                "nor an accessible model on the Hugging Face hub: correct path_or_name."
            ) from error

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        _ = self._config
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path_or_name)

    def _load_model(self) -> "PreTrainedModel":
        config = self._config
        from transformers import T5EncoderModel

        hide_bar_in_logs()
        return T5EncoderModel.from_pretrained(self.path_or_name, config=config, dtype=self.dtype)
