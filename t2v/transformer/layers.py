"""The layers of the transformer: self-attention in space or time, attention to the text, SwiGLU.

Shapes: b batch, n positions in raster order, d width, l text length.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from t2v.transformer.rope import Rotation

_SHORT = 256
"""Up to this length a plain product of matrices beats the CPU's flash kernel (forward and backward, bfloat16: 7× at 16
positions, 2× at 256)."""


class RMSNorm(nn.RMSNorm):
    """RMS normalisation (https://arxiv.org/abs/1910.07467) in the precision of its input."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of the last `size` positions, as a ring; what is written first is forgotten first."""

    def __init__(self, batch: int, heads: int, size: int, head_dim: int, like: Tensor):
        self.keys = like.new_zeros(batch, heads, size, head_dim)
        self.values = torch.zeros_like(self.keys)

    def put(self, place: int, key: Float[Tensor, "b h 1 d"], value: Float[Tensor, "b h 1 d"]) -> tuple[Tensor, Tensor]:
        """Writes the position `place` and returns the keys and values that a query there may see."""
        size = self.keys.shape[2]
        self.keys[:, :, place % size] = key[:, :, 0]
        self.values[:, :, place % size] = value[:, :, 0]
        filled = min(place + 1, size)
        return self.keys[:, :, :filled], self.values[:, :, :filled]


class PreviousFrame(nn.Module):
    """What stood around each place in the frame before, as an input to the first layer.

    An embedding of its tokens, mixed over 3×3 places by a depthwise convolution. Most of a video repeats itself or
    moves by a little from frame to frame; finding that out by attention alone costs the first hundreds of steps.
    """

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b t n d"]:
        x = rearrange(self.embedding(tokens), "b t h w d -> (b t) d h w")
        return rearrange(self.mix(x), "(b t) d h w -> b t (h w) d", b=len(tokens))


class SelfAttention(nn.Module):
    """Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245), QK-norm and rotary positions."""

    def __init__(self, dim: int, heads: int, kv_heads: int, qk_norm: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"], rotate: Rotation, window: int) -> Float[Tensor, "b n d"]:
        """Attends from each position to itself and the `window` - 1 positions before it."""
        q, k, v = self._project(x, rotate)
        return self.out(rearrange(_causal_attention(q, k, v, window), "b h n d -> b n (h d)"))

    def step(self, x: Float[Tensor, "b 1 d"], rotate: Rotation, cache: KVCache, place: int) -> Float[Tensor, "b 1 d"]:
        """The same for one position, the earlier ones being in the cache."""
        q, k, v = self._project(x, rotate)
        k, v = cache.put(place, k, v)
        return self.out(rearrange(_attend(q, k, v), "b h n d -> b n (h d)"))

    def _project(self, x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.key_value(x), "b n (two h d) -> two b h n d", two=2, h=self.kv_heads)
        return rotate(self.query_norm(q)), rotate(self.key_norm(k)), v


class CrossAttention(nn.Module):
    """Attention from every position to the text; its output starts at zero, so it begins as if it were not there."""

    def __init__(self, dim: int, text_dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(text_dim, 2 * kv_heads * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim)
        self.key_norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def read_text(self, text: Float[Tensor, "b l e"]) -> tuple[Tensor, Tensor]:
        """Keys and values (b, kv heads, l, head width) of the text, the same for every position."""
        k, v = rearrange(self.key_value(text), "b l (two h d) -> two b h l d", two=2, h=self.kv_heads)
        return self.key_norm(k), v

    def forward(
        self, x: Float[Tensor, "b n d"], text: tuple[Tensor, Tensor], mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b n d"]:
        q = self.query_norm(rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads))
        y = _attend(q, *text, mask=mask[:, None, None])
        return self.out(rearrange(y, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention in which groups of query heads share a key head."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if q.is_cpu and q.shape[2] * k.shape[2] <= _SHORT**2:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, chunk: int = 512) -> Tensor:
    """Causal attention over a sliding window, in chunks of queries once the window is shorter than the sequence."""
    n = q.shape[2]
    if n <= window:
        return _attend(q, k, v, causal=True)
    chunks = []
    for start in range(0, n, chunk):
        stop, first = min(start + chunk, n), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        mask = (distance >= 0) & (distance < window)
        chunks.append(_attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask=mask))
    return torch.cat(chunks, dim=2)
