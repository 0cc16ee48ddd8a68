"""Self-attention and attention to the text, with grouped queries (https://arxiv.org/abs/2305.13245) and caches.

Queries, keys and values that are projected from the same input come from one matrix. Its rows are ordered by group (a
key head and the query heads that share it), so that tensor parallelism can split the matrix along groups; the layers
derive the number of heads from the shapes of their inputs.

Shapes: b batch, n positions in raster order, m keys, d width, l text length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from t2v.transformer.layers import Linear, RMSNorm, stored
from t2v.transformer.rope import Rotation

Queries = Float[Tensor, "b heads n head_dim"]
Keys = Float[Tensor, "b kv_heads m head_dim"]
TextKeysValues = tuple[Float[Tensor, "b kv_heads l head_dim"], Float[Tensor, "b kv_heads l head_dim"]]

_SHORT_LENGTH = 256
"""Up to this length a plain matrix product beats the CPU's flash kernel in bfloat16 (forward and backward: 7× at 16
positions, 2× at 256). Chunks of `_BF16_CHUNK` queries beat it at any length (2× at 512, 2.8× at 2,048)."""
_FLASH_LENGTH = 512
"""Up to this length chunks of `_FP32_CHUNK` queries beat it in float32 (1.3 to 1.6× at 512, as fast at 1,024)."""
_BF16_CHUNK, _FP32_CHUNK = 128, 64
CHUNK = 512
"""Queries of a window that are computed at once, see `causal_attention`."""


class CacheSlots(NamedTuple):
    """Slots of a `KVCache` that a decoding pass writes and reads."""

    write: Int[Tensor, "b n"]
    """Slots for the new positions of each row."""
    mask: Bool[Tensor, "b 1 n m"]
    """Slots to attend to among the first m, which are read."""


BlockList = tuple[Int[Tensor, "1 1 rows"], Int[Tensor, "1 1 rows columns"]]
"""The number of blocks in each row, and their columns, first the counted ones."""
_BLOCK_SIZE = 128
"""Positions of a block of FlexAttention."""


class WindowBlocks(NamedTuple):
    """Blocks of queries and keys that FlexAttention computes, in which some or all keys are in the window.

    They are tensors of one forward pass, which all temporal layers share, in recomputation too.
    """

    keys: BlockList
    """Blocks of keys that are partly in the window, for each block of queries."""
    full_keys: BlockList
    """Blocks of keys that are in the window of each query."""
    queries: BlockList
    """The same for each block of keys, as the backward pass needs it."""
    full_queries: BlockList


class KVCache:
    """Keys and values of the last `size` positions, as a ring buffer.

    Args:
        size: Number of positions.
        like: A tensor with the batch size, heads, head width, dtype and device of the keys.
    """

    def __init__(self, size: int, like: Float[Tensor, "b kv_heads _ head_dim"]) -> None:
        self.size = size
        # With one slot more, all slots are as little contiguous as some of them, and run the same compiled code.
        shape = *like.shape[:2], size + 1, like.shape[3]
        self.keys, self.values = (like.new_zeros(shape)[:, :, :size] for _ in range(2))

    def write(self, slots: Int[Tensor, "b m"], keys: Keys, values: Keys) -> None:
        """Overwrite slots of each row, which hold the oldest positions."""
        if torch.compiler.is_compiling():  # `scatter_` would be compiled to a copy of the whole cache, and one back
            rows, heads = (torch.arange(size, device=slots.device) for size in keys.shape[:2])
            index = rows[:, None, None], heads[:, None], slots[:, None]
            self.keys.index_put_(index, keys)
            self.values.index_put_(index, values)
        else:  # takes half as long for one position
            along = slots[:, None, :, None].expand_as(keys)
            self.keys.scatter_(2, along, keys)
            self.values.scatter_(2, along, values)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep some rows of the batch, with the same strides."""
        kept = (F.pad(each[rows], (0, 0, 0, 1)) for each in (self.keys, self.values))
        self.keys, self.values = (each[:, :, : self.size] for each in kept)

    def read_before(self, position: int) -> tuple[Keys, Keys]:
        """Return the keys and values of the cached positions before `position`, oldest first."""
        if position < self.size:
            return self.keys[:, :, :position], self.values[:, :, :position]
        oldest = position % self.size
        return torch.roll(self.keys, -oldest, dims=2), torch.roll(self.values, -oldest, dims=2)


class SelfAttention(nn.Module):
    """Causal self-attention with grouped queries, QK-norm (https://arxiv.org/abs/2302.05442) and rotary positions.

    Args:
        dim: Width of input and output.
        heads: Query heads.
        kv_heads: Key and value heads.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.queries_per_key = dim // heads, heads // kv_heads
        self.query_key_value = Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.query_norm: nn.Module = RMSNorm(self.head_dim)
        self.key_norm: nn.Module = RMSNorm(self.head_dim)
        self.out = Linear(dim, dim)
        self.chunk = CHUNK
        """Queries of a window that are computed at once; the planner measures very long clips with more."""

    def forward(
        self, x: Float[Tensor, "b n d"], rotate: Rotation, window: int, blocks: WindowBlocks | None = None
    ) -> Float[Tensor, "b n d"]:
        """Attend from each position to itself and the `window` - 1 positions before it; see `causal_attention`."""
        q, k, v = self._project(x, rotate)
        return self._merge_heads(causal_attention(q, k, v, window, blocks, self.chunk))

    def step(
        self, x: Float[Tensor, "b n d"], rotate: Rotation, cache: KVCache, slots: CacheSlots
    ) -> Float[Tensor, "b n d"]:
        """Add the positions to the cache, and attend from them to those in the cache that the mask allows."""
        q, k, v = self._project(x, rotate)
        cache.write(slots.write, k, v)
        read = slots.mask.shape[-1]
        keys, values = cache.keys[:, :, :read], cache.values[:, :, :read]
        return self._merge_heads(grouped_query_attention(q, keys, values, slots.mask))

    def extend(
        self, x: Float[Tensor, "b n d"], rotate: Rotation, cache: KVCache, position: int, window: int
    ) -> Float[Tensor, "b n d"]:
        """Attend from the positions of one frame to themselves and the cache; add them to the cache.

        Args:
            x: Inputs of the frame.
            rotate: Rotation of its positions.
            cache: A cache of at least `window` positions; its size is a multiple of a frame.
            position: Raster position at which the frame begins.
            window: Positions that a query attends to, its own included.
        """
        q, k, v = self._project(x, rotate)
        cached_keys, cached_values = cache.read_before(position)
        keys, values = torch.cat([cached_keys, k], dim=2), torch.cat([cached_values, v], dim=2)
        n, known = x.shape[1], cached_keys.shape[2]
        query, key = torch.arange(known, known + n, device=x.device), torch.arange(known + n, device=x.device)
        y = grouped_query_attention(q, keys, values, _window_mask(query, key, window))
        first = position % cache.size
        cache.write(torch.arange(first, first + n, device=x.device).expand(len(x), -1), k, v)
        return self._merge_heads(y)

    def _project(
        self, x: Float[Tensor, "b n d"], rotate: Rotation
    ) -> tuple[Queries, Float[Tensor, "b kv_heads n head_dim"], Float[Tensor, "b kv_heads n head_dim"]]:
        """Return rotated queries, rotated keys, and values."""
        size = self.queries_per_key + 2
        groups = rearrange(self.query_key_value(x), "b n (kv g d) -> b kv g n d", g=size, d=self.head_dim)
        q, k, v = groups.split([self.queries_per_key, 1, 1], dim=2)
        q, k = self.query_norm(q).flatten(1, 2), self.key_norm(k.squeeze(2))
        return rotate(q), rotate(k), v.squeeze(2)

    def _merge_heads(self, y: Queries) -> Float[Tensor, "b n d"]:
        merged: Tensor = self.out(rearrange(y, "b heads n d -> b n (heads d)"))
        return merged


class CrossAttention(nn.Module):
    """Attention from every position to the text; the output projection is zero at initialization.

    Args:
        dim: Width of input and output.
        text_dim: Width of the text embeddings.
        heads: Query heads.
        kv_heads: Key and value heads.
    """

    def __init__(self, dim: int, text_dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.query = Linear(dim, dim)
        self.key_value = nn.Linear(text_dim, 2 * kv_heads * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim)
        self.key_norm = RMSNorm(self.head_dim)
        self.out = Linear(dim, dim)

    def project_text(self, text: Float[Tensor, "b l text_dim"]) -> TextKeysValues:
        """Return keys and values of the text, which are the same for all positions."""
        k, v = rearrange(self.key_value(text), "b l (kv two d) -> two b kv l d", two=2, d=self.head_dim)
        return self.key_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: TextKeysValues,
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "t heads"] | None,
    ) -> Float[Tensor, "b n d"]:
        """Attend to the text.

        Args:
            x: Inputs of t whole frames, or of any n positions.
            text: Result of `project_text`.
            mask: True for text tokens, False for padding; None where there is no padding.
            gate: Scale of each head in each frame, or at each position of each row (t = b·n); None for 1.
        """
        q = self.query_norm(rearrange(self.query(x), "b n (heads d) -> b heads n d", d=self.head_dim))
        y = grouped_query_attention(q, *text, mask=None if mask is None else mask[:, None, None])
        y = rearrange(y, "b heads n d -> b n heads d")
        if gate is not None:
            scale = gate.to(y.dtype)
            of_rows = len(scale) > y.shape[1]
            scale = scale.unflatten(0, y.shape[:2]) if of_rows else scale.repeat_interleave(y.shape[1] // len(scale), 0)
            y = y * scale[..., None]
        merged: Tensor = self.out(y.flatten(2))
        return merged


def grouped_query_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    mask: Bool[Tensor, "n m"] | Bool[Tensor, "b 1 #n m"] | None = None,
    causal: bool = False,
) -> Queries:
    """Return scaled dot-product attention in which groups of query heads share a key head.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True for keys to attend to; None for all.
        causal: Attend only to keys up to the query's own position (then n = m); excludes `mask`.
    """
    n, m = q.shape[2], k.shape[2]
    if n == 1:  # the query heads of a group can then be treated as positions
        rows = rearrange(q, "b (kv g) 1 d -> b kv g d", kv=k.shape[1])
        attend = row_attention if torch.compiler.is_compiling() else F.scaled_dot_product_attention
        row = attend(rows, k, v, mask)
        return rearrange(row, "b kv g d -> b (kv g) 1 d")
    if q.is_cpu and (n * m <= _SHORT_LENGTH**2 or q.dtype == torch.bfloat16):
        groups = q.shape[1] // k.shape[1]
        rows = rearrange(q * q.shape[-1] ** -0.5, "b (kv g) n d -> b kv (g n) d", g=groups)
        scores = (rows @ k.transpose(-1, -2)).unflatten(2, (groups, n))
        if causal:
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
        if mask is not None:  # added: `masked_fill_` takes longer, and has work to do in the backward pass
            shown = mask if mask.ndim == 2 else mask[:, :, None]
            scores += scores.new_zeros(shown.shape).masked_fill_(~shown, -torch.inf)
        y: Tensor = scores.softmax(dim=-1).to(v.dtype).flatten(2, 3) @ v
        return rearrange(y, "b kv (g n) d -> b (kv g) n d", g=groups)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def row_attention(
    q: Float[Tensor, "b kv_heads groups head_dim"], k: Keys, v: Keys, mask: Bool[Tensor, "b 1 1 m"] | None
) -> Float[Tensor, "b kv_heads groups head_dim"]:
    """Return the attention of one position as operations that `torch.compile` fuses.

    PyTorch's fused kernels compute a row's keys one block after the other. On an H100 with 8 key heads in bfloat16 they
    take 86 µs for 4,096 keys and 12 µs for 256, matrix products 16 and 7 µs (`tests/gpu/test_attention.py`). On a CPU
    the products are written as sums, which take 0.6 (128 keys) to 1.0 (4,096 keys) of the time of a call per product.
    """
    as_sums = q.is_cpu and q.dtype == torch.float32
    scores = (stored(q)[:, :, :, None] * k[:, :, None]).sum(dim=-1) if as_sums else q @ k.mT
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).to(v.dtype)
    y: Tensor = (stored(weights)[..., None] * v[:, :, None]).sum(dim=-2) if as_sums else weights @ v
    return y


def causal_attention(
    q: Queries,
    k: Float[Tensor, "b kv_heads n head_dim"],
    v: Float[Tensor, "b kv_heads n head_dim"],
    window: int,
    blocks: WindowBlocks | None = None,
    chunk: int = CHUNK,
) -> Queries:
    """Return causal attention over a sliding window of positions, without a mask as large as n × n.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        window: Positions that a query attends to, its own included.
        blocks: Result of `window_blocks`; compiled code then uses FlexAttention where there are more positions than
            `window`.
        chunk: Queries that are computed at once where there are more positions than `window`; on the CPU at
            most the constants above.
    """
    n, longest = q.shape[2], window
    if q.is_cpu and q.dtype == torch.bfloat16:
        chunk, longest = min(chunk, _BF16_CHUNK), min(window, _SHORT_LENGTH)
    elif q.is_cpu and n <= _FLASH_LENGTH:
        chunk, longest = min(chunk, _FP32_CHUNK), min(window, _FP32_CHUNK)
    if n <= longest:
        return grouped_query_attention(q, k, v, causal=True)
    if blocks is not None and torch.compiler.is_compiling():
        return flex_window_attention(q, k, v, window, blocks)
    outputs = []
    for start, queries in zip(range(0, n, chunk), q.split(chunk, dim=2), strict=True):
        stop, first = start + queries.shape[2], max(start - window + 1, 0)
        mask = _window_mask(
            torch.arange(start, stop, device=q.device), torch.arange(first, stop, device=q.device), window
        )
        outputs.append(grouped_query_attention(queries, k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(outputs, dim=2)


def flex_window_attention(
    q: Queries,
    k: Float[Tensor, "b kv_heads n head_dim"],
    v: Float[Tensor, "b kv_heads n head_dim"],
    window: int,
    blocks: WindowBlocks | None = None,
) -> Queries:
    """Return the same as `causal_attention` by FlexAttention, which skips blocks outside the window.

    It is fast only under `torch.compile`, and compiled for the CPU together with projections it is wrong (torch 2.14).
    """
    n = q.shape[2]
    if blocks is None:
        blocks = window_blocks(n, window, q.device)
    mask = BlockMask(
        (n, n),
        *(*blocks.keys, *blocks.full_keys, *blocks.queries, *blocks.full_queries),
        BLOCK_SIZE=(_BLOCK_SIZE, _BLOCK_SIZE),
        mask_mod=lambda batch, head, query, key: (query >= key) & (query - key < window),
    )
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def window_blocks(n: int, window: int, device: torch.device) -> WindowBlocks:
    """Return the blocks that attention over a sliding window of n positions computes.

    Unlike `create_block_mask` it needs no tensor of n × n values.
    """
    first = torch.arange(0, n, _BLOCK_SIZE, device=device)
    last = first + _BLOCK_SIZE - 1
    nearest, farthest = first[:, None] - last, last[:, None] - first  # distances of query and key
    whole = last < n
    full = (nearest >= 0) & (farthest < window) & whole[:, None] & whole
    partial = (farthest >= 0) & (nearest < window) & ~full
    return WindowBlocks(_block_list(partial), _block_list(full), _block_list(partial.T), _block_list(full.T))


def _block_list(used: Bool[Tensor, "rows columns"]) -> BlockList:
    columns = used.int().argsort(dim=-1, descending=True, stable=True)
    # The kernels read rows as contiguous memory, and sorting keeps the strides of a transposed input.
    columns = columns.to(torch.int32, memory_format=torch.contiguous_format)
    return used.sum(-1, dtype=torch.int32)[None, None], columns[None, None]


def _window_mask(query: Int[Tensor, " n"], key: Int[Tensor, " m"], window: int) -> Bool[Tensor, "n m"]:
    """Return which keys are among the last `window` positions up to the query."""
    distance = query[:, None] - key
    return (distance >= 0) & (distance < window)
