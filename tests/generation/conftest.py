"""Toy models that fit each other: 16 codes on a grid of 2×2, frames of 16×16 pixels."""

import pytest
import torch

from t2v.generation.text_to_video import TextToVideo
from t2v.transformer.config import TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import FSQuantizer
from tests.support.toys import WordEncoder, toy_transformer, toy_vqvae


@pytest.fixture(scope="session")
def transformer() -> VideoTransformer:
    model = toy_transformer(window=2, text=TextConfig(dim=8), vocab_size=16)
    with torch.no_grad():  # so that tokens depend on the text and on each other
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="session")
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return toy_vqvae(FSQuantizer(levels=[4, 4]), channel_multipliers=(1, 1)).eval()


@pytest.fixture
def model(transformer, vqvae) -> TextToVideo:
    return TextToVideo(transformer, vqvae, WordEncoder(), fps=8.0, frames=5)
