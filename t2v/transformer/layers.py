"""The layers of the transformer: self-attention in space or time, attention to the text, SwiGLU.

Matrices that are multiplied with the same input are one: queries, keys and values; keys and values of the text; both
halves of SwiGLU. Their rows lie group after group, a group being a key head and the query heads that share it, so that
devices can take some groups each: the layers go by the heads they find, and not by those they were made with.

Shapes: b batch, n positions in raster order, d width, l text length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from t2v.transformer.rope import Rotation

_SHORT = 256
"""Up to this length a plain product of matrices beats the CPU's flash kernel (forward and backward, bfloat16: 7× at 16
positions, 2× at 256), and in bfloat16 so many queries at a time beat it at any length (2.5× at 512, 1.5× at 4,096)."""


class RMSNorm(nn.RMSNorm):
    """RMS normalisation (https://arxiv.org/abs/1910.07467) in the precision of its input."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """`product` as a layer; there is no bias."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        return product(x, self.weight)


def local(weight: Tensor) -> Tensor:
    """A weight that all devices of a mesh have, as a tensor of this one."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def product(x: Float[Tensor, "... d"], weight: Float[Tensor, "e d"]) -> Float[Tensor, "... e"]:
    """`F.linear`; a single row on the CPU, as in decoding, takes all cores and reads the weights at full speed."""
    full = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if x.is_cpu and full and x.numel() == weight.shape[1] and not isinstance(weight, DTensor):
        if torch.compiler.is_compiling():
            return (weight * x.flatten()).sum(dim=-1).view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Places(NamedTuple):
    """Where a cached layer writes and what it may read."""

    slots: Int[Tensor, " n"]
    """Slots of the ring that the new positions take."""
    stop: int
    """Only slots before this one are read."""
    mask: Bool[Tensor, "n stop"] | None
    """Which of those; all where it is None."""


class KVCache:
    """Keys and values of the last `size` positions, as a ring; what is written first is forgotten first."""

    def __init__(self, size: int, like: Float[Tensor, "b h _ d"]):
        self.keys = like.new_zeros(*like.shape[:2], size, like.shape[3])
        self.values = torch.zeros_like(self.keys)

    def put(self, places: Places, key: Float[Tensor, "b h n d"], value: Float[Tensor, "b h n d"]) -> None:
        """Writes new positions over the oldest."""
        self.keys.index_copy_(2, places.slots, key)
        self.values.index_copy_(2, places.slots, value)


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


class TextGate(nn.Module):
    """How strongly each head of each layer listens to the text, by how far the video has come.

    A small network reads a frame's place in the video, in waves of one to eight half turns, and the video's length; it
    gives a factor from 0 to 2, which begins as 1.
    """

    _WAVES = 4

    def __init__(self, layers: int, heads: int, hidden_dim: int = 64):
        super().__init__()
        self.layers = layers
        self.hidden = nn.Linear(2 * self._WAVES + 1, hidden_dim)
        self.out = nn.Linear(hidden_dim, layers * heads)

    def forward(self, frame: Int[Tensor, " t"], frames: int) -> Float[Tensor, "layers t heads"]:
        """The factors for the frames numbered `frame` of a video of `frames` frames."""
        angle = torch.pi * frame[:, None] / frames * 2 ** torch.arange(self._WAVES, device=frame.device)
        length = torch.full_like(angle[:, :1], frames).log2() / 8
        waves = torch.cat([angle.sin(), angle.cos(), length], dim=-1).to(self.hidden.weight.dtype)
        x = self.out(F.silu(self.hidden(waves)))
        return rearrange(2 * x.sigmoid(), "t (layers heads) -> layers t heads", layers=self.layers)


class SelfAttention(nn.Module):
    """Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245), QK-norm and rotary positions."""

    def __init__(self, dim: int, heads: int, kv_heads: int, qk_norm: bool):
        super().__init__()
        self.head_dim, self.shared = dim // heads, heads // kv_heads
        self.query_key_value = Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.out = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], rotate: Rotation, window: int) -> Float[Tensor, "b n d"]:
        """Attends from each position to itself and the `window` - 1 positions before it."""
        q, k, v = self._project(x, rotate)
        return self.out(rearrange(_causal_attention(q, k, v, window), "b h n d -> b n (h d)"))

    def step(
        self, x: Float[Tensor, "b 1 d"], rotate: Rotation, cache: KVCache, places: Places
    ) -> Float[Tensor, "b 1 d"]:
        """The same for one position, the earlier ones being in the cache."""
        q, k, v = self._project(x, rotate)
        cache.put(places, k, v)
        y = _attend(q, cache.keys[:, :, : places.stop], cache.values[:, :, : places.stop], places.mask)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))

    def extend(self, x: Float[Tensor, "b n d"], rotate: Rotation, cache: KVCache, place: int) -> Float[Tensor, "b n d"]:
        """The same for a whole frame at `place`, the earlier ones being in the cache."""
        q, k, v = self._project(x, rotate)
        size, n = cache.keys.shape[2], x.shape[1]
        start, known = place % size, min(place, size)
        before = [
            torch.roll(ring[:, :, :known], -start if known == size else 0, 2) for ring in (cache.keys, cache.values)
        ]
        keys, values = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        distance = known + torch.arange(n, device=x.device)[:, None] - torch.arange(known + n, device=x.device)
        y = _attend(q, keys, values, (distance >= 0) & (distance < size))
        cache.put(Places(torch.arange(start, start + n, device=x.device), size, None), k, v)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))

    def _project(self, x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        groups = rearrange(self.query_key_value(x), "b n (h g d) -> b h g n d", g=self.shared + 2, d=self.head_dim)
        q, k, v = self.query_norm(groups[:, :, :-2]).flatten(1, 2), self.key_norm(groups[:, :, -2]), groups[:, :, -1]
        return rotate(q), rotate(k), v


class CrossAttention(nn.Module):
    """Attention from every position to the text; its output starts at zero, so it begins as if it were not there."""

    def __init__(self, dim: int, text_dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.query = Linear(dim, dim)
        self.key_value = nn.Linear(text_dim, 2 * kv_heads * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim)
        self.key_norm = RMSNorm(self.head_dim)
        self.out = Linear(dim, dim)

    def read_text(self, text: Float[Tensor, "b l e"]) -> tuple[Tensor, Tensor]:
        """Keys and values (b, kv heads, l, head width) of the text, the same for every position."""
        k, v = rearrange(self.key_value(text), "b l (h two d) -> two b h l d", two=2, d=self.head_dim)
        return self.key_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "t heads"] | None,
    ) -> Float[Tensor, "b n d"]:
        """Attends to the words that `mask` shows, all where it is None; `gate` weighs the heads, a row a frame."""
        q = self.query_norm(rearrange(self.query(x), "b n (h d) -> b h n d", d=self.head_dim))
        y = _attend(q, *text, mask=None if mask is None else mask[:, None, None])
        y = rearrange(y, "b h n d -> b n h d")
        if gate is not None:
            y = y * gate.to(y.dtype).repeat_interleave(x.shape[1] // len(gate), dim=0)[..., None]
        return self.out(y.flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, groups: int):
        super().__init__()
        self.width = hidden_dim // groups
        self.gate_up = Linear(dim, 2 * hidden_dim)
        self.out = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        gate, up = rearrange(self.gate_up(x), "... (h two c) -> two ... h c", two=2, c=self.width)
        return self.out((F.silu(gate) * up).flatten(-2))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention in which groups of query heads share a key head."""
    n, m = q.shape[2], k.shape[2]
    if n == 1:  # the heads of a group are then as good as positions
        rows = rearrange(q, "b (h g) 1 d -> b h g d", h=k.shape[1])
        return rearrange(F.scaled_dot_product_attention(rows, k, v, attn_mask=mask), "b h g d -> b (h g) 1 d")
    if q.is_cpu and (n * m <= _SHORT**2 or q.dtype == torch.bfloat16):
        groups = q.shape[1] // k.shape[1]
        rows = rearrange(q * q.shape[-1] ** -0.5, "b (h g) n d -> b h (g n) d", g=groups)
        scores = (rows @ k.transpose(-1, -2)).unflatten(2, (groups, n))
        if causal:
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[:, :, None]), -torch.inf)
        return rearrange(scores.softmax(dim=-1).to(v.dtype).flatten(2, 3) @ v, "b h (g n) d -> b (h g) n d", g=groups)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, chunk: int = 512) -> Tensor:
    """Causal attention over a sliding window; no mask is ever as large as the sequence squared."""
    n = q.shape[2]
    if q.is_cpu and q.dtype == torch.bfloat16:
        chunk = _SHORT
        whole = min(window, chunk)
    else:
        whole = window
    if n <= whole:
        return _attend(q, k, v, causal=True)
    if torch.compiler.is_compiling() and q.is_cuda:  # on the CPU, compiled with projections, it is wrong (torch 2.14)
        return _band_attention(q, k, v, window)
    chunks = []
    for start in range(0, n, chunk):
        stop, first = min(start + chunk, n), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        mask = (distance >= 0) & (distance < window)
        chunks.append(_attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask=mask))
    return torch.cat(chunks, dim=2)


def _band_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same in a fused kernel, which only torch.compile makes fast; blocks outside the band are left out."""
    n = q.shape[2]

    def band(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return flex_attention(q, k, v, block_mask=create_block_mask(band, None, None, n, n, q.device), enable_gqa=True)
