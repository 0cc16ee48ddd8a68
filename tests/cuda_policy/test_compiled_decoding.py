"""Compiled decoding compiles the same few graphs whatever the prompts are, and never runs uncompiled instead."""

from functools import partial

import pytest
import torch
import torch._dynamo

from t2v.batch import TextEmbedding
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.cuda_policy.toys import TEXT_DIM, transformer


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled, which run uncompiled here."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return compiled


def decode(model: VideoTransformer, videos: int, text_tokens: int, compiled: bool = True) -> torch.Tensor:
    """Logits of two frames."""
    generator = torch.Generator().manual_seed(text_tokens)
    text = TextEmbedding(
        torch.randn(videos, text_tokens, TEXT_DIM, generator=generator),
        torch.ones(videos, text_tokens, dtype=torch.bool),
        torch.randn(videos, TEXT_DIM, generator=generator),
    )
    decoder, token, logits = Decoder(model, text, compiled=compiled), None, []
    for _ in range(2 * model.grid_size**2):
        logits.append(decoder.step(token))
        token = logits[-1].argmax(-1)
    return torch.stack(logits)


@torch.inference_mode()
@torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3)
def test_prompts_of_all_lengths_share_graphs_and_other_batches_are_compiled_too(graphs):
    model = transformer().eval()
    for length in (7, 1, 5, 13, 32):
        torch.testing.assert_close(decode(model, 2, length), decode(model, 2, length, compiled=False))
        assert len(graphs) == 2  # one for each number of frames that temporal layers read
    decode(model, 1, 3)
    assert len(graphs) == 4
