"""FlexAttention in compiled temporal layers: its blocks, which layers share, and its values and gradients."""

import jaxtyping
import pytest
import torch
from torch.nn.attention import flex_attention as flex_attention_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from t2v.transformer import model as model_module
from t2v.transformer.attention import causal_attention, flex_window_attention, window_blocks
from t2v.transformer.block import Block
from t2v.transformer.config import AttentionConfig
from t2v.transformer.rope import raster_positions, rotation_at
from tests.support.cuda_policy import fake_cuda, to_fake_cuda
from tests.support.toys import random_text, random_tokens, toy_transformer

CPU = torch.device("cpu")


def dense(count: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return which blocks are listed."""
    used = torch.zeros(columns.shape[2:], dtype=torch.bool)
    for row, number in enumerate(count[0, 0].tolist()):
        used[row, columns[0, 0, row, :number].long()] = True
    return used


@pytest.mark.parametrize("window", [1, 100, 128, 129, 255, 256, 257, 700, 5000])
@pytest.mark.parametrize("n", [128, 640, 1000])
def test_blocks_equal_those_of_create_block_mask(n, window):
    def in_window(batch, head, query, key):
        return (query >= key) & (query - key < window)

    expected: BlockMask = create_block_mask(in_window, None, None, n, n, "cpu")
    blocks = window_blocks(n, window, CPU)
    pairs = [
        (blocks.full_keys, (expected.full_kv_num_blocks, expected.full_kv_indices)),
        (blocks.full_queries, (expected.full_q_num_blocks, expected.full_q_indices)),
        (blocks.keys, (expected.kv_num_blocks, expected.kv_indices)),
        (blocks.queries, (expected.q_num_blocks, expected.q_indices)),
    ]
    for ours, theirs in pairs:
        assert torch.equal(dense(*ours), dense(*theirs))
        assert [each.dtype for each in ours] == [each.dtype for each in theirs]
        assert [each.shape for each in ours] == [each.shape for each in theirs]
        assert [each.stride() for each in ours] == [each.stride() for each in theirs]  # the kernels do not check it


@pytest.mark.parametrize("n", [256, 400])
def test_values_equal_attention_in_chunks(n):
    q, k, v = (torch.randn(1, heads, n, 16) for heads in (4, 2, 2))
    with torch.inference_mode():
        found = flex_window_attention(q, k, v, 130, window_blocks(n, 130, CPU))
    torch.testing.assert_close(found, causal_attention(q, k, v, 130))


@pytest.mark.parametrize("recompute_attention", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_layer_with_blocks_has_the_same_output_and_gradients(recompute_attention, monkeypatch):
    """By a backend that runs the captured graph uncompiled, since FlexAttention for the CPU has no backward pass."""
    monkeypatch.setattr(flex_attention_module, "_validate_device", lambda *tensors: None)  # which refuses it
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    frames, positions, window = 5, 64, 2
    block = Block(True, 32, 48, 12, AttentionConfig(4, 2), recompute_attention)
    torch.nn.init.normal_(block.text_attention.out.weight)
    x, text = torch.randn(2, frames, positions, 32), torch.randn(2, 3, 12)
    rotate = rotation_at(raster_positions(0, frames * positions, 8, 8, CPU), (4, 2, 2), 100.0)
    arguments = (text, torch.ones(2, 3, dtype=torch.bool), None, rotate, window)
    blocks = window_blocks(frames * positions, window * positions, CPU)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, backend=backend, dynamic=False, fullgraph=True)
    outputs = []
    for function, options in ((block, ()), (compiled, (blocks,))):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs, *arguments, *options)
        y.square().mean().backward()
        outputs.append([y.detach(), inputs.grad, *(weight.grad.clone() for weight in block.parameters())])
    for ours, plain in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-3)
    names = [module.print_readable(print_output=False) for module in graphs]
    assert any("flex_attention" in name for name in names)
    compiled(inputs, *arguments, window_blocks(frames * positions, window * positions, CPU))
    assert len(graphs) == 1  # blocks of another forward pass are other inputs of the same graph


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("attention", marks=pytest.mark.slow), "full"])
def test_all_layers_share_the_blocks_of_a_forward_on_a_gpu(checkpointing, monkeypatch):
    """On CUDA tensors without data, with layers that would be compiled."""
    made, used = [], []
    monkeypatch.setattr(model_module, "window_blocks", lambda *sizes: made.append(window_blocks(*sizes)) or made[-1])
    model = toy_transformer(window=2, temporal_layers=3, checkpointing=checkpointing)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: used.append((block.temporal, inputs[-1])))
    with fake_cuda(), torch.compiler.set_stance("force_eager"):
        to_fake_cuda(model)
        tokens, text = random_tokens(1, 4).cuda(), type(random_text())(*(each.cuda() for each in random_text()))
        model(tokens, text)
        assert made == []
        model.compile_layers()
        model(tokens[:, :2], text)
        assert made == []
        used.clear()
        model(tokens, text)
    assert len(made) == 1
    assert all(blocks is (made[0] if temporal else None) for temporal, blocks in used)
    assert [temporal for temporal, _ in used].count(True) == 3
