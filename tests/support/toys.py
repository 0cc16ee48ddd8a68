"""Toy models of a few thousand weights, for 2×2 tokens per frame of 16×16 pixels, and their inputs."""

import zlib
from typing import Any

import torch
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.text import TextEncoder
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import Quantizer, VectorQuantizer

VOCABULARY = 24
TEXT_DIM = 12


class WordEncoder(TextEncoder):
    """Text encoder with one random embedding per word.

    Args:
        width: Width of the embeddings.
    """

    def __init__(self, width: int = 8) -> None:
        self._width = width

    @property
    def name(self) -> str:
        return f"words-{self._width}"

    @property
    def width(self) -> int:
        return self._width

    def embed(self, caption: str) -> Tensor:
        seeds = [zlib.crc32(word.encode()) for word in caption.split()] or [0]
        words = [torch.randn(self._width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(words).to(self.device)


def toy_vqvae(quantizer: Quantizer | None = None, **changes: Any) -> VQVAE:
    """Build a toy VQ-VAE with random weights.

    Args:
        quantizer: By default a `VectorQuantizer` of 32 codes.
        changes: Other arguments of `VQVAE`.
    """
    arguments: dict[str, Any] = {
        "image_size": 16,
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "temporal_blocks": 1,
        "patch_size": 2,
        "latent_patch_size": 2,
        "quantizer": quantizer or VectorQuantizer(32, 4),
    }
    return VQVAE(**{**arguments, **changes})


_TEXT = TextConfig(TEXT_DIM, kernel_size=3)


def toy_transformer(window: int = 4, text: TextConfig = _TEXT, **changes: Any) -> VideoTransformer:
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
            if name.endswith("text_attention.out.weight"):
                parameter.normal_(std=0.2)
            elif name == "gate.out.weight":
                parameter.normal_()
    return model


def random_tokens(batch: int = 1, frames: int = 4) -> Tensor:
    """Return uniformly random tokens (b, t, 2, 2)."""
    return torch.randint(0, VOCABULARY, (batch, frames, 2, 2))


def random_text(batch: int = 1, length: int = 5) -> TextEmbedding:
    """Return random text embeddings without padding."""
    tokens, mask = torch.randn(batch, length, TEXT_DIM), torch.ones(batch, length, dtype=torch.bool)
    return TextEmbedding(tokens, mask)
