"""The spatial–temporal transformer: predicts the tokens of a video one after the other, from text.

- Tokens stand in raster order: time, then row, then column. The input at a place is the token before it, and the place
  is that of the token being predicted. What stood around that place in the frame before is an input too.
- Spatial layers attend causally within the frame being made. Temporal layers attend causally over the last `window`
  frames: a query at raster place p sees the places p − window·h·w + 1 … p. Cost and cache a token are constant.
- Rotary positions over time, row and column; RMSNorm, SwiGLU, grouped queries, QK-norm.
- Every layer attends to the text, as strongly as a gate says that knows how far the video has come; the pooled text
  vector, if it is wanted, is added to every input. Both start at zero effect. A learned "no text" embedding makes
  classifier-free guidance (https://arxiv.org/abs/2207.12598) possible.

Divided space-time attention: https://arxiv.org/abs/2102.05095; Llama's block: https://arxiv.org/abs/2302.13971.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.batch import TextEmbedding
from t2v.checkpoints.hub import HubModel
from t2v.errors import UserError
from t2v.transformer.layers import (
    CrossAttention,
    KVCache,
    Places,
    PreviousFrame,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    TextGate,
    local,
    product,
)
from t2v.transformer.rope import Rotation, raster, rotation, split_head

_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
_SHAPES = 64
"""Most kinds of input, such as lengths of clips, for which layers are compiled."""
TextKeysValues = tuple[Float[Tensor, "b heads l c"], Float[Tensor, "b heads l c"]]


class Block(nn.Module):
    """One layer, spatial or temporal.

    x ─┬─ norm ─ self-attention ─ + ─┬─ norm ─ text attention ─ gate ─ + ─┬─ norm ─ SwiGLU ─ + ─ out
       └──────────────────────────┘   └─────────────────────────────────┘   └──────────────────┘
    """

    def __init__(
        self,
        temporal: bool,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden_dim: int,
        text_dim: int,
        qk_norm: bool,
        recompute_attention: bool,
    ):
        super().__init__()
        self.temporal, self.recompute_attention = temporal, recompute_attention
        self.attention_norm = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, kv_heads, qk_norm)
        self.text_norm = RMSNorm(dim)
        self.text_attention = CrossAttention(dim, text_dim, heads, kv_heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim, kv_heads)

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        text: Float[Tensor, "b l e"],
        mask: Bool[Tensor, "b l"],
        gate: Float[Tensor, "t heads"] | None,
        rotate: Rotation,
        window: int,
    ) -> Float[Tensor, "b t n d"]:
        if self.recompute_attention and torch.is_grad_enabled():
            x = _recompute(self._attend, x, text, mask, gate, rotate, window)
        else:
            x = self._attend(x, text, mask, gate, rotate, window)
        return x + self.mlp(self.mlp_norm(x))

    def _attend(
        self, x: Tensor, text: Tensor, mask: Tensor, gate: Tensor | None, rotate: Rotation, window: int
    ) -> Float[Tensor, "b t n d"]:
        b, t, n, _ = x.shape
        h = self.attention_norm(x)
        if self.temporal:
            h = self.attention(h.flatten(1, 2), rotate, window * n).unflatten(1, (t, n))
        else:
            h = self.attention(h.flatten(0, 1), rotate.at(slice(n)), n).unflatten(0, (b, t))
        x = x + h
        read = self.text_attention.read_text(text)
        return x + self.text_attention(self.text_norm(x).flatten(1, 2), read, mask, gate).unflatten(1, (t, n))

    def step(
        self,
        x: Float[Tensor, "b 1 d"],
        text: TextKeysValues,
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "1 heads"] | None,
        rotate: Rotation,
        cache: KVCache,
        places: Places,
    ) -> Float[Tensor, "b 1 d"]:
        """The layer for one position, the earlier ones being in the cache."""
        x = x + self.attention.step(self.attention_norm(x), rotate, cache, places)
        x = x + self.text_attention(self.text_norm(x), text, mask, gate)
        return x + self.mlp(self.mlp_norm(x))

    def extend(
        self,
        x: Float[Tensor, "b n d"],
        text: TextKeysValues,
        mask: Bool[Tensor, "b l"] | None,
        gate: Float[Tensor, "1 heads"] | None,
        rotate: Rotation,
        cache: KVCache,
        place: int,
    ) -> Float[Tensor, "b n d"]:
        """The layer for a whole frame at `place`; a spatial layer has nothing to remember of it."""
        h = self.attention_norm(x)
        if self.temporal:
            x = x + self.attention.extend(h, rotate, cache, place)
        else:
            x = x + self.attention(h, rotate, x.shape[1])
        x = x + self.text_attention(self.text_norm(x), text, mask, gate)
        return x + self.mlp(self.mlp_norm(x))


@dataclass
class DecodingState:
    """What generation remembers."""

    caches: list[KVCache]
    text: list[TextKeysValues]
    """The text, as each layer reads it."""
    mask: Bool[Tensor, "b l"] | None
    """Which words are there; None where all are."""
    pooled: Float[Tensor, "b d"]
    frames: int
    """Length of the whole video."""
    recent: Int[Tensor, "b h w"]
    """The last h·w tokens, as a ring over the places of a frame."""
    fixed: bool
    """Whether layers read 1, 4, 16, … frames of their caches with a mask, so that a compiled step meets few shapes."""
    place: int = 0
    """The next raster place."""
    rotate: Rotation = field(init=False)
    gates: list[Float[Tensor, "1 heads"]] | list[None] = field(init=False)
    previous: Float[Tensor, "b n d"] | None = None
    """What the frame before says at each place."""


class VideoTransformer(nn.Module, HubModel, library_name="t2v"):
    """Autoregressive transformer over the tokens of a video, conditioned on text.

    `save_pretrained` writes a folder of safetensors and JSON, which `from_pretrained` reads.
    """

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
        tied_head: bool = False,
        text_gate: bool = True,
        text_pooled: bool = True,
        checkpointing: Literal["none", "attention", "full"] = "none",
        device: str | None = None,
    ):
        """
        Args:
            vocab_size: size of the codebook of the VQ-VAE.
            grid_size: height and width of the token grid of a frame.
            dim: width of the model.
            spatial_layers: layers that attend within a frame; spatial and temporal layers are interleaved evenly.
            temporal_layers: layers that attend over the last `window` frames.
            heads: query heads; they divide `dim`.
            kv_heads: key and value heads; they divide `heads` and `hidden_dim`.
            hidden_dim: hidden width of the feed-forward layers.
            text_dim: width of the text embeddings.
            window: frames that temporal layers look back over, the one being made included.
            rope_theta: base of the wavelengths of the rotary embedding.
            rope_dims: dimensions of a head that turn with time, row and column; about a third each by default.
            qk_norm: whether queries and keys are normalised.
            tied_head: whether logits are products with the token embeddings, instead of a matrix of their own.
            text_gate: whether attention to the text is weighed by how far the video has come.
            text_pooled: whether one vector for all of the text is added to every input.
            checkpointing: what the backward pass computes again instead of keeping it: nothing, the attentions, or
                whole layers.
            device: where the weights lie; "meta" for weights without memory, which `to_empty` and `reset_parameters`,
                or loading, make real.
        """
        super().__init__()
        if dim % heads or heads % kv_heads or hidden_dim % kv_heads:
            raise UserError(
                f"heads={heads} must divide dim={dim}, and kv_heads={kv_heads} must divide heads={heads} and "
                f"hidden_dim={hidden_dim}."
            )
        head_dim = dim // heads
        self.rope_dims, self.rope_theta = rope_dims or split_head(head_dim), rope_theta
        if sum(self.rope_dims) != head_dim or any(d % 2 for d in self.rope_dims):
            raise UserError(
                f"rope_dims={list(self.rope_dims)} must be even and sum to dim / heads = {head_dim}: change rope_dims, "
                f"dim or heads."
            )
        self.vocab_size, self.grid_size, self.text_dim, self.window = vocab_size, grid_size, text_dim, window
        self.kv_heads = kv_heads
        self.checkpointing = checkpointing
        self._compiled = False

        device = device or str(torch.get_default_device())
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(vocab_size, dim)
            self.previous_frame = PreviousFrame(vocab_size, dim)
            self.start = nn.Parameter(torch.empty(dim))
            self.no_text = nn.Parameter(torch.empty(text_dim))
            self.text_norm = RMSNorm(text_dim)
            self.pooled = nn.Linear(text_dim, dim, bias=False) if text_pooled else None
            layers = spatial_layers + temporal_layers
            self.gate = TextGate(layers, heads) if text_gate else None
            recompute = checkpointing == "attention"
            self.blocks = nn.ModuleList(
                Block(is_temporal, dim, heads, kv_heads, hidden_dim, text_dim, qk_norm, recompute)
                for is_temporal in (
                    (i + 1) * temporal_layers // layers > i * temporal_layers // layers for i in range(layers)
                )
            )
            self.norm = RMSNorm(dim)
            self.head = None if tied_head else nn.Linear(dim, vocab_size, bias=False)
        if device != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), smaller at the layers that write to the residual stream, zero where the text enters."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                nn.init.ones_(parameter)
            elif name == "previous_frame.mix.weight":
                nn.init.normal_(parameter, std=0.3)
                with torch.no_grad():
                    parameter[:, :, 1, 1] += 1
            elif name == "gate.hidden.weight":
                nn.init.normal_(parameter, std=0.5)
            elif name.startswith("gate.") or name == "pooled.weight" or name.endswith("text_attention.out.weight"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** (0.5 * name.endswith("out.weight")))

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> "VideoTransformer":
        """An untrained model.

        Args:
            arguments: those of `__init__` in JSON's types.
        """
        dims = arguments.get("rope_dims")
        return cls(**{**arguments, "rope_dims": dims and tuple(dims)})

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

        Raises:
            UserError: where the text is of another width, or (on the CPU) a token lies outside the vocabulary.
        """
        self._require_tokens(tokens)
        b, t, h, w = tokens.shape
        embedded = self.token_embedding(tokens.flatten(1))  # b (t h w) d
        x = torch.cat([local(self.start).expand(b, 1, -1), embedded[:, :-1]], dim=1)
        if t > 1:
            previous = self.previous_frame(tokens[:, :-1]).flatten(1, 2)
            x = x + F.pad(previous, (0, 0, h * w, 0))  # the first frame has none before it
        words, mask, pooled = self._read(text, drop_text)
        for each in (words, mask):
            torch._dynamo.maybe_mark_dynamic(each, 1)
        x = rearrange(x + pooled[:, None], "b (t n) d -> b t n d", t=t)
        rotate = self._rotation(0, t * h * w, h, w)
        gates = self._gates(torch.arange(t, device=tokens.device), t)
        recompute = self.checkpointing == "full" and torch.is_grad_enabled()
        for block, gate in zip(self.blocks, gates, strict=True):
            run = partial(_recompute, block) if recompute else block
            x = run(x, words, mask, gate, rotate, self.window)
        return rearrange(self._logits(x), "b t (h w) v -> b t h w v", h=h)

    def start_decoding(
        self, text: TextEmbedding, frames: int, drop_text: Bool[Tensor, " b"] | None = None
    ) -> DecodingState:
        """The state before the first token of one video for each text.

        Args:
            text: embeddings of the prompts.
            frames: length of the whole video, which the gate goes by.
            drop_text: True for videos that shall not see their prompt.
        """
        words, mask, pooled = self._read(text, drop_text)
        size = self.grid_size
        blocks = cast("list[Block]", self.blocks)
        read = [block.text_attention.read_text(words) for block in blocks]
        return DecodingState(
            caches=[
                KVCache(size**2 * (self.window if block.temporal else 1), like=values)
                for block, (_, values) in zip(blocks, read, strict=True)
            ],
            text=read,
            mask=None if mask.all() else mask,
            pooled=pooled,
            frames=frames,
            recent=torch.zeros(len(pooled), size, size, dtype=torch.long, device=pooled.device),
            fixed=self._compiled,
        )

    def step(self, tokens: Int[Tensor, " b"] | None, state: DecodingState) -> Float[Tensor, "b v"]:
        """Logits of the next token, from the one before it (None at the beginning); moves `state` on by one place."""
        size = self.grid_size**2
        frame, at = divmod(state.place, size)
        if tokens is None:
            x = local(self.start) + state.pooled
        else:
            state.recent.flatten(1)[:, at - 1] = tokens
            x = self.token_embedding(tokens) + state.pooled
        if at == 0:
            self._begin_frame(frame, state)
        if state.previous is not None:
            x = x + state.previous[:, at]
        rotate = state.rotate.at(slice(at, at + 1))
        spatial = _places(at, size, state)
        temporal = _places(state.place, size * self.window, state)
        state.place += 1
        return self._advance(x[:, None], state, rotate, spatial, temporal)[:, 0]

    def prefill(self, tokens: Int[Tensor, "b t h w"], state: DecodingState) -> None:
        """Takes given frames into a new state, a frame at a time; the next `step` gets the last of their tokens.

        Raises:
            UserError: where a token lies outside the vocabulary, or the grid is another than the model's.
        """
        self._require_tokens(tokens)
        size = self.grid_size**2
        if tokens.shape[2:] != (self.grid_size, self.grid_size):
            raise UserError(
                f"The given frames have {tokens.shape[2]}×{tokens.shape[3]} tokens, but the transformer's grid is "
                f"{self.grid_size}×{self.grid_size}: tokenise them with the VQ-VAE it was trained with, at its size."
            )
        last: Tensor | None = None
        for frame, codes in enumerate(tokens.flatten(2).unbind(1)):
            self._begin_frame(frame, state)
            first = local(self.start).expand(len(codes), -1) if last is None else self.token_embedding(last)
            x = torch.cat([first[:, None], self.token_embedding(codes[:, :-1])], dim=1) + state.pooled[:, None]
            if state.previous is not None:
                x = x + state.previous
            for block, cache, text, gate in zip(self.blocks, state.caches, state.text, state.gates, strict=True):
                x = cast("Block", block).extend(x, text, state.mask, gate, state.rotate, cache, frame * size)
            last = codes[:, -1]
            state.recent = codes.unflatten(1, state.recent.shape[1:]).clone()
            state.place += size

    def compile_layers(self) -> None:
        """Compiles what `forward` does in the layers, once for every shape of clips; captions may be of any length."""
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _SHAPES)  # beyond it, layers run as if not compiled
        for block in self.blocks:
            block.compile(dynamic=False)  # in place, so that the names of the weights stay as they are

    def compile_decoding(self) -> None:
        """Compiles what `step` does, for states that are started from now on; the first steps take a minute or more."""
        self._compiled = True
        lean: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
        }  # layers do not change
        shared = type(self)._advance
        own = FunctionType(shared.__code__.replace(), shared.__globals__)  # or two models would share what is compiled
        self._advance = torch.compile(MethodType(own, self), dynamic=False, options=lean)  # type: ignore[method-assign]

    def _advance(
        self, x: Float[Tensor, "b 1 d"], state: DecodingState, rotate: Rotation, spatial: Places, temporal: Places
    ) -> Float[Tensor, "b 1 v"]:
        blocks = cast("list[Block]", self.blocks)
        for block, cache, text, gate in zip(blocks, state.caches, state.text, state.gates, strict=True):
            x = block.step(x, text, state.mask, gate, rotate, cache, temporal if block.temporal else spatial)
        return self._logits(x)

    def _begin_frame(self, frame: int, state: DecodingState) -> None:
        """What all places of a frame share."""
        size = self.grid_size
        state.rotate = self._rotation(frame * size**2, (frame + 1) * size**2, size, size)
        state.gates = self._gates(torch.tensor([frame], device=state.pooled.device), state.frames)
        if frame:
            state.previous = self.previous_frame(state.recent[:, None])[:, 0]

    def _logits(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return product(self.norm(x), local(weight))

    def _gates(self, frame: Int[Tensor, " t"], frames: int) -> list[Float[Tensor, "t heads"]] | list[None]:
        """The gate of each layer."""
        return [None] * len(self.blocks) if self.gate is None else list(self.gate(frame, frames))

    def _rotation(self, start: int, stop: int, height: int, width: int) -> Rotation:
        """Rotary angles of the raster places from `start` to `stop`."""
        return rotation(raster(start, stop, height, width, self.start.device), self.rope_dims, self.rope_theta)

    def _require_tokens(self, tokens: Tensor) -> None:
        """On the GPU it would make every step wait, and the embedding itself stops the run."""
        if tokens.is_cpu and not torch.compiler.is_compiling():
            low, high = (int(limit) for limit in tokens.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"Token {low if low < 0 else high} lies outside the vocabulary, 0 to {self.vocab_size - 1}: were "
                    f"the tokens made by a VQ-VAE with another codebook?"
                )

    def _read(self, text: TextEmbedding, drop: Bool[Tensor, " b"] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The words (b, l, e), their mask and the pooled vector (b, d), dropped samples reading "no text"."""
        words, mask, pooled = text
        if words.shape[-1] != self.text_dim:
            raise UserError(
                f"The text embeddings are {words.shape[-1]} wide but the transformer's text_dim is {self.text_dim}: "
                f"were they made by another text encoder?"
            )
        if drop is not None:
            no_text = local(self.no_text)
            words = torch.where(drop[:, None, None], no_text.to(words.dtype), words)
            pooled = torch.where(drop[:, None], no_text.to(pooled.dtype), pooled)
            mask = mask & ~drop[:, None]
            mask = mask | (drop[:, None] & (torch.arange(mask.shape[1], device=mask.device) == 0))
        start = local(self.start).expand(len(words), -1)
        added = torch.zeros_like(start) if self.pooled is None else self.pooled(self.text_norm(pooled))
        return self.text_norm(words), mask, added


def _places(place: int, size: int, state: DecodingState) -> Places:
    """Where raster place `place` goes in a ring of `size`, and what it may read there."""
    device = state.pooled.device
    slot, stop = torch.tensor([place % size], device=device), min(place + 1, size)
    if not state.fixed:
        return Places(slot, stop, None)
    first = state.recent[0].numel()
    stop = next(step for k in itertools.count() if (step := min(first * 4**k, size)) >= stop)
    return Places(slot, stop, (torch.arange(stop, device=device) <= place)[None])
