"""Text encoders: captions and prompts to `TextEmbedding`."""

from t2v.text.encoder import TextEncoder
from t2v.text.minilm import MiniLMTextEncoder
from t2v.text.t5 import T5TextEncoder

__all__ = ["MiniLMTextEncoder", "T5TextEncoder", "TextEncoder"]
