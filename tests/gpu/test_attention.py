"""FlexAttention, which compiled layers use on a GPU, gives what attention in chunks gives."""

import pytest
import torch
import torch.nn.functional as F

from t2v.batch import TextEmbedding
from t2v.transformer.attention import causal_attention, flex_window_attention, row_attention
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from tests.gpu.conftest import time_graph

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}
"""Largest difference, relative to the largest value; float32 may be computed in TF32."""


def attend_and_differentiate(function, inputs, window):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs, window)
    output.float().square().sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.usefixtures("needs_gpu")  # there is no backward pass on the CPU
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_flex_attention_equals_chunks_forward_and_backward(device, record, dtype, compiled):
    positions, window = 1024, 512
    inputs = [torch.randn(2, heads, positions, 64, device=device, dtype=dtype) for heads in (8, 2, 2)]
    flex = torch.compile(flex_window_attention) if compiled else flex_window_attention
    expected = attend_and_differentiate(causal_attention, inputs, window)
    found = attend_and_differentiate(flex, inputs, window)
    errors = {}
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        errors[name] = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
    record("flex attention", **{f"{str(dtype)[6:]} {'compiled' if compiled else 'eager'}": errors})
    assert max(errors.values()) < TOLERANCE[dtype]


@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_compiled_layers_have_the_gradients_of_uncompiled_ones(device, record, checkpointing):
    """With more frames than the window, so that temporal layers use FlexAttention with blocks that they share.

    Some blocks of 128 positions are wholly in the window of 384, others partly.
    """
    grid, frames, window = 8, 10, 6
    options = {"attention": AttentionConfig(heads=4, kv_heads=2, window=window), "text": TextConfig(dim=32)}
    model = VideoTransformer(64, grid, 128, 1, 2, 256, **options, checkpointing=checkpointing).to(device)
    tokens = torch.randint(64, (2, frames, grid, grid), device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    text = TextEmbedding(torch.randn(2, 7, 32, device=device), mask)
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.compile_layers()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens, text).flatten(0, 3), tokens.flatten()).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    plain, found = gradients
    error = ((found - plain).abs().max() / plain.abs().max()).item()
    record("compiled layers", **{checkpointing: error})
    assert error < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("keys", [128, 256, 512, 4096])
def test_speed_of_the_attention_of_a_row(device, record, keys):
    """Microseconds in CUDA graphs of compiled code, as in decoding, with 8 key heads and keys that no cache holds."""
    sets = 24
    q, mask = torch.randn(1, 8, 4, 128, device=device, dtype=torch.bfloat16), torch.rand(1, 1, 1, keys) < 0.9
    pairs = [torch.randn(2, 1, 8, keys, 128, device=device, dtype=torch.bfloat16).unbind() for _ in range(sets)]
    mask = mask.to(device)
    functions = {"PyTorch's": F.scaled_dot_product_attention, "ours": row_attention}
    microseconds = {}
    for name, function in functions.items():
        compiled = torch.compile(function, dynamic=False)

        def run(compiled=compiled):
            return [compiled(q, k, v, mask) for k, v in pairs]

        with torch.inference_mode():
            seconds, outputs = time_graph(run, 20)
        microseconds[name] = 1e6 * seconds / sets
        expected = F.scaled_dot_product_attention(q.double(), *(each.double() for each in pairs[0]), attn_mask=mask)
        assert (outputs[0] - expected).norm() < 0.01 * expected.norm()
    record("attention of a row, microseconds", **{f"{keys} keys": microseconds})
