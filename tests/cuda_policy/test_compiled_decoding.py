"""Compiled decoding compiles the same few graphs whatever the prompts are, and never runs uncompiled instead."""

from functools import partial
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from t2v.batch import TextEmbedding
from t2v.generation import Interval, Linear, Sampler, Schedule
from t2v.generation.decode import generate_frames
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.cuda_policy.toys import TEXT_DIM, transformer
from tests.support import forked


def tokens(
    model: VideoTransformer, videos: int, text_tokens: int, frames: int, guidance: float | Schedule, compiled: bool
) -> Tensor:
    """Generate videos with passes of four positions."""
    generator = torch.Generator().manual_seed(text_tokens)
    text = TextEmbedding(
        torch.randn(videos, text_tokens, TEXT_DIM, generator=generator),
        torch.ones(videos, text_tokens, dtype=torch.bool),
    )
    stream = generate_frames(model, text, frames, Sampler(), range(videos), guidance, compiled=compiled, parallel=4)
    return torch.cat(list(stream), dim=1)


@torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3)
def check_graphs() -> None:
    """Count the graphs that are compiled, which run uncompiled here."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = transformer().eval()
    cases = [(2, words, frames, 1.0) for words, frames in ((7, 3), (1, 1), (13, 12), (32, 2), (77, 5))]
    guided = [(1, 3, 5, guidance) for guidance in (3.0, Linear(3.0, 1.0), Interval(2.0, 0.2, 0.9))]
    # Half of the frames or all of them are computed with text only.
    partly = [(1, 3, 4, guidance) for guidance in (Interval(2.0, 0.0, 0.5), Interval(2.0, 0.6, 1.0), 1.0)]
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        generated = []
        for case in [*cases, *guided]:  # 2 videos, and 1 in 2 branches
            generated.append(tokens(model, *case, compiled=True))
            assert len(graphs) == 1, len(graphs)
        for case in partly:  # 1 in one branch
            generated.append(tokens(model, *case, compiled=True))
            assert len(graphs) == 2, len(graphs)
    for case, compiled in zip([*cases, *guided, *partly], generated, strict=True):
        assert torch.equal(tokens(model, *case, compiled=False), compiled)


def check_memory() -> None:
    """Compare the largest tensor that a pass allocates with the size of a cache."""
    model = transformer().eval()
    text = TextEmbedding(torch.zeros(1, 3, TEXT_DIM), torch.ones(1, 3, dtype=torch.bool))
    decoder = Decoder(model, text, compiled=True, positions=100 * model.grid_size**2)  # caches of over 100 frames
    cache = decoder.caches[0]
    recent, position = torch.zeros(1, 2 * model.grid_size**2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        decoder.logits(recent, position, stop=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            decoder.logits(recent, position, stop=1)
    events = profiled.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert 0 < largest < cache.keys.nbytes, (largest, cache.keys.nbytes)


def test_prompts_and_videos_of_all_lengths_share_a_graph_and_other_batches_are_compiled_too():
    """In a process without the checks of shapes, which are graphs of their own."""
    _run("check_graphs")


def test_a_compiled_pass_writes_to_the_caches_without_copying_them():
    _run("check_memory")


def _run(name: str) -> None:
    done = forked.run("-c", f"import {__name__} as module; module.{name}()")
    assert done.returncode == 0, done.stderr
