"""The transformer: parity, causality, windows, text, the cached decode."""

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer.model import VideoTransformer


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


@pytest.mark.parametrize("window", [2, 4, 16])
def test_cached_decoding_equals_the_full_forward(window):
    model, text = tiny(window=window), texts(batch=2)
    tokens = torch.randint(0, 24, (2, 9, 2, 2))
    full = model(tokens, text).flatten(1, 3)
    with torch.inference_mode():
        state = model.start_decoding(text)
        flat = tokens.flatten(1)
        cached = torch.stack([model.step(flat[:, i - 1] if i else None, state) for i in range(flat.shape[1])], dim=1)
    torch.testing.assert_close(cached, full.detach(), atol=1e-4, rtol=1e-4)


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
        return (turn[:1](q) * turn[1:](k)).sum()

    torch.testing.assert_close(score(0), score(295), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads=5 must divide dim=32"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
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
