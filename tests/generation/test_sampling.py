"""Sampling against the warpers of `transformers`, and what seeds promise."""

import pytest
import torch
from transformers.generation import logits_process as reference

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation.decode import generate_frames
from t2v.generation.sampling import Sampler
from t2v.transformer.model import VideoTransformer


@pytest.mark.parametrize(
    ("arguments", "warpers"),
    [
        ({"temperature": 0.7}, [reference.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [reference.TopKLogitsWarper(5)]),
        ({"top_k": 500}, [reference.TopKLogitsWarper(500)]),
        ({"top_p": 0.8}, [reference.TopPLogitsWarper(0.8)]),
        ({"typical_p": 0.6}, [reference.TypicalLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [reference.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
            [
                reference.TemperatureLogitsWarper(1.3),
                reference.TopKLogitsWarper(20),
                reference.TopPLogitsWarper(0.9),
                reference.MinPLogitsWarper(0.02),
            ],
        ),
    ],
)
def test_filters_equal_those_of_transformers(arguments, warpers):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(Sampler(**arguments).filter(logits), expected)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = [torch.Generator().manual_seed(0)]
    draws = torch.stack([Sampler()(probabilities.log()[None], generator) for _ in range(4000)]).flatten()
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, probabilities, atol=0.025, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"typical_p": 0.0}, "typical_p=0.0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Sampler(**arguments)


@pytest.fixture(scope="module")
def model() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(16, 2, 16, 1, 1, 2, 1, 24, 8, 2).eval()


def texts(batch: int) -> TextEmbedding:
    generator = torch.Generator().manual_seed(5)
    return TextEmbedding(
        torch.randn(batch, 3, 8, generator=generator),
        torch.ones(batch, 3, dtype=torch.bool),
        torch.randn(batch, 8, generator=generator),
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_video_depends_on_its_own_text_and_seed_alone(model, guidance):
    text = texts(3)
    together = torch.cat(list(generate_frames(model, text, 4, Sampler(), [7, 8, 9], guidance)), dim=1)
    alone = TextEmbedding(*(tensor[1:2] for tensor in text))
    single = torch.cat(list(generate_frames(model, alone, 4, Sampler(), [8], guidance)), dim=1)
    assert torch.equal(together[1:2], single)


def test_frames_come_out_one_by_one_and_other_seeds_give_other_videos(model):
    stream = generate_frames(model, texts(2), 50, Sampler(), [1, 2])
    first = next(stream)
    assert first.shape == (2, 1, 2, 2)
    again = next(generate_frames(model, texts(2), 1, Sampler(), [1, 3]))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], again[1])


def test_wrong_numbers_are_refused(model):
    with pytest.raises(UserError, match="frames=0"):
        next(generate_frames(model, texts(1), 0, Sampler(), [1]))
    with pytest.raises(UserError, match="1 seeds for 2 texts"):
        next(generate_frames(model, texts(2), 1, Sampler(), [1]))
