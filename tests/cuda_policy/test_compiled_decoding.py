"""Compiled decoding compiles the same few graphs whatever the prompts are, and never runs uncompiled instead."""

import subprocess
import sys
from functools import partial
from unittest.mock import patch

import torch
import torch._dynamo

from t2v.batch import TextEmbedding
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.cuda_policy.toys import TEXT_DIM, transformer
from tests.support.pipeline import ROOT


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
def check_graphs() -> None:
    """Count the graphs that are compiled, which run uncompiled here."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = transformer().eval()
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        for length in (7, 1, 5, 13, 32):
            torch.testing.assert_close(decode(model, 2, length), decode(model, 2, length, compiled=False))
            assert len(graphs) == 2, len(graphs)  # one for each number of frames that temporal layers read
        decode(model, 1, 3)
        assert len(graphs) == 4, len(graphs)


def test_prompts_of_all_lengths_share_graphs_and_other_batches_are_compiled_too():
    """In a process without the checks of shapes, which are graphs of their own."""
    script = f"import {__name__} as module; module.check_graphs()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
