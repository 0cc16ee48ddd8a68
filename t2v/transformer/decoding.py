"""Incremental decoding with key and value caches: a pass computes the logits of one or more successive positions.

- Each video of a batch is at its own position, and a pass computes a fixed number of positions from there on. All of it
  is computed on the device from the tensor of positions, with fixed shapes, so that nothing waits for the device and
  one compiled graph (or CUDA graph) serves the whole video.
- The caches are ring buffers. A spatial layer caches the current frame, a temporal layer the last `window` frames, and
  both the frames into which a pass may reach. Time and memory per pass are constant however long the video is.
- A pass may be given tokens that turn out to be wrong: the positions up to the first wrong one are right, and later
  passes overwrite the keys and values of the others before they are read.
- The text is projected once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.compilation import prepare_compilation
from t2v.errors import UserError
from t2v.torch_private import mark_dynamic
from t2v.transformer.attention import CacheSlots, KVCache, TextKeysValues
from t2v.transformer.block import Block
from t2v.transformer.layers import local_tensor, stored
from t2v.transformer.model import VideoTransformer
from t2v.transformer.rope import Rotation, rotation_at

_TEXT_LENGTH = 128
"""Text tokens to which prompts are padded in compiled decoding; longer ones to a power of two."""
_COMPILED_PASSES = 64
"""Number of input shapes for which passes are compiled before they would run uncompiled."""


class Decoder:
    """Decoder of one video per text.

    Args:
        model: The transformer, in eval mode. It is not changed.
        text: Text embeddings of the prompts.
        drop_text: True for videos whose prompt is replaced by "no text".
        compiled: Whether to run passes by `torch.compile`, on GPUs as CUDA graphs. It takes a minute or more in the
            first pass, once per model, batch size and number of positions.
        positions: Most positions that a pass computes.

    Attributes:
        position: Raster position of the next `step`.
        caches: Cache of each layer.
        text: Keys and values of the text for each layer.
    """

    def __init__(
        self,
        model: VideoTransformer,
        text: TextEmbedding,
        drop_text: Bool[Tensor, " b"] | None = None,
        compiled: bool = False,
        positions: int = 1,
    ) -> None:
        tokens, mask = model.normalize_text(text, drop_text)
        if compiled:
            tokens, mask = _pad_text(tokens, mask)
        self._model, self._compiled = model, compiled
        self._run = _compiled_pass(model) if compiled else decode_pass
        self._blocks = cast("list[Block]", model.blocks)
        self._mask = None if not compiled and mask.all() else mask
        self._device = mask.device
        self._frame_size = model.grid_size**2
        self._gates = model.gates(torch.arange(model.attention.window, device=self._device))
        self.position = 0
        self._recent: Int[Tensor, "b two_frames"] | None = None
        projected = (block.text_attention.project_text(tokens) for block in self._blocks)
        self.text = [(keys.contiguous(), values.contiguous()) for keys, values in projected]
        reach = -(-(positions - 1) // self._frame_size)  # frames after the current one
        self.caches = [
            KVCache(self._frame_size * ((model.attention.window if block.temporal else 1) + reach), like=values)
            for block, (_, values) in zip(self._blocks, self.text, strict=True)
        ]
        self._slots = torch.arange(self._frame_size * (model.attention.window + reach), device=self._device)
        self._graphs: dict[int, _CudaGraph] = {}

    def logits(
        self, tokens: Int[Tensor, "b ring"], position: Int[Tensor, " b"], positions: int = 1, stop: int | None = None
    ) -> Float[Tensor, "b {positions} v"]:
        """Run a pass, and return the logits of the next `positions` tokens of each video.

        Args:
            tokens: Tokens of the last frames as a ring buffer: that of raster position p is at p modulo its length, a
                multiple of a frame. They are read from the frame before `position` up to the last position but one of
                the pass; the logits at a position are those of the model if all tokens before it are right.
            position: The first position of each video.
            positions: Number of positions, at most that of the decoder.
            stop: No video's pass reaches beyond this position; the temporal layers' slots after it are not read. A CUDA
                graph always reads all.
        """
        if self._compiled and self._device.type == "cuda":
            if positions not in self._graphs:
                self._graphs[positions] = _CudaGraph(partial(self._decode, positions=positions), tokens, position)
            return self._graphs[positions](tokens, position)
        return self._decode(tokens, position, positions, stop)

    def _decode(
        self, tokens: Int[Tensor, "b ring"], position: Int[Tensor, " b"], positions: int, stop: int | None = None
    ) -> Float[Tensor, "b {positions} v"]:
        slots = self._slots
        if stop is not None:
            slots = slots[: -(-stop // self._frame_size) * self._frame_size]
            if self._compiled:
                mark_dynamic(slots, 0)
        inputs = tokens, position, self.text, self._mask, self._gates
        logits: Tensor = self._run(self._model, *inputs, self.caches, positions, slots)
        return logits

    def step(self, tokens: Int[Tensor, " b"] | None) -> Float[Tensor, "b v"]:
        """Return the logits of the next token, one position after the other.

        Args:
            tokens: The token before it in each video; None for the first step of a video without start frames.
        """
        rows, ring = len(self.caches[0].keys), 2 * self._frame_size
        if self._recent is None:
            self._recent = torch.zeros(rows, ring, dtype=torch.long, device=self._device)
        if tokens is not None:
            self._recent[:, (self.position - 1) % ring] = tokens
        position = torch.full((rows,), self.position, device=self._device)
        self.position += 1
        return self.logits(self._recent, position, stop=self.position)[:, 0]

    def prefill(self, tokens: Int[Tensor, "b t h w"]) -> None:
        """Add start frames, a frame at a time, before the first pass; the next `step` takes their last token.

        Args:
            tokens: Tokens of the frames.

        Raises:
            UserError: If a token is out of range, or the grid is not the model's.
        """
        model, grid = self._model, self._model.grid_size
        model.check_tokens(tokens)
        if tokens.shape[2:] != (grid, grid):
            raise UserError(
                f"The start frames have {tokens.shape[2]}×{tokens.shape[3]} tokens, but the transformer's grid is "
                f"{grid}×{grid}: tokenize them with the VQ-VAE it was trained with, at its size."
            )
        before: Tensor | None = None
        for frame, codes in enumerate(tokens.unbind(1)):
            embedded = model.token_embedding(codes.flatten(1))
            if before is None:
                first = local_tensor(model.start).expand(len(codes), -1)
            else:
                first = model.token_embedding(before[:, -1, -1])
            x = torch.cat([first[:, None], embedded[:, :-1]], dim=1)
            if before is not None:
                x = x + model.previous_frame(before[:, None])[:, 0]
            rotate = model.rotation(self.position, self.position + self._frame_size, grid, grid)
            gates = model.gates(torch.full((1,), frame, device=self._device))
            for block, cache, text, gate in zip(self._blocks, self.caches, self.text, gates, strict=True):
                x = block.extend(x, text, self._mask, gate, rotate, cache, self.position, model.attention.window)
            before = codes
            self.position += self._frame_size
        self._recent = tokens[:, -2:].flatten(1).roll((len(tokens[0]) % 2) * self._frame_size, 1)
        if tokens.shape[1] == 1:
            self._recent = torch.cat([self._recent, torch.zeros_like(self._recent)], dim=1)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep some videos of the batch and forget the others."""
        self._graphs.clear()
        self._mask = None if self._mask is None else self._mask[rows]
        self.text = [(keys[rows], values[rows]) for keys, values in self.text]
        for cache in self.caches:
            cache.select(rows)


class _CudaGraph:
    """A pass as a CUDA graph: the host starts all its kernels at once.

    `torch.compile` can make CUDA graphs too, but records a new one for each decoder, at most 128 times, and copies the
    keys and values of the text in each pass.

    Args:
        run: The pass, as a function of tokens and positions, which may change tensors that exist before.
        tokens: Tokens of the first pass; the others have their shape.
        position: Positions of the first pass.
    """

    def __init__(
        self,
        run: Callable[[Int[Tensor, "b ring"], Int[Tensor, " b"]], Float[Tensor, "b n v"]],
        tokens: Int[Tensor, "b ring"],
        position: Int[Tensor, " b"],
    ) -> None:
        self._tokens, self._position = tokens.clone(), position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and initializes the libraries that the pass calls
            run(self._tokens, self._position)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may load data
            self._logits = run(self._tokens, self._position)

    def __call__(self, tokens: Int[Tensor, "b ring"], position: Int[Tensor, " b"]) -> Float[Tensor, "b n v"]:
        """Run the pass, and return a copy of its logits."""
        self._tokens.copy_(tokens)
        self._position.copy_(position)
        self._graph.replay()
        return self._logits.clone()


def _pad_text(
    tokens: Float[Tensor, "b l text_dim"], mask: Bool[Tensor, "b l"]
) -> tuple[Float[Tensor, "b padded text_dim"], Bool[Tensor, "b padded"]]:
    """Pad text to one length, so that prompts of different lengths run the same compiled code."""
    length = _TEXT_LENGTH
    while length < mask.shape[1]:
        length *= 2
    padding = length - mask.shape[1]
    return F.pad(tokens, (0, 0, 0, padding)), F.pad(mask, (0, padding))


def decode_pass(
    model: VideoTransformer,
    tokens: Int[Tensor, "b ring"],
    position: Int[Tensor, " b"],
    text: list[TextKeysValues],
    mask: Bool[Tensor, "b l"] | None,
    gates: list[Float[Tensor, "window heads"]] | list[None],
    caches: list[KVCache],
    positions: int,
    slots: Int[Tensor, " read"],
) -> Float[Tensor, "b {positions} v"]:
    """Compute one pass, which is what is compiled; see `Decoder.logits`.

    Args:
        model: The transformer.
        tokens: Ring buffer of tokens.
        position: First position of each row.
        text: Keys and values of the text for each layer.
        mask: True for text tokens; None where there is no padding.
        gates: Scales of text attention of each layer by frame; the last is that of all later frames.
        caches: Cache of each layer.
        positions: Number of positions.
        slots: The slots of temporal layers to read, from the first.
    """
    grid, window = model.grid_size, model.attention.window
    frame_size, ring = grid * grid, tokens.shape[1]
    at = position[:, None] + torch.arange(positions, device=position.device)
    frame, in_frame = at // frame_size, at % frame_size
    axes = torch.stack([frame, in_frame // grid, in_frame % grid], dim=-1)

    x = model.token_embedding(tokens.gather(1, (at - 1) % ring))
    x = torch.where((at == 0)[..., None], local_tensor(model.start).to(x.dtype), x)
    x = x + _previous_frame(model, tokens, axes)

    cos, sin = rotation_at(axes, model.rope_dims, model.attention.rope_theta)
    rotate = Rotation(stored(cos)[:, None], stored(sin)[:, None])
    blocks = cast("list[Block]", model.blocks)
    sizes = {block.temporal: cache.size for block, cache in zip(blocks, caches, strict=True)}
    used = {
        temporal: _cache_slots(at, frame_size, window if temporal else None, size, slots)
        for temporal, size in sizes.items()
    }
    context = frame.clamp(max=window - 1).flatten()
    for block, keys_values, gate, cache in zip(blocks, text, gates, caches, strict=True):
        scale = None if gate is None else gate[context]
        x = block.step(x, keys_values, mask, scale, rotate, cache, used[block.temporal])
    return model.logits(x)


def _previous_frame(
    model: VideoTransformer, tokens: Int[Tensor, "b ring"], axes: Int[Tensor, "b n 3"]
) -> Float[Tensor, "b n d"]:
    """Return the features of the previous frame around positions, zero in the first frame."""
    grid, (frame, row, column) = model.grid_size, axes[..., None].unbind(2)
    near = torch.arange(9, device=axes.device)
    row, column = row + near // 3 - 1, column + near % 3 - 1
    inside = (frame > 0) & (row >= 0) & (row < grid) & (column >= 0) & (column < grid)
    slots = ((frame - 1) * grid**2 + row * grid + column) % tokens.shape[1]
    return model.previous_frame.at(tokens.gather(1, slots.flatten(1)).view_as(slots), inside)


def _cache_slots(
    at: Int[Tensor, "b n"], frame_size: int, window: int | None, size: int, slots: Int[Tensor, " read"]
) -> CacheSlots:
    """Return the slots of a cache that positions take, and those that they attend to.

    Args:
        at: Successive positions of each row.
        frame_size: Positions of a frame.
        window: Frames that a temporal layer attends to; None for a spatial layer, which reads its whole cache.
        size: Size of the cache.
        slots: The slots of a temporal layer to read.
    """
    if window is None:
        slots = torch.arange(size, device=at.device)
    last = at[:, -1:]
    held = stored(last - (last - slots) % size)  # the position that each slot holds
    query, key = at[:, :, None], held[:, None]
    if window is None:
        near = (at // frame_size)[:, :, None] == stored(held // frame_size)[:, None]
    else:
        near = query - key < window * frame_size
    return CacheSlots(stored(at % size), stored((key >= 0) & (key <= query) & near)[:, None])


_COMPILED: WeakKeyDictionary[VideoTransformer, Callable[..., Any]] = WeakKeyDictionary()
"""`decode_pass`, compiled for each model."""


def _compiled_pass(model: VideoTransformer) -> Callable[..., Any]:
    """Return `decode_pass` compiled for a model, whose modules must not change from then on.

    Guards on modules would be checked in every pass (0.4 ms for ten layers on a CPU) and are left out. Without them a
    model could run the code of another, therefore the code of each model is isolated. They stay where a module ends the
    graph (`ends_graph`), since the graphs of one layer's parts would be used for another layer.
    """
    prepare_compilation(_COMPILED_PASSES)
    if model not in _COMPILED:
        options: dict[str, Any] = {}
        if not any(getattr(module, "ends_graph", False) for module in model.modules()):
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        _COMPILED[model] = torch.compile(  # type: ignore[call-overload]  # the overloads lack isolate_recompiles
            decode_pass, dynamic=False, isolate_recompiles=True, options=options
        )
    return _COMPILED[model]
