"""A toy model, and the page to play with that serves it."""

from collections.abc import Iterator

import pytest
import torch

from t2v import TextToVideo
from t2v.generation import Interval, Linear, Sampler
from t2v.transformer.config import TextConfig
from t2v.vqvae.quantizer import FSQuantizer
from tests.support.browser import free_port
from tests.support.toys import WordEncoder, toy_transformer, toy_vqvae


@pytest.fixture(scope="module")
def model() -> TextToVideo:
    torch.manual_seed(0)
    transformer = toy_transformer(window=2, text=TextConfig(dim=8), vocab_size=16)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    vqvae = toy_vqvae(FSQuantizer(levels=[4, 4]), channel_multipliers=(1, 1)).eval()
    sampler, guidance = Sampler(temperature=Linear(1.0, 0.7)), Interval(3.0, first=0.0, last=0.5)
    return TextToVideo(transformer, vqvae, WordEncoder(), 8.0, sampler, guidance, frames=5)


@pytest.fixture(scope="module")
def page(model) -> Iterator[str]:
    from t2v.app import serve

    page = serve(model, "Toy model", ["a red circle"], free_port(), wait=False)
    yield page.local_url
    page.close()
