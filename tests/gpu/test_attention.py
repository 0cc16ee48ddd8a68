"""FlexAttention, which compiled layers use on a GPU, gives what attention in chunks gives."""

import pytest
import torch

from t2v.transformer.attention import causal_attention, flex_window_attention

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
