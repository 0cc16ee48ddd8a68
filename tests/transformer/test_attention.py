"""Attention: windows, chunks and compiled code against plain references; rotary positions."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from t2v.transformer.attention import SelfAttention, causal_attention, flex_window_attention, row_attention
from t2v.transformer.model import VideoTransformer
from t2v.transformer.rope import raster_positions, rotation_at
from tests.support.toys import random_text, random_tokens, toy_transformer

needs_compiler = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler"),
]


def positions_with_gradient(model: VideoTransformer, frames: int, query: int) -> list[int]:
    """Return the positions whose input to the first layer has a gradient from the logits at `query`."""
    inputs = []

    def keep(_, args):
        args[0].requires_grad_().retain_grad()
        inputs.append(args[0])

    model.blocks[0].register_forward_pre_hook(keep)
    model(random_tokens(1, frames), random_text()).flatten(1, 3)[0, query].sum().backward()
    return inputs[0].grad.flatten(1, 2)[0].abs().sum(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_temporal_layer_attends_to_its_window_only(window):
    model = toy_transformer(window, spatial_layers=0, temporal_layers=1)
    assert positions_with_gradient(model, frames=5, query=17) == list(range(17 - 4 * window + 1, 18))


def test_a_spatial_layer_attends_to_its_own_frame_only():
    model = toy_transformer(spatial_layers=1, temporal_layers=0)
    assert positions_with_gradient(model, frames=4, query=10) == [8, 9, 10]


@pytest.mark.usefixtures("unchecked_shapes")  # tracing the checks takes long
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "eager"),
        *(pytest.param(dtype, "inductor", marks=needs_compiler) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_compiled_attention_in_chunks_equals_eager_attention(dtype, backend):
    attention = SelfAttention(32, heads=4, kv_heads=2)
    rotate = rotation_at(raster_positions(0, 320, 8, 8, torch.device("cpu")), (8, 0, 0), 100.0)
    x = torch.randn(2, 320, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        compiled = torch.compile(attention, dynamic=False, backend=backend)(x, rotate, 300)
        eager = attention(x, rotate, 300)
    torch.testing.assert_close(compiled, eager, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_flex_attention_equals_chunks():
    q, k, v = (torch.randn(1, heads, 160, 16) for heads in (4, 2, 2))
    with torch.inference_mode():
        flex = flex_window_attention(q, k, v, 48)
    torch.testing.assert_close(flex, causal_attention(q, k, v, 48, chunk=32))


@pytest.mark.parametrize(
    ("positions", "window"), [(64, 64), (200, 256), (512, 300), (512, 512), (700, 300), (700, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_chunks_equals_attention_with_a_full_mask(dtype, positions, window):
    inputs = [torch.randn(1, heads, positions, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    distance = torch.arange(positions)[:, None] - torch.arange(positions)
    mask = (distance >= 0) & (distance < window)
    exact = torch.nn.functional.scaled_dot_product_attention(*exact_inputs, attn_mask=mask, enable_gqa=True)
    chunked = causal_attention(*inputs, window)
    weights = torch.randn_like(exact)
    found = torch.autograd.grad((chunked.double() * weights).sum(), inputs)
    expected = torch.autograd.grad((exact * weights).sum(), exact_inputs)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    for computed, reference in zip((chunked, *found), (exact, *expected), strict=True):
        assert (computed - reference).abs().max() < tolerance * reference.abs().max().clamp(min=1)


def test_attention_scores_depend_only_on_differences_of_frame_numbers():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(frame: int) -> torch.Tensor:
        positions = torch.tensor([[frame, 1, 0], [frame + 5, 0, 1]])
        rotate = rotation_at(positions, (4, 2, 2), 100.0)
        return (rotate.at(slice(1))(q) * rotate.at(slice(1, None))(k)).sum()

    torch.testing.assert_close(score(0), score(295), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_of_a_row_equals_pytorchs(dtype, tolerance, masked):
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype) for n in (4, 50, 50))
    mask = torch.rand(2, 1, 1, 50) < 0.5 if masked else None
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    found = row_attention(q, k, v, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
