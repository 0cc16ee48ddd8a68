"""Toy models that fit each other: 16 codes on a grid of 2×2, frames of 16×16 pixels."""

import zlib

import pytest
import torch
from torch import Tensor

from t2v.generation.text_to_video import TextToVideo
from t2v.text import TextEncoder
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import FSQuantizer


class WordEncoder(TextEncoder):
    """Text encoder with one random embedding per word."""

    def __init__(self, width: int = 8) -> None:
        self._width = width

    @property
    def name(self) -> str:
        return f"words-{self._width}"

    @property
    def width(self) -> int:
        return self._width

    def embed(self, caption: str) -> tuple[Tensor, Tensor]:
        seeds = [zlib.crc32(word.encode()) for word in caption.split()] or [0]
        words = [torch.randn(self._width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        tokens = torch.stack(words).to(self.device)
        return tokens, tokens.mean(0)


@pytest.fixture(scope="session")
def transformer() -> VideoTransformer:
    torch.manual_seed(0)
    model = VideoTransformer(
        vocab_size=16,
        grid_size=2,
        dim=16,
        spatial_layers=1,
        temporal_layers=1,
        hidden_dim=24,
        attention=AttentionConfig(heads=2, kv_heads=1, window=2),
        text=TextConfig(dim=8),
    )
    with torch.no_grad():  # so that tokens depend on the text and on each other
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    quantizer = FSQuantizer(levels=[4, 4])
    return VQVAE(
        image_size=16,
        base_channels=8,
        channel_multipliers=(1, 1),
        encoder_blocks=1,
        decoder_blocks=1,
        temporal_blocks=1,
        patch_size=2,
        latent_patch_size=2,
        quantizer=quantizer,
    ).eval()


@pytest.fixture
def model(transformer, vqvae) -> TextToVideo:
    return TextToVideo(transformer, vqvae, WordEncoder(), fps=8.0, frames=5)
