"""The transformer: parity with Llama, causality, text conditioning, checkpointing, saving."""

import shutil

import pytest
import torch
from torch import nn

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from tests.support.toys import TEXT_DIM, random_text, random_tokens, toy_transformer

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


def untrained(**changes) -> VideoTransformer:
    return VideoTransformer(24, 2, 32, 1, 1, 48, AttentionConfig(4, 2, window=4), TextConfig(TEXT_DIM), **changes)


def test_a_token_changes_no_logit_at_or_before_its_position():
    model, text, tokens = toy_transformer(), random_text(), random_tokens(1, 6)
    before = model(tokens, text).flatten(1, 3)
    for position in (0, 1, 7, 12, 22):
        changed = tokens.clone()
        changed.view(-1)[position] = (changed.view(-1)[position] + 1) % 24
        after = model(changed, text).flatten(1, 3)
        assert torch.equal(before[:, : position + 1], after[:, : position + 1])
        assert not torch.allclose(before[:, position + 1], after[:, position + 1])


def test_spatial_and_temporal_layers_are_interleaved():
    blocks = toy_transformer(spatial_layers=6, temporal_layers=4).blocks
    assert "".join("T" if block.temporal else "S" for block in blocks) == "SSTSTSSTST"


def test_a_logit_depends_on_no_later_token_and_on_no_token_outside_the_window():
    """By gradient with respect to the embedding of each token, and its embedding as part of the previous frame."""
    model = toy_transformer(2, spatial_layers=0, temporal_layers=1)
    embedded = []
    for table in (model.token_embedding, model.previous_frame.embedding):
        table.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    query = 17
    model(random_tokens(1, 6), random_text()).flatten(1, 3)[0, query].sum().backward()
    tokens, previous = (out.grad.flatten(0, -2).abs().sum(-1).nonzero().flatten().tolist() for out in embedded)
    assert tokens == list(range(query - 8, query))  # positions 10 … 17, whose inputs are one token earlier
    assert previous == list(range(4, 16))  # the frames before those of positions 10 … 17


@pytest.mark.slow
@needs_compiler
def test_compiled_layers_have_the_same_gradients_and_recompile_for_no_caption_length():
    eager, compiled = toy_transformer(), toy_transformer()
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_layers()
    tokens, graphs = random_tokens(2, 3), []
    for length in (5, 3, 9, 4):
        text = random_text(2, length)
        for model in (eager, compiled):
            model.zero_grad()
            model(tokens, text).square().mean().backward()
        for (name, ours), plain in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, msg=name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 4


@needs_compiler
@pytest.mark.slow
def test_layers_are_compiled_for_more_lengths_of_clips_than_the_default_limit():
    model, text, graphs = toy_transformer(spatial_layers=1, temporal_layers=0), random_text(), []
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        model.compile_layers()
        for frames in (1, 2):
            model(random_tokens(1, frames), text)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] > graphs[0]


def by_groups(*matrices: torch.Tensor, groups: int = 2) -> torch.Tensor:
    """Concatenate matrices so that the rows of each group are adjacent."""
    return torch.cat([matrix.unflatten(0, (groups, -1)) for matrix in matrices], dim=1).flatten(0, 1)


def test_logits_equal_llamas():
    """All tokens in one frame, no text, no QK-norm, rotary positions along one axis: Llama, with Llama's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    llama = LlamaForCausalLM(config).eval()
    model = VideoTransformer(24, 2, 32, 3, 0, 48, AttentionConfig(4, 2), TextConfig(TEXT_DIM)).eval()
    model.rope_dims = (0, 0, 8)
    theirs = llama.model
    with torch.no_grad():
        model.token_embedding.weight.copy_(theirs.embed_tokens.weight)
        model.start.copy_(theirs.embed_tokens.weight[1])
        model.norm.weight.copy_(theirs.norm.weight)
        model.head.weight.copy_(llama.lm_head.weight)
        for block, layer in zip(model.blocks, theirs.layers, strict=True):
            projections = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
            block.attention.query_norm = block.attention.key_norm = nn.Identity()
            block.attention.query_key_value.weight.copy_(by_groups(*projections))
            block.attention.out.weight.copy_(layer.self_attn.o_proj.weight)
            block.mlp.gate_up.weight.copy_(by_groups(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
            block.mlp.out.weight.copy_(layer.mlp.down_proj.weight)
            block.attention_norm.weight.copy_(layer.input_layernorm.weight)
            block.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
    tokens = torch.randint(0, 24, (2, 1, 1, 90))  # one frame of one row
    shifted = torch.cat([torch.ones(2, 1, dtype=torch.long), tokens.flatten(1)[:, :-1]], dim=1)
    with torch.inference_mode():
        expected = llama(shifted).logits
        logits = model(tokens, random_text(2)).flatten(1, 3)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_checkpointing_stores_less_and_changes_no_gradient(checkpointing):
    plain, checkpointed = toy_transformer(), toy_transformer(checkpointing=checkpointing)
    tokens, text = random_tokens(2, 5), random_text(2)
    stored = []
    for model in (plain, checkpointed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(tokens, text).logsumexp(-1).mean()
        loss.backward()
        stored.append(sum(sizes))
    assert stored[1] < 0.8 * stored[0]
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_model_built_on_the_meta_device_equals_one_built_directly():
    torch.manual_seed(0)
    direct = untrained()
    torch.manual_seed(0)
    model = untrained(device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu").reset_parameters()
    for ours, theirs in zip(model.state_dict().values(), direct.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_loaded_unchanged(tied, tmp_path):
    model = toy_transformer(3, TextConfig(TEXT_DIM, gate=False), tied_head=tied)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = VideoTransformer.from_pretrained(tmp_path)
    assert (loaded.attention, loaded.text) == (model.attention, model.text)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    tokens, text = random_tokens(1, 3), random_text()
    torch.testing.assert_close(loaded(tokens, text), model(tokens, text))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_tied_head_saves_a_matrix():
    tied, untied = (sum(p.numel() for p in toy_transformer(tied_head=tied).parameters()) for tied in (True, False))
    assert tied == untied - 24 * 32


def test_a_config_of_plain_types_builds_the_model():
    config = {"dim": 32, "hidden_dim": 48, "attention": {"heads": 4, "kv_heads": 2}, "text": {"gate": False}}
    model = VideoTransformer.from_config({**config, "device": "meta"})
    assert model.attention == AttentionConfig(heads=4, kv_heads=2)
    assert model.text == TextConfig(gate=False)


def test_the_gate_scales_the_text_by_frame():
    model, tokens, one, other = toy_transformer(), random_tokens(), random_text(), random_text()
    with torch.no_grad():
        trained = model.gate.out.weight.clone()
        model.gate.out.weight.zero_()
        ungated = toy_transformer(text=TextConfig(TEXT_DIM, gate=False, kernel_size=3))
        ungated.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gate.")})
        assert torch.equal(model(tokens, one), ungated(tokens, one))  # the scale is 1 at initialization

        model.gate.out.weight.copy_(trained)
        scales = model.gate(torch.arange(4))
        assert scales.shape == (4, 4, 4)
        assert scales.min() >= 0
        assert scales.max() <= 2
        assert not torch.allclose(scales[:, 0], scales[:, 3])

        def text_matters(frame: int) -> bool:
            return not torch.allclose(model(tokens, one)[0, frame], model(tokens, other)[0, frame], atol=1e-6)

        assert text_matters(0)
        model.gate.out.weight.zero_()
        model.gate.out.bias.fill_(-40.0)
        assert not text_matters(3)


@pytest.mark.parametrize("token", [-1, 24])
def test_a_token_out_of_range_is_refused(token):
    tokens = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    tokens[0, 1, 1, 0] = token
    with pytest.raises(UserError, match=rf"Token {token} is outside the codebook \(0 to 23\)"):
        toy_transformer()(tokens, random_text())


def test_padding_of_the_text_changes_nothing():
    model, tokens, text = toy_transformer(), random_tokens(1, 3), random_text()
    padded = TextEmbedding(
        torch.cat([text.tokens, torch.randn(1, 3, TEXT_DIM)], dim=1),
        torch.cat([text.mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1),
    )
    torch.testing.assert_close(model(tokens, text), model(tokens, padded))


def test_a_text_token_holds_the_four_around_it_too():
    model, text = toy_transformer(text=TextConfig(TEXT_DIM, kernel_size=9)), random_text(1, 12)
    other = TextEmbedding(text.tokens.clone(), text.mask)
    other.tokens[0, 6] *= -1
    one, other = (model.normalize_text(each).tokens for each in (text, other))
    assert (one != other).any(-1)[0].nonzero().flatten().tolist() == list(range(2, 11))


def test_a_dropped_caption_has_no_effect():
    model, tokens, drop = toy_transformer(), random_tokens(2, 3), torch.tensor([True, False])
    one, other = model(tokens, random_text(2), drop), model(tokens, random_text(2), drop)
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


def test_text_has_no_effect_before_training():
    model, tokens = untrained(), random_tokens(1, 2)
    assert torch.equal(model(tokens, random_text()), model(tokens, random_text()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": AttentionConfig(5, 1)}, "heads=5 must divide dim=32"),
        ({"attention": AttentionConfig(32, 2)}, "heads=32 must divide dim=32 into even parts"),
        ({"attention": AttentionConfig(4, 3)}, "kv_heads=3 must divide heads=4"),
        ({"hidden_dim": 47}, "kv_heads=2 must divide heads=4 and hidden_dim=47"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        toy_transformer(**changes)


def test_an_even_kernel_of_the_text_convolution_is_refused():
    with pytest.raises(UserError, match=r"text\.kernel_size=4 must be odd"):
        TextConfig(kernel_size=4)


def test_text_embeddings_of_another_width_are_refused():
    text = TextEmbedding(torch.randn(1, 4, 7), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UserError, match=r"width 7, but the transformer's text\.dim is 12"):
        toy_transformer()(random_tokens(), text)


def test_one_batch_is_overfitted():
    model, text, tokens = toy_transformer().train(), random_text(4), random_tokens(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(tokens, text).flatten(0, 3), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.3
