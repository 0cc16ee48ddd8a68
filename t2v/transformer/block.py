"""One layer of the transformer (Llama's block, https://arxiv.org/abs/2302.13971, with attention to the text)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.transformer.attention import (
    CacheSlots,
    CrossAttention,
    KVCache,
    SelfAttention,
    TextKeysValues,
    WindowBlocks,
)
from t2v.transformer.config import AttentionConfig
from t2v.transformer.layers import RMSNorm, SwiGLU
from t2v.transformer.rope import Rotation

recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Activation checkpointing: call a function, and call it again in the backward pass. There is no dropout to repeat."""


class Block(nn.Module):
    """One layer, spatial or temporal.

    x ─┬─ norm ─ self-attention ─ + ─┬─ norm ─ text attention ─ gate ─ + ─┬─ norm ─ SwiGLU ─ + ─ out
       └──────────────────────────┘   └─────────────────────────────────┘   └──────────────────┘

    Args:
        temporal: Whether self-attention runs over the last frames, instead of within each frame.
        dim: Width of the model.
        hidden_dim: Hidden width of SwiGLU.
        text_dim: Width of the text embeddings.
        attention: Number of heads.
        recompute_attention: Whether the backward pass computes the attentions again instead of storing activations.
    """

    def __init__(
        self,
        temporal: bool,
        dim: int,
        hidden_dim: int,
        text_dim: int,
        attention: AttentionConfig,
        recompute_attention: bool = False,
    ) -> None:
        super().__init__()
        heads, kv_heads = attention.heads, attention.kv_heads
        self.temporal, self.recompute_attention = temporal, recompute_attention
        self.attention_norm = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, kv_heads)
        self.text_norm = RMSNorm(dim)
        self.text_attention = CrossAttention(dim, text_dim, heads, kv_heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim, kv_heads)

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        text: Float[Tensor, "b l text_dim"],
        mask: Bool[Tensor, "b l"],
        gate: Float[Tensor, "t heads"] | None,
        rotate: Rotation,
        window: int,
        blocks: WindowBlocks | None = None,
    ) -> Float[Tensor, "b t n d"]:
        """Compute the layer for all positions of t frames.

        Args:
            x: Inputs.
            text: Text tokens.
            mask: True for text tokens, False for padding.
            gate: Scale of text attention by frame and head; None for 1.
            rotate: Rotation of all positions.
            window: Frames that a temporal layer attends to.
            blocks: For a temporal layer, see `causal_attention`.
        """
        if self.recompute_attention and torch.is_grad_enabled():
            x = recompute(self._attend, x, text, mask, gate, rotate, window, blocks)
        else:
            x = self._attend(x, text, mask, gate, rotate, window, blocks)
        return self._feed_forward(x)

    def _attend(
        self,
        x: Float[Tensor, "b t n d"],
        text: Float[Tensor, "b l text_dim"],
        mask: Bool[Tensor, "b l"],
        gate: Float[Tensor, "t heads"] | None,
        rotate: Rotation,
        window: int,
        blocks: WindowBlocks | None,
    ) -> Float[Tensor, "b t n d"]:
        b, t, n, _ = x.shape
        h = self.attention_norm(x)
        if self.temporal:
            h = self.attention(h.flatten(1, 2), rotate, window * n, blocks).unflatten(1, (t, n))
        else:
            h = self.attention(h.flatten(0, 1), rotate.at(slice(n)), n).unflatten(0, (b, t))
        x = x + h
        keys_values = self.text_attention.project_text(text)
        y: Tensor = self.text_attention(self.text_norm(x).flatten(1, 2), keys_values, mask, gate)
        return x + y.reshape(x.shape)

    def _feed_forward(self, x: Float[Tensor, "b *n d"]) -> Float[Tensor, "b *n d"]:
        y: Tensor = self.mlp(self.mlp_norm(x))
        return x + y

    def step(
        self,
        x: Float[Tensor, "b n d"],
        text: TextKeysValues,
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "positions heads"] | None,
        rotate: Rotation,
        cache: KVCache,
        slots: CacheSlots,
    ) -> Float[Tensor, "b n d"]:
        """Compute the layer for n successive positions of each row, with the earlier positions in the cache."""
        x = x + self.attention.step(self.attention_norm(x), rotate, cache, slots)
        x = x + self.text_attention(self.text_norm(x), text, mask, gate)
        return self._feed_forward(x)

    def extend(
        self,
        x: Float[Tensor, "b n d"],
        text: TextKeysValues,
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "1 heads"] | None,
        rotate: Rotation,
        cache: KVCache,
        position: int,
        window: int,
    ) -> Float[Tensor, "b n d"]:
        """Compute the layer for one frame that begins at raster position `position`.

        A temporal layer attends to the last `window` frames and adds the frame to its cache. A spatial layer does not
        need it for the following frames.
        """
        h = self.attention_norm(x)
        if self.temporal:
            x = x + self.attention.extend(h, rotate, cache, position, window * x.shape[1])
        else:
            x = x + self.attention(h, rotate, x.shape[1])
        x = x + self.text_attention(self.text_norm(x), text, mask, gate)
        return self._feed_forward(x)
