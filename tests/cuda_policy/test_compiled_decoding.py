"""Compiled decoding compiles the same few graphs whatever the prompts are, and never runs uncompiled instead."""

from functools import partial
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.generation import Interval, Linear, Sampler, Schedule
from t2v.generation.decode import generate_frames
from t2v.transformer.model import VideoTransformer
from tests.cuda_policy.toys import TEXT_DIM, transformer
from tests.support import forked


def tokens(model: VideoTransformer, videos: int, text_tokens: int, frames: int, guidance: float | Schedule) -> Tensor:
    """Generate videos with compiled passes of four positions."""
    generator = torch.Generator().manual_seed(text_tokens)
    text = TextEmbedding(
        torch.randn(videos, text_tokens, TEXT_DIM, generator=generator),
        torch.ones(videos, text_tokens, dtype=torch.bool),
        torch.randn(videos, TEXT_DIM, generator=generator),
    )
    arguments = model, text, frames, Sampler(), range(videos), guidance
    drawn = {
        compiled: torch.cat(list(generate_frames(*arguments, compiled=compiled, parallel=4)), dim=1)
        for compiled in (True, False)
    }
    assert torch.equal(drawn[True], drawn[False])
    return drawn[True]


@torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3)
def check_graphs() -> None:
    """Count the graphs that are compiled, which run uncompiled here."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = transformer().eval()
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        for words, frames in ((7, 3), (1, 1), (13, 12), (32, 2), (77, 5)):
            tokens(model, 2, words, frames, 1.0)
            assert len(graphs) == 1, len(graphs)
        for guidance in (3.0, Linear(3.0, 1.0), Interval(2.0, 0.5, 0.9)):  # 1 video in 2 branches
            tokens(model, 1, 3, 4, guidance)
            assert len(graphs) == 1, len(graphs)
        tokens(model, 1, 3, 4, 1.0)
        assert len(graphs) == 2, len(graphs)


def test_prompts_and_videos_of_all_lengths_share_a_graph_and_other_batches_are_compiled_too():
    """In a process without the checks of shapes, which are graphs of their own."""
    script = f"import {__name__} as module; module.check_graphs()"
    done = forked.run("-c", script)
    assert done.returncode == 0, done.stderr
