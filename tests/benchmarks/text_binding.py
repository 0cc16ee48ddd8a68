"""How soon text attention learns which digit has which motion: `python -m tests.benchmarks.text_binding`.

The captions are those of two moving digits. From the embedding of a digit, two layers of text attention and SwiGLU
predict the motion that the caption gives this digit. They are trained on the training captions as stage 2 is, by Muon,
and measured on the held-out captions whose two motions differ, of which chance has 50 % right. It takes minutes where
a training of stage 2 takes an hour, but here the digit is known, which stage 2 has to recognize.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.examples.moving_digits import MOTIONS, captions_of, draw
from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.text import MiniLMTextEncoder
from t2v.training.optimization import MuonAdamW, parameter_groups
from t2v.transformer.attention import CrossAttention
from t2v.transformer.layers import RMSNorm, SwiGLU, TextConvolution
from tests.benchmarks.report import print_table

_DIM, _BATCH = 128, 48
_CAPTIONS = 180
"""Combinations of digits and motions of each split."""
_STEPS = (20, 40, 60, 80, 100, 150, 200)


class Layer(nn.Module):
    """Text attention and SwiGLU, each after a norm and with a residual connection."""

    def __init__(self, text_dim: int) -> None:
        super().__init__()
        self.text_norm, self.feed_norm = RMSNorm(_DIM), RMSNorm(_DIM)
        self.text_attention = CrossAttention(_DIM, text_dim, heads=4, kv_heads=2)
        self.feed = SwiGLU(_DIM, 3 * _DIM, groups=2)

    def forward(self, x: Float[Tensor, "b n d"], text: TextEmbedding) -> Float[Tensor, "b n d"]:
        keys_values = self.text_attention.project_text(text.tokens)
        x = x + self.text_attention(self.text_norm(x), keys_values, text.mask, gate=None)
        return x + self.feed(self.feed_norm(x))


class Motions(nn.Module):
    """Predicts the motion of each digit that is asked for."""

    def __init__(self, text_dim: int, convolution: bool) -> None:
        super().__init__()
        self.digit = nn.Embedding(10, _DIM)
        self.text_norm = RMSNorm(text_dim)
        self.text_convolution = TextConvolution(text_dim, 9) if convolution else nn.Identity()
        self.layers = nn.ModuleList(Layer(text_dim) for _ in range(2))
        self.norm, self.head = RMSNorm(_DIM), nn.Linear(_DIM, len(MOTIONS), bias=False)
        for name, parameter in self.named_parameters():  # as VideoTransformer
            if name == "text_convolution.weight":
                nn.init.normal_(parameter, std=0.3)
                parameter.data[:, :, parameter.shape[2] // 2] += 1
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0 if name.endswith("text_attention.out.weight") else 0.02)

    def forward(self, digits: Int[Tensor, "b n"], text: TextEmbedding) -> Float[Tensor, "b n motions"]:
        tokens = self.text_norm(text.tokens).masked_fill(~text.mask[..., None], 0)
        text, x = TextEmbedding(self.text_convolution(tokens), text.mask), self.digit(digits)
        for layer in self.layers:
            x = layer(x, text)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Captions:
    """The captions of a split with their digits and motions: the literature's, or with paraphrases."""

    def __init__(self, encoder: MiniLMTextEncoder, held_out: bool) -> None:
        clips = draw(2, held_out, _CAPTIONS, seed=0)
        pairs = [(each, clip) for clip in clips for each in captions_of(clip)[: 1 if held_out else None]]
        self.text = encoder.encode_batch([caption for caption, _ in pairs])
        parts = [clip.parts for _, clip in pairs]
        self.digits = torch.tensor([[digit for digit, _ in each] for each in parts])
        self.motions = torch.tensor([[MOTIONS.index(motion) for _, motion in each] for each in parts])

    def __getitem__(self, chosen: Tensor) -> tuple[Tensor, TextEmbedding, Tensor]:
        text = TextEmbedding(self.text.tokens[chosen], self.text.mask[chosen])
        return self.digits[chosen], text, self.motions[chosen]


def compare(layers: tuple[int, ...] = (6, 2, 0), seed: int = 0) -> None:
    """Train with and without the text convolution, and print a table of the accuracy after some steps.

    Args:
        layers: Layers of MiniLM that are computed.
        seed: Of the initial weights and of the batches.
    """
    rows: list[dict[str, Any]] = []
    for count in layers:
        encoder = MiniLMTextEncoder(layers=count)
        train, held_out = (Captions(encoder, each) for each in (False, True))
        for convolution in (False, True):
            torch.manual_seed(seed)
            accuracy = _learn(Motions(encoder.width, convolution), train, held_out)
            rows.append({"layers of MiniLM": count, "convolution": "yes" if convolution else "no"} | accuracy)
    print_table(dict.fromkeys(rows[0], "{}"), rows)


def _learn(model: Motions, train: Captions, held_out: Captions) -> dict[str, str]:
    """Train, and return the accuracy and the loss in nats on held-out captions with different motions."""
    optimizer, measured = MuonAdamW(parameter_groups(model), lr=6e-3), {}
    digits, text, motions = held_out[(held_out.motions[:, 0] != held_out.motions[:, 1]).nonzero().flatten()]
    for step in range(1, max(_STEPS) + 1):
        chosen = torch.randint(len(train.digits), (_BATCH,))
        asked, caption, answer = train[chosen]
        loss = F.cross_entropy(model(asked, caption).flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in _STEPS:
            with torch.no_grad():
                logits = model(digits, text)
            nats = float(F.cross_entropy(logits.flatten(0, 1), motions.flatten()))
            measured[f"{step} steps"] = f"{float((logits.argmax(-1) == motions).float().mean()):.0%} ({nats:.2f})"
    return measured


if __name__ == "__main__":
    run_tool(compare)
