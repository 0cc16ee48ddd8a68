"""Incremental decoding against the full forward pass."""

import copy
import shutil

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer.config import AttentionConfig
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.support.toys import random_text, random_tokens, toy_transformer

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


@torch.inference_mode()
def decode(
    model: VideoTransformer, tokens: torch.Tensor, text: TextEmbedding, start_frames: int = 0, compiled: bool = False
) -> torch.Tensor:
    """Return the logits of the positions after the start frames, computed one position at a time."""
    decoder = Decoder(model, text, compiled=compiled)
    last = None
    if start_frames:
        decoder.prefill(tokens[:, :start_frames])
        last = tokens[:, start_frames - 1, -1, -1]
    logits = []
    for token in tokens[:, start_frames:].flatten(1).unbind(1):
        logits.append(decoder.step(last))
        last = token
    return torch.stack(logits, dim=1)


@torch.inference_mode()
def forward(model: VideoTransformer, tokens: torch.Tensor, text: TextEmbedding) -> torch.Tensor:
    return model(tokens, text).flatten(1, 3)


@pytest.mark.parametrize(("window", "batch"), [(1, 2), (4, 1), (32, 2)])
def test_decoding_equals_the_full_forward(window, batch):
    model, tokens, text = toy_transformer(window), random_tokens(batch, 10), random_text(batch)
    full, cached = forward(model, tokens, text), decode(model, tokens, text)
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    assert torch.equal(cached.argmax(-1), full.argmax(-1))


@pytest.mark.parametrize("start_frames", [1, 3, 4, 11])
def test_decoding_after_start_frames_equals_the_full_forward(start_frames):
    model, tokens, text = toy_transformer(window=4), random_tokens(2, 13), random_text(2)
    cached = decode(model, tokens, text, start_frames)
    torch.testing.assert_close(cached, forward(model, tokens, text)[:, start_frames * 4 :], atol=1e-4, rtol=1e-4)


def test_a_bfloat16_model_decodes_in_bfloat16():
    model, tokens = toy_transformer().to(torch.bfloat16), random_tokens(1, 6)
    text = TextEmbedding(*(x.to(torch.bfloat16) if x.is_floating_point() else x for x in random_text()))
    full = forward(model, tokens, text)
    assert full.dtype == torch.bfloat16
    torch.testing.assert_close(decode(model, tokens, text), full, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_under_autocast_equals_the_full_forward(batch):
    model, tokens, text = toy_transformer(), random_tokens(batch), random_text(batch)
    full = forward(model, tokens, text)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decode(model, tokens, text).float(), full, atol=0.1, rtol=0.1)


def test_caches_hold_one_frame_or_the_window():
    decoder = Decoder(toy_transformer(window=4), random_text())
    assert {cache.keys.shape[2] for cache in decoder.caches} == {4, 16}


@needs_compiler
@pytest.mark.slow
def test_compiled_decoding_equals_the_full_forward():
    model, tokens, text = toy_transformer(2, spatial_layers=1, temporal_layers=1), random_tokens(), random_text()
    compiled = decode(model, tokens, text, compiled=True)
    torch.testing.assert_close(compiled, forward(model, tokens, text), atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_every_model_runs_its_own_compiled_code():
    """No guards on modules are checked: without isolation the tied model would run the code of the other."""
    model = toy_transformer(2, spatial_layers=1, temporal_layers=0)
    tied = toy_transformer(2, spatial_layers=1, temporal_layers=0, tied_head=True)
    same = copy.deepcopy(model)
    same.head.weight.data.neg_()
    tokens, text = random_tokens(), random_text()
    for each in (model, tied, same):
        compiled = decode(each, tokens, text, compiled=True)
        torch.testing.assert_close(compiled, forward(each, tokens, text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("token", [-1, 24])
def test_start_frames_with_a_token_out_of_range_are_refused(token):
    tokens = torch.full((1, 2, 2, 2), token)
    with pytest.raises(UserError, match=f"Token {token} is outside the codebook"):
        Decoder(toy_transformer(), random_text()).prefill(tokens)


def test_start_frames_of_another_grid_are_refused():
    with pytest.raises(UserError, match="3×2 tokens, but the transformer's grid is 2×2"):
        Decoder(toy_transformer(), random_text()).prefill(torch.zeros(1, 1, 3, 2, dtype=torch.long))


def test_heads_of_one_group_decode_too():
    """As many key heads as query heads, and a single key head."""
    for kv_heads in (1, 4):
        model = toy_transformer(attention=AttentionConfig(4, kv_heads, window=2))
        tokens, text = random_tokens(), random_text()
        torch.testing.assert_close(decode(model, tokens, text), forward(model, tokens, text), atol=1e-4, rtol=1e-4)
