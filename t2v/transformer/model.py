"""The spatial–temporal transformer: predicts the tokens of a video one after the other, from text.

- Tokens stand in raster order: time, then row, then column. The input at a place is the token before it, and the place
  is that of the token being predicted. What stood around that place in the frame before is an input too.
- Spatial layers attend causally within the frame being made. Temporal layers attend causally over the last `window`
  frames: a query at raster place p sees the places p − window·h·w + 1 … p. Cost and cache a token are constant.
- Rotary positions over time, row and column; RMSNorm, SwiGLU, grouped queries, QK-norm.
- Every layer attends to the text; the pooled text vector is added to every input. Both start at zero effect. A learned
  "no text" embedding makes classifier-free guidance (https://arxiv.org/abs/2207.12598) possible.

Divided space-time attention: https://arxiv.org/abs/2102.05095; Llama's block: https://arxiv.org/abs/2302.13971.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer.layers import CrossAttention, KVCache, PreviousFrame, RMSNorm, SelfAttention, SwiGLU
from t2v.transformer.rope import Rotation, rotation, split_head


class Block(nn.Module):
    """One layer, spatial or temporal.

    x ─┬─ norm ─ self-attention ─ + ─┬─ norm ─ text attention ─ + ─┬─ norm ─ SwiGLU ─ + ─ out
       └──────────────────────────┘   └──────────────────────────┘   └──────────────────┘
    """

    def __init__(
        self, temporal: bool, dim: int, heads: int, kv_heads: int, hidden_dim: int, text_dim: int, qk_norm: bool
    ):
        super().__init__()
        self.temporal = temporal
        self.attention_norm = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, kv_heads, qk_norm)
        self.text_norm = RMSNorm(dim)
        self.text_attention = CrossAttention(dim, text_dim, heads, kv_heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        text: Float[Tensor, "b l e"],
        mask: Bool[Tensor, "b l"],
        rotate: Rotation,
        window: int,
    ) -> Float[Tensor, "b t n d"]:
        b, t, n, _ = x.shape
        h = self.attention_norm(x)
        if self.temporal:
            h = self.attention(h.flatten(1, 2), rotate, window * n).unflatten(1, (t, n))
        else:
            h = self.attention(h.flatten(0, 1), rotate[:n], n).unflatten(0, (b, t))
        x = x + h
        h = self.text_attention(self.text_norm(x).flatten(1, 2), self.text_attention.read_text(text), mask)
        x = x + h.unflatten(1, (t, n))
        return x + self.mlp(self.mlp_norm(x))

    def new_cache(self, like: Float[Tensor, "b d"], size: int) -> KVCache:
        """An empty cache of `size` positions for `step`."""
        return KVCache(len(like), self.attention.kv_heads, size, self.attention.head_dim, like)

    def step(
        self,
        x: Float[Tensor, "b 1 d"],
        text: tuple[Tensor, Tensor],
        mask: Tensor,
        rotate: Rotation,
        cache: KVCache,
        place: int,
    ) -> Float[Tensor, "b 1 d"]:
        x = x + self.attention.step(self.attention_norm(x), rotate, cache, place)
        x = x + self.text_attention(self.text_norm(x), text, mask)
        return x + self.mlp(self.mlp_norm(x))


class DecodingState:
    """What generation remembers: the caches of all layers, the text as the layers read it, the last h·w tokens (as a
    ring over the places of a frame), what the frame before says, and the next place.
    """

    def __init__(
        self,
        caches: list[KVCache],
        text: list[tuple[Tensor, Tensor]],
        mask: Tensor,
        pooled: Tensor,
        frame_tokens: Tensor,
    ):
        self.caches, self.text, self.mask, self.pooled = caches, text, mask, pooled
        self.frame_tokens = frame_tokens
        self.previous: Tensor | None = None
        self.place = 0


class VideoTransformer(nn.Module):
    """Autoregressive transformer over the tokens of a video, conditioned on text."""

    def __init__(
        self,
        vocab_size: int = 16384,
        grid_size: int = 16,
        dim: int = 4096,
        spatial_layers: int = 24,
        temporal_layers: int = 16,
        heads: int = 32,
        kv_heads: int = 8,
        hidden_dim: int = 9216,
        text_dim: int = 4096,
        window: int = 16,
        rope_theta: float = 10000.0,
        rope_dims: tuple[int, int, int] | None = None,
        qk_norm: bool = True,
    ):
        """
        Args:
            vocab_size: size of the codebook of the VQ-VAE.
            grid_size: height and width of the token grid of a frame.
            dim: width of the model.
            spatial_layers: layers that attend within a frame; spatial and temporal layers are interleaved evenly.
            temporal_layers: layers that attend over the last `window` frames.
            heads: query heads; they divide `dim`.
            kv_heads: key and value heads; they divide `heads`.
            hidden_dim: hidden width of the feed-forward layers.
            text_dim: width of the text embeddings.
            window: frames that temporal layers look back over, the one being made included.
            rope_theta: base of the wavelengths of the rotary embedding.
            rope_dims: dimensions of a head that turn with time, row and column; about a third each by default.
            qk_norm: whether queries and keys are normalised.
        """
        super().__init__()
        if dim % heads or heads % kv_heads:
            raise UserError(f"heads={heads} must divide dim={dim}, and kv_heads={kv_heads} must divide heads={heads}.")
        head_dim = dim // heads
        self.rope_dims, self.rope_theta = rope_dims or split_head(head_dim), rope_theta
        if sum(self.rope_dims) != head_dim or any(d % 2 for d in self.rope_dims):
            raise UserError(
                f"rope_dims={list(self.rope_dims)} must be even and sum to dim / heads = {head_dim}: change rope_dims, "
                f"dim or heads."
            )
        self.vocab_size, self.grid_size, self.text_dim, self.window = vocab_size, grid_size, text_dim, window

        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.previous_frame = PreviousFrame(vocab_size, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.no_text = nn.Parameter(torch.empty(text_dim))
        self.text_norm = RMSNorm(text_dim)
        self.pooled = nn.Linear(text_dim, dim, bias=False)
        layers = spatial_layers + temporal_layers
        self.blocks = nn.ModuleList(
            Block(is_temporal, dim, heads, kv_heads, hidden_dim, text_dim, qk_norm)
            for is_temporal in (
                (i + 1) * temporal_layers // layers > i * temporal_layers // layers for i in range(layers)
            )
        )
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), smaller at the layers that write to the residual stream, zero where the text enters."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                nn.init.ones_(parameter)
            elif name == "previous_frame.mix.weight":
                nn.init.dirac_(parameter, groups=len(parameter))
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif name == "pooled.weight" or name.endswith("text_attention.out.weight"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** (0.5 * name.endswith("out.weight")))

    def forward(
        self,
        tokens: Int[Tensor, "b t h w"],
        text: TextEmbedding,
        drop_text: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b t h w v"]:
        """Logits of the token at each place, from the tokens before it.

        Args:
            tokens: in [0, vocab_size); the values at a place do not change the logits there or before.
            text: embeddings of the captions.
            drop_text: True for samples that shall not see their caption.
        """
        b, t, h, w = tokens.shape
        embedded = self.token_embedding(tokens.flatten(1))  # b (t h w) d
        x = torch.cat([self.start.expand(b, 1, -1), embedded[:, :-1]], dim=1)
        if t > 1:
            previous = self.previous_frame(tokens[:, :-1]).flatten(1, 2)
            x = x + F.pad(previous, (0, 0, h * w, 0))  # the first frame has none before it
        words, mask, pooled = self._read(text, drop_text)
        x = rearrange(x + pooled[:, None], "b (t n) d -> b t n d", t=t)
        rotate = self._rotation(0, t * h * w, tokens.device)
        for block in self.blocks:
            x = block(x, words, mask, rotate, self.window)
        return rearrange(self.head(self.norm(x)), "b t (h w) v -> b t h w v", h=h)

    def start_decoding(self, text: TextEmbedding, drop_text: Bool[Tensor, " b"] | None = None) -> DecodingState:
        """The state before the first token of one video for each text."""
        words, mask, pooled = self._read(text, drop_text)
        frame = self.grid_size**2
        blocks = cast("list[Block]", self.blocks)
        caches = [block.new_cache(pooled, frame * (self.window if block.temporal else 1)) for block in blocks]
        read = [block.text_attention.read_text(words) for block in blocks]
        recent = torch.zeros(len(pooled), frame, dtype=torch.long, device=pooled.device)
        return DecodingState(caches, read, mask, pooled, recent)

    def step(self, tokens: Int[Tensor, " b"] | None, state: DecodingState) -> Float[Tensor, "b v"]:
        """Logits of the next token, from the one before it (None at the beginning); moves `state` on by one place."""
        frame = self.grid_size**2
        if tokens is None:
            x = self.start + state.pooled
        else:
            state.frame_tokens[:, (state.place - 1) % frame] = tokens
            x = self.token_embedding(tokens) + state.pooled
        if state.place and state.place % frame == 0:
            state.previous = self.previous_frame(state.frame_tokens.view(-1, 1, self.grid_size, self.grid_size))[:, 0]
        if state.previous is not None:
            x = x + state.previous[:, state.place % frame]
        x = x[:, None]
        rotate = self._rotation(state.place, state.place + 1, x.device)
        blocks = cast("list[Block]", self.blocks)
        for block, cache, text in zip(blocks, state.caches, state.text, strict=True):
            place = state.place if block.temporal else state.place % frame
            x = block.step(x, text, state.mask, rotate, cache, place)
        state.place += 1
        return self.head(self.norm(x))[:, 0]

    def _rotation(self, start: int, stop: int, device: torch.device) -> Rotation:
        """Rotary angles of the raster places from `start` to `stop`."""
        place = torch.arange(start, stop, device=device)
        frame, size = self.grid_size**2, self.grid_size
        positions = torch.stack([place // frame, place % frame // size, place % size], dim=-1)
        return rotation(positions, self.rope_dims, self.rope_theta)

    def _read(self, text: TextEmbedding, drop: Bool[Tensor, " b"] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The words (b, l, e), their mask and the pooled vector (b, d), dropped samples reading "no text"."""
        words, mask, pooled = text
        if words.shape[-1] != self.text_dim:
            raise UserError(
                f"The text embeddings are {words.shape[-1]} wide but the transformer's text_dim is {self.text_dim}: "
                f"were they made by another text encoder?"
            )
        if drop is not None:
            words = torch.where(drop[:, None, None], self.no_text.to(words.dtype), words)
            pooled = torch.where(drop[:, None], self.no_text.to(pooled.dtype), pooled)
            mask = mask & ~drop[:, None]
            mask = mask | (drop[:, None] & (torch.arange(mask.shape[1], device=mask.device) == 0))
        return self.text_norm(words), mask, self.pooled(self.text_norm(pooled))
