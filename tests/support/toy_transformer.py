"""A transformer of a few thousand weights, for 2×2 tokens per frame, and text embeddings for it."""

from typing import Any

import torch

from t2v.batch import TextEmbedding
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer

VOCABULARY = 24
TEXT_DIM = 12


def toy_transformer(window: int = 4, text: TextConfig = TextConfig(TEXT_DIM), **changes: Any) -> VideoTransformer:  # noqa: B008 (frozen)
    """Build a toy transformer in eval mode, always with the same weights.

    Weights of the text that are zero at initialization are random, so that they cannot hide errors.

    Args:
        window: Frames that temporal layers attend to.
        text: Options of text conditioning.
        changes: Other arguments of `VideoTransformer`.
    """
    torch.manual_seed(0)
    arguments = {
        "vocab_size": VOCABULARY,
        "grid_size": 2,
        "dim": 32,
        "spatial_layers": 2,
        "temporal_layers": 2,
        "hidden_dim": 48,
        "attention": AttentionConfig(heads=4, kv_heads=2, window=window),
        "text": text,
    }
    model = VideoTransformer(**{**arguments, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pooled.weight" or name.endswith("text_attention.out.weight"):
                parameter.normal_(std=0.2)
            elif name == "gate.out.weight":
                parameter.normal_()
    return model


def random_tokens(batch: int = 1, frames: int = 4) -> torch.Tensor:
    """Return uniformly random tokens (b, t, 2, 2)."""
    return torch.randint(0, VOCABULARY, (batch, frames, 2, 2))


def random_text(batch: int = 1, length: int = 5) -> TextEmbedding:
    """Return random text embeddings without padding."""
    tokens, mask = torch.randn(batch, length, TEXT_DIM), torch.ones(batch, length, dtype=torch.bool)
    return TextEmbedding(tokens, mask, torch.randn(batch, TEXT_DIM))
