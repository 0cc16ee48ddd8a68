"""Decoding on a GPU: no value passes between host and GPU inside the loop over tokens, and NaN logits draw nothing."""

from functools import cache
from itertools import pairwise

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import Linear, Sampler
from t2v.generation.decode import generate_frames
from t2v.generation.parallel import Parallel
from t2v.generation.text_to_video import TextToVideo
from tests.cuda_policy.toys import CODES, TEXT_DIM, PromptEncoder, transformer, vqvae
from tests.support.cuda_policy import fake_cuda, to_fake_cuda


@cache
def reads_by_frame(grid: int, frames: int, parallel: Parallel = 1) -> list[int]:
    """The number of reads by the host for each frame; the first includes those at the start of the video.

    What is read has no data, so that a parallel pass makes one token final.
    """
    network, tokenizer = (build(grid).eval().requires_grad_(False) for build in (transformer, vqvae))
    with fake_cuda() as reads:
        model = TextToVideo(to_fake_cuda(network), to_fake_cuda(tokenizer), PromptEncoder(), fps=8.0)
        model.text_encoder.to("cuda")
        stream = model.stream("a red ball", frames, 3, None, Linear(3.0, 1.0), Sampler(top_p=0.9, top_k=8), parallel)
        counts = [0]
        for _ in stream:
            counts.append(len(reads.places))
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.usefixtures("unchecked_shapes")
def test_reads_by_the_host_do_not_depend_on_the_number_of_tokens_or_frames():
    two_by_two = reads_by_frame(grid=2, frames=3)
    three_by_three = reads_by_frame(grid=3, frames=2)
    assert set(two_by_two[1:] + three_by_three[1:]) == {two_by_two[-1]}
    assert two_by_two[-1] <= 2
    assert two_by_two[0] == three_by_three[0]


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_host_reads_once_in_each_parallel_pass():
    sequential, parallel = reads_by_frame(grid=2, frames=3), reads_by_frame(grid=2, frames=3, parallel="auto")
    assert parallel[1:] == [each - 1 + 4 for each in sequential[1:]]  # progress and logits are checked together


@pytest.mark.parametrize("embedded", [False, True], ids=["prompt", "embedding"])
def test_a_text_encoder_on_the_cpu_serves_models_in_bfloat16_on_the_gpu(embedded):
    network, tokenizer = (build().bfloat16().eval().requires_grad_(False) for build in (transformer, vqvae))
    with fake_cuda() as reads:
        model = TextToVideo(to_fake_cuda(network), to_fake_cuda(tokenizer), PromptEncoder(), fps=8.0)
        assert model.text_encoder.device.type == "cpu"
        text = model.embed(["a red ball", "two"])
        assert {each.device.type for each in text} == {"cuda"}
        assert text.tokens.dtype == torch.bfloat16
        assert len(reads.places) == len(text)  # one copy each
        prompts = TextEmbedding(*(each.to("cpu") for each in text)) if embedded else ["a red ball", "two"]
        frames = list(model.stream(prompts, 2, guidance=3.0))
    assert [(frame.device.type, frame.shape) for frame in frames] == [("cuda", (2, 1, 3, 16, 16))] * 2


def text_for(videos: int) -> TextEmbedding:
    mask = torch.ones(videos, 3, dtype=torch.bool)
    return TextEmbedding(torch.randn(videos, 3, TEXT_DIM), mask)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_weights_that_are_not_finite_stop_generation_with_the_frame(guidance):
    network = transformer().eval()
    network.norm.weight.data[0] = torch.nan
    frames = generate_frames(network, text_for(2), 3, Sampler(), [0, 1], guidance)
    with pytest.raises(UserError, match=r"frame 0 .* weights .* NaN"):
        next(frames)


def test_an_overflow_stops_generation_with_the_frame():
    network = transformer().eval()
    frames = generate_frames(network, text_for(1), 3, Sampler(), [0])
    assert next(frames).max() < CODES
    hook = network.blocks[0].mlp.out.register_forward_hook(lambda _, __, y: torch.full_like(y, torch.inf))
    with pytest.raises(UserError, match=r"frame 1 .* overflow"):
        next(frames)
    hook.remove()


def test_a_token_drawn_from_nan_is_in_range():
    logits = torch.full((2, CODES), torch.nan)
    tokens = Sampler(top_p=0.5)(logits, torch.zeros(2, CODES))
    assert tokens.max() < CODES
