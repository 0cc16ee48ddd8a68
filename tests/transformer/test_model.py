"""The transformer: parity, causality, windows, text, the cached decode."""

import shutil

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer import layers
from t2v.transformer.model import VideoTransformer
from t2v.transformer.rope import raster, rotation


def tiny(**changes) -> VideoTransformer:
    torch.manual_seed(0)
    arguments = {
        "vocab_size": 24,
        "grid_size": 2,
        "dim": 32,
        "spatial_layers": 2,
        "temporal_layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "hidden_dim": 48,
        "text_dim": 12,
        "window": 4,
    }
    model = VideoTransformer(**{**arguments, **changes}).eval()
    with torch.no_grad():  # what starts at zero must not hide mistakes
        for name, parameter in model.named_parameters():
            if name == "pooled.weight" or name.endswith("text_attention.out.weight"):
                parameter.normal_(std=0.2)
    return model


def texts(batch: int = 1, length: int = 5) -> TextEmbedding:
    return TextEmbedding(
        torch.randn(batch, length, 12), torch.ones(batch, length, dtype=torch.bool), torch.randn(batch, 12)
    )


def test_a_token_changes_no_logit_at_or_before_its_place():
    model, text = tiny(), texts()
    tokens = torch.randint(0, 24, (1, 6, 2, 2))
    before = model(tokens, text).flatten(1, 3)
    for place in (0, 1, 7, 12, 22):
        changed = tokens.clone()
        changed.view(-1)[place] = (changed.view(-1)[place] + 1) % 24
        after = model(changed, text).flatten(1, 3)
        assert torch.equal(before[:, : place + 1], after[:, : place + 1])
        assert not torch.allclose(before[:, place + 1], after[:, place + 1])


def reach(model: VideoTransformer, frames: int, query: int) -> list[int]:
    """The places whose input moves the logits at `query`, by gradient."""
    inputs = []

    def keep(_, args):
        args[0].requires_grad_().retain_grad()
        inputs.append(args[0])

    model.blocks[0].register_forward_pre_hook(keep)
    model(torch.randint(0, 24, (1, frames, 2, 2)), texts()).flatten(1, 3)[0, query].sum().backward()
    return inputs[0].grad.flatten(1, 2)[0].abs().sum(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_temporal_layer_sees_its_window_and_nothing_else(window):
    model = tiny(spatial_layers=0, temporal_layers=1, window=window)
    assert reach(model, frames=5, query=17) == list(range(17 - 4 * window + 1, 18))


def test_a_spatial_layer_sees_its_own_frame_alone():
    assert reach(tiny(spatial_layers=1, temporal_layers=0), frames=4, query=10) == [8, 9, 10]


def test_spatial_and_temporal_layers_are_interleaved():
    order = "".join("T" if block.temporal else "S" for block in tiny(spatial_layers=6, temporal_layers=4).blocks)
    assert order == "SSTSTSSTST"


def test_a_logit_depends_on_no_later_token_and_on_no_token_out_of_the_window():
    """By gradient with respect to what is looked up for each token: its own embedding and that for the next frame."""
    model = tiny(spatial_layers=0, temporal_layers=1, window=2)
    looked_up = []
    for table in (model.token_embedding, model.previous_frame.embedding):
        table.register_forward_hook(lambda module, args, out: looked_up.append(out) or out.retain_grad())
    query = 17
    model(torch.randint(0, 24, (1, 6, 2, 2)), texts()).flatten(1, 3)[0, query].sum().backward()
    tokens, previous = (out.grad.flatten(0, -2).abs().sum(-1).nonzero().flatten().tolist() for out in looked_up)
    assert tokens == list(range(query - 8, query))  # the places 10 … 17, whose inputs are one token earlier
    assert previous == list(range(4, 16))  # the frames before those of the places 10 … 17


def decode(model: VideoTransformer, tokens: torch.Tensor, text: TextEmbedding, given: int = 0) -> torch.Tensor:
    """Logits of the cached decode for the places after `given` frames."""
    flat = tokens.flatten(1)
    with torch.inference_mode():
        state = model.start_decoding(text, tokens.shape[1])
        if given:
            model.prefill(tokens[:, :given], state)
        places = range(given * 4, flat.shape[1])
        return torch.stack([model.step(flat[:, i - 1] if i else None, state) for i in places], dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [1, 4, 32])
def test_cached_decoding_equals_the_full_forward(window, batch):
    model, text = tiny(window=window), texts(batch)
    tokens = torch.randint(0, 24, (batch, 20, 2, 2))
    full = model(tokens, text).flatten(1, 3).detach()
    cached = decode(model, tokens, text)
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    assert torch.equal(cached.argmax(-1), full.argmax(-1))


@pytest.mark.parametrize("given", [1, 3, 4, 11])
def test_decoding_goes_on_from_given_frames(given):
    model, text = tiny(window=4), texts(2)
    tokens = torch.randint(0, 24, (2, 13, 2, 2))
    full = model(tokens, text).flatten(1, 3).detach()
    torch.testing.assert_close(decode(model, tokens, text, given), full[:, given * 4 :], atol=1e-4, rtol=1e-4)


def test_a_model_in_bfloat16_alone_decodes_as_it_predicts():
    model, text = (
        tiny().to(torch.bfloat16),
        TextEmbedding(*(x.to(torch.bfloat16) if x.is_floating_point() else x for x in texts())),
    )
    tokens = torch.randint(0, 24, (1, 6, 2, 2))
    full = model(tokens, text).flatten(1, 3).detach()
    assert full.dtype == torch.bfloat16
    torch.testing.assert_close(decode(model, tokens, text), full, atol=0.1, rtol=0.1)


def test_without_the_pooled_vector_only_the_words_count():
    model, tokens = tiny(text_pooled=False), torch.randint(0, 24, (1, 5, 2, 2))
    text = texts()
    other = text._replace(pooled=torch.randn_like(text.pooled))
    made = model(tokens, text)
    assert torch.equal(made, model(tokens, other))
    assert not torch.allclose(made, model(tokens, text._replace(tokens=torch.randn_like(text.tokens))), atol=1e-3)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_under_autocast(pooled, batch):
    model, tokens, text = tiny(text_pooled=pooled), torch.randint(0, 24, (batch, 5, 2, 2)), texts(batch)
    made = model(tokens, text).flatten(1, 3).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decode(model, tokens, text).float(), made, atol=0.1, rtol=0.1)


def test_caches_do_not_grow_beyond_the_window():
    model = tiny(window=4)
    sizes = {cache.keys.shape[2] for cache in model.start_decoding(texts(), 300).caches}
    assert sizes == {4, 16}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_decoding_equals_the_full_forward():
    model, text = tiny(spatial_layers=1, temporal_layers=1, window=2), texts(1)
    tokens = torch.randint(0, 24, (1, 4, 2, 2))
    full = model(tokens, text).flatten(1, 3).detach()
    model.compile_decoding()
    torch.testing.assert_close(decode(model, tokens, text), full, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_layers_learn_as_plain_ones_and_captions_of_any_length_take_no_new_code():
    eager, compiled = tiny(), tiny()
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_layers()
    tokens, known = torch.randint(0, 24, (2, 3, 2, 2)), []
    for length in (5, 3, 9, 4):
        words = torch.randn(2, length, eager.text_dim)
        text = TextEmbedding(words, torch.ones(2, length, dtype=torch.bool), words.mean(1))
        for model in (eager, compiled):
            model.zero_grad()
            model(tokens, text).square().mean().backward()
        for (name, ours), plain in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, msg=name)
        known.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert known == [known[0]] * 4


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_clips_of_many_lengths_are_all_compiled():
    model, text, known = tiny(spatial_layers=1, temporal_layers=0), texts(), []
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        model.compile_layers()
        for frames in (1, 2):
            model(torch.randint(0, 24, (1, frames, 2, 2)), text)
            known.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert known[1] == known[0] + 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_validate_as_plain_ones(dtype):
    """Of long clips too, whose attention goes by chunks."""
    attention = layers.SelfAttention(32, 4, 2, qk_norm=True)
    turn = rotation(raster(0, 320, 8, 8, torch.device("cpu")), (8, 0, 0), 100.0)
    x = torch.randn(2, 320, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = torch.compile(attention, dynamic=False)(x, turn, 300)
        plain = attention(x, turn, 300)
    torch.testing.assert_close(made, plain, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_the_band_equals_the_chunks():
    q, k, v = (torch.randn(1, heads, 160, 16) for heads in (4, 2, 2))
    with torch.inference_mode():
        made = layers._band_attention(q, k, v, 48)
    torch.testing.assert_close(made, layers._causal_attention(q, k, v, 48, chunk=32))


@pytest.mark.parametrize("window", [300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_chunks_equals_one_product_with_a_mask(dtype, window):
    q, k, v = (torch.randn(1, heads, 700, 16).to(dtype) for heads in (4, 2, 2))
    distance = torch.arange(700)[:, None] - torch.arange(700)
    mask = (distance >= 0) & (distance < window)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True
    )
    made = layers._causal_attention(q, k, v, window)
    assert (made - exact).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5)


def by_groups(*matrices: torch.Tensor, groups: int = 2) -> torch.Tensor:
    """One matrix of several, a group of their heads after the other."""
    return torch.cat([matrix.unflatten(0, (groups, -1)) for matrix in matrices], dim=1).flatten(0, 1)


def test_logits_equal_llamas():
    """All tokens in one frame, no text, rotary positions along one axis: Llama's network, with Llama's weights."""
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
    model = VideoTransformer(24, 2, 32, 3, 0, 4, 2, 48, 12, 1, rope_dims=(0, 0, 8), qk_norm=False).eval()
    theirs = llama.model
    with torch.no_grad():
        model.token_embedding.weight.copy_(theirs.embed_tokens.weight)
        model.start.copy_(theirs.embed_tokens.weight[1])
        model.norm.weight.copy_(theirs.norm.weight)
        model.head.weight.copy_(llama.lm_head.weight)
        for block, layer in zip(model.blocks, theirs.layers, strict=True):
            projections = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
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
        made = model(tokens, texts(2)).flatten(1, 3)
    assert expected.std() > 0.5
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_checkpointing_keeps_less_and_changes_no_gradient(checkpointing):
    plain, thrifty = tiny(), tiny(checkpointing=checkpointing)
    tokens, text = torch.randint(0, 24, (2, 5, 2, 2)), texts(2)
    kept = []
    for model in (plain, thrifty):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = model(tokens, text).logsumexp(-1).mean()
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < 0.8 * kept[0]
    for ours, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_model_built_without_memory_is_the_model_built_with_it():
    direct = VideoTransformer(24, 2, 32, 1, 1, 4, 2, 48, 12, 4)
    torch.manual_seed(0)
    model = VideoTransformer(24, 2, 32, 1, 1, 4, 2, 48, 12, 4, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu").reset_parameters()
    for ours, theirs in zip(model.state_dict().values(), direct.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_comes_back_as_it_was(tied, tmp_path):
    model = tiny(tied_head=tied, rope_dims=(4, 2, 2))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    back = VideoTransformer.from_pretrained(tmp_path)
    tokens, text = torch.randint(0, 24, (1, 3, 2, 2)), texts()
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    torch.testing.assert_close(back(tokens, text), model(tokens, text))
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert (
        sum(p.numel() for p in tiny(tied_head=True).parameters())
        == sum(p.numel() for p in tiny(tied_head=False).parameters()) - 24 * 32
    )


def test_the_gate_weighs_the_text_by_the_frame_and_the_length():
    model, tokens, one, other = tiny(), torch.randint(0, 24, (1, 4, 2, 2)), texts(), texts()
    model.pooled.weight.data.zero_()  # the text comes through attention alone
    with torch.no_grad():
        ungated = tiny(text_gate=False)
        ungated.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gate.")})
        assert torch.equal(model(tokens, one), ungated(tokens, one))  # the factor begins as one

        model.gate.out.weight.normal_()
        factors = model.gate(torch.arange(4), 4)
        assert factors.shape == (4, 4, 4)
        assert factors.min() >= 0
        assert factors.max() <= 2
        assert not torch.allclose(factors[:, 0], factors[:, 3])
        assert not torch.allclose(model.gate(torch.arange(1), 4), model.gate(torch.arange(1), 64))

        def text_matters(frame: int) -> bool:
            return not torch.allclose(model(tokens, one)[0, frame], model(tokens, other)[0, frame], atol=1e-6)

        assert text_matters(0)
        model.gate.out.weight.zero_()
        model.gate.out.bias.fill_(-40.0)
        assert not text_matters(3)


@pytest.mark.parametrize("wrong", [-1, 24])
def test_tokens_out_of_the_vocabulary_are_refused(wrong):
    tokens = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    tokens[0, 1, 1, 0] = wrong
    with pytest.raises(UserError, match=f"Token {wrong} lies outside the vocabulary, 0 to 23"):
        tiny()(tokens, texts())
    state = tiny().start_decoding(texts(), 4)
    with pytest.raises(UserError, match=f"Token {wrong} lies outside"):
        tiny().prefill(tokens, state)


def test_given_frames_of_another_grid_are_refused():
    model = tiny()
    with pytest.raises(UserError, match="3×2 tokens, but the transformer's grid is 2×2"):
        model.prefill(torch.zeros(1, 1, 3, 2, dtype=torch.long), model.start_decoding(texts(), 4))


def test_padding_of_the_text_changes_nothing():
    model, text = tiny(), texts()
    tokens = torch.randint(0, 24, (1, 3, 2, 2))
    padded = TextEmbedding(
        torch.cat([text.tokens, torch.randn(1, 3, 12)], dim=1),
        torch.cat([text.mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1),
        text.pooled,
    )
    torch.testing.assert_close(model(tokens, text), model(tokens, padded))


def test_a_dropped_caption_has_no_say():
    model = tiny()
    tokens = torch.randint(0, 24, (2, 3, 2, 2))
    drop = torch.tensor([True, False])
    one, other = model(tokens, texts(2), drop), model(tokens, texts(2), drop)
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


def test_text_has_no_effect_before_training():
    torch.manual_seed(0)
    model = VideoTransformer(24, 2, 32, 1, 1, 4, 2, 48, 12, 4)
    tokens = torch.randint(0, 24, (1, 2, 2, 2))
    assert torch.equal(model(tokens, texts()), model(tokens, texts()))


def test_frame_numbers_matter_only_by_their_difference():
    """Without a window's edge in the way, shifting a video in time shifts its rotary angles and nothing else."""
    from t2v.transformer.rope import rotation

    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(frame: int) -> torch.Tensor:
        positions = torch.tensor([[frame, 1, 0], [frame + 5, 0, 1]])
        turn = rotation(positions, (4, 2, 2), 100.0)
        return (turn.at(slice(1))(q) * turn.at(slice(1, None))(k)).sum()

    torch.testing.assert_close(score(0), score(295), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads=5 must divide dim=32"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"hidden_dim": 47}, "kv_heads=2 must divide heads=4 and hidden_dim=47"),
        ({"rope_dims": (4, 2, 4)}, "sum to dim / heads = 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_text_of_another_width_is_refused():
    text = TextEmbedding(torch.randn(1, 4, 7), torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 7))
    with pytest.raises(UserError, match="7 wide but the transformer's text_dim is 12"):
        tiny()(torch.zeros(1, 1, 2, 2, dtype=torch.long), text)


def test_it_learns_a_batch_by_heart():
    model, text = tiny().train(), texts(4)
    tokens = torch.randint(0, 24, (4, 3, 2, 2))
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
