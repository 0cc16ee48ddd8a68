"""Parallel decoding gives the videos of decoding one token after the other, and those follow the probabilities."""

from itertools import product

import pytest
import torch
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import Cosine, Interval, Linear, Sampler
from t2v.generation.decode import generate_frames
from t2v.generation.parallel import next_positions
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer

TEXT_DIM = 6
SAMPLERS = [
    Sampler(),
    Sampler(temperature=Linear(2.0, 0.5)),
    Sampler(top_k=3),
    Sampler(top_p=0.8, temperature=0.7),
    Sampler(typical_p=0.9, min_p=0.05),
]
GUIDANCE = [1.0, 2.5, Linear(3.0, 1.0), Interval(4.0, 0.0, 0.4), Interval(3.0, 0.5, 1.0), Cosine(0.0, 2.0)]


def network(seed: int, grid: int = 2, vocabulary: int = 12, window: int = 2) -> VideoTransformer:
    """Build a small model in float64 with random weights, for which tokens depend on each other and on the text."""
    torch.manual_seed(seed)
    attention, text = AttentionConfig(heads=2, kv_heads=1, window=window), TextConfig(TEXT_DIM, gate=seed % 2 == 0)
    model = VideoTransformer(vocabulary, grid, 16, 1, 1, 16, attention, text).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return model


def texts(videos: int) -> TextEmbedding:
    mask = torch.arange(4) < torch.arange(videos)[:, None] % 4 + 1
    tokens = torch.randn(videos, 4, TEXT_DIM)
    return TextEmbedding(tokens.double(), mask)


def video(*args, **kwargs) -> tuple[Tensor, int]:
    """Return the tokens and the number of passes."""
    stream = generate_frames(*args, **kwargs)
    return torch.cat(list(stream), dim=1), stream.passes


def compare(seed: int, videos: int, positions: list[int]) -> None:
    """Compare decoding of random videos by passes of several sizes with sequential decoding."""
    grid, window, start_frames = 2 + seed % 2, 1 + seed % 3, (0, 0, 1, 3)[seed % 4]
    model = network(seed, grid, window=window)
    text, sampler, guidance = texts(videos), SAMPLERS[seed % len(SAMPLERS)], GUIDANCE[seed // 2 % len(GUIDANCE)]
    start = torch.randint(12, (videos, start_frames, grid, grid)) if start_frames else None
    arguments = model, text, start_frames + 4, sampler, range(seed, seed + videos), guidance, start
    sequential, passes = video(*arguments)
    assert passes == 4 * grid * grid
    for each in positions:
        found, fewer = video(*arguments, parallel=each)
        assert torch.equal(found, sequential), (seed, each)
        assert fewer <= passes


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("seed", range(6))
def test_parallel_decoding_equals_sequential_decoding(seed):
    """Passes of 2 and of 7 positions, a row, a frame, two frames, and as many as drafts are right for."""
    grid = 2 + seed % 2
    compare(seed, 5, [2 if seed % 3 else 7, (grid, grid**2, 2 * grid**2)[seed % 3], "auto"])


@pytest.mark.slow
def test_a_thousand_videos_equal_sequential_decoding():
    for seed in range(40):
        grid = 2 + seed % 2
        compare(100 + seed, 25, [1, 2, 7, grid, grid**2, 2 * grid**2, "auto"])


def test_drafts_that_are_right_save_passes():
    """A model that always repeats the frame before: after the first frame, all drafts are right."""
    model = network(0)
    text, sampler = texts(2), Sampler(top_k=1)
    start = torch.randint(12, (2, 1, 2, 2))
    with torch.no_grad():
        for block in model.blocks:
            for out in (block.attention.out, block.text_attention.out, block.mlp.out):
                out.weight.zero_()
        model.token_embedding.weight.zero_()
        model.previous_frame.mix.weight.zero_()
        model.previous_frame.mix.weight[:, :, 1, 1] = 1
        model.previous_frame.embedding.weight.copy_(torch.eye(12, 16))
        model.head.weight.copy_(torch.eye(12, 16))
    found, passes = video(model, text, 9, sampler, [0, 1], start=start, parallel=8)
    assert torch.equal(found, start.expand(-1, 8, -1, -1))
    assert passes == 4


@pytest.mark.parametrize("parallel", [1, 3])
def test_frequencies_are_the_models_probabilities(parallel):
    """All 3⁴ videos of one frame, and 4,000 samples."""
    model, samples, vocabulary = network(3, vocabulary=3), 4000, 3
    text = TextEmbedding(*(each[:1] for each in texts(1)))
    every = torch.tensor(list(product(range(vocabulary), repeat=4)))
    with torch.inference_mode():
        repeated = TextEmbedding(*(each.expand(len(every), *each.shape[1:]) for each in text))
        log_p = model(every.view(-1, 1, 2, 2), repeated).log_softmax(-1).flatten(1, 3)
    expected = samples * log_p.gather(-1, every[..., None])[..., 0].sum(1).exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(float(samples)).double())
    many = TextEmbedding(*(each.expand(samples, *each.shape[1:]) for each in text))
    found, _ = video(model, many, 1, Sampler(), range(samples), parallel=parallel)
    number = (found.flatten(1) * vocabulary ** torch.arange(3, -1, -1)).sum(1)
    counts = torch.bincount(number, minlength=len(every))
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()  # χ²
    freedom = int(common.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert abs(counts[~common].sum() - expected[~common].sum()) < 5 * expected[~common].sum().clamp(min=1) ** 0.5


@pytest.mark.parametrize("parallel", [0, -3])
def test_an_invalid_number_of_tokens_is_refused(parallel):
    with pytest.raises(UserError, match=f"parallel={parallel} must be at least 1 .* or auto"):
        generate_frames(network(0), texts(1), 2, Sampler(), [0], parallel=parallel)


@pytest.mark.parametrize(("compiled", "expected"), [(False, [1, 2, 8, 16, 32]), (True, [1, 1, 8, 32, 32])])
def test_a_pass_has_fewer_positions_where_drafts_are_wrong(compiled, expected):
    assert [next_positions(right, 32, compiled) for right in (0.0, 0.5, 2.0, 5.0, 20.0)] == expected
    assert next_positions(20.0, 4, compiled) == 4
