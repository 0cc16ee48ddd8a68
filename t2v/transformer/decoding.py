"""Incremental decoding: one token per step, with key and value caches.

- A spatial layer caches the current frame, a temporal layer the last `window` frames, so that time and memory per token
  are constant however long the video is.
- The text is projected once, the previous frame and the gates once per frame.
"""

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.transformer.attention import CacheSlots, KVCache, TextKeysValues
from t2v.transformer.block import Block
from t2v.transformer.layers import local_tensor, prepare_compilation
from t2v.transformer.model import VideoTransformer
from t2v.transformer.rope import Rotation

_SHORTEST_TEXT = 32
"""Text tokens to which shorter prompts are padded in compiled decoding; longer ones to a power of two."""
_COMPILED_STEPS = 1024
"""Number of input shapes for which steps are compiled before they would run uncompiled."""


class Decoder:
    """Decoder of one video per text; `step` returns the logits of one position after the other.

    Args:
        model: The transformer, in eval mode. It is not changed.
        text: Text embeddings of the prompts.
        drop_text: True for videos whose prompt is replaced by "no text".
        compiled: Whether to run the layers by `torch.compile`. It takes a minute or more in the first steps, once per
            model, batch size and (for long prompts) power of two of the number of text tokens.

    Attributes:
        position: Raster position of the next token.
        caches: Cache of each layer.
        text: Keys and values of the text for each layer.
    """

    def __init__(
        self,
        model: VideoTransformer,
        text: TextEmbedding,
        drop_text: Bool[Tensor, " b"] | None = None,
        compiled: bool = False,
    ) -> None:
        tokens, mask, self._pooled = model.project_text(text, drop_text)
        if compiled:
            tokens, mask = _pad_text(tokens, mask)
        self._model, self._compiled = model, compiled
        self._run_layers = _compiled_layers(model) if compiled else run_layers
        self._blocks = cast("list[Block]", model.blocks)
        self._mask = None if not compiled and mask.all() else mask
        self._device = self._pooled.device
        grid = model.grid_size
        self._frame_size = grid * grid
        self._recent = torch.zeros(len(self._pooled), grid, grid, dtype=torch.long, device=self._device)
        self._previous: Float[Tensor, "b n d"] | None = None
        self._slot_numbers = torch.arange(self._frame_size * model.attention.window, device=self._device)
        self.position = 0
        self.text = [block.text_attention.project_text(tokens) for block in self._blocks]
        self.caches = [
            KVCache(self._frame_size * (model.attention.window if block.temporal else 1), like=values)
            for block, (_, values) in zip(self._blocks, self.text, strict=True)
        ]

    def step(self, tokens: Int[Tensor, " b"] | None) -> Float[Tensor, "b v"]:
        """Return the logits of the next token.

        Args:
            tokens: The token before it in each video; None for the first step of a video without start frames.
        """
        model = self._model
        frame, offset = divmod(self.position, self._frame_size)
        if tokens is None:
            x = local_tensor(model.start) + self._pooled
        else:
            self._recent.flatten(1)[:, offset - 1] = tokens
            x = model.token_embedding(tokens) + self._pooled
        if offset == 0:
            self._begin_frame(frame)
        if self._previous is not None:
            x = x + self._previous[:, offset]
        rotate = self._rotation.at(slice(offset, offset + 1))
        spatial = self._slots(offset, self._frame_size)
        temporal = self._slots(self.position, self._frame_size * model.attention.window)
        self.position += 1
        return self._run_layers(
            model, x[:, None], self.text, self._mask, self._gates, rotate, self.caches, spatial, temporal
        )[:, 0]

    def prefill(self, tokens: Int[Tensor, "b t h w"]) -> None:
        """Add start frames, a frame at a time, before the first step; the next `step` takes their last token.

        Args:
            tokens: Tokens of the frames.

        Raises:
            UserError: If a token is out of range, or the grid is not the model's.
        """
        model = self._model
        model.check_tokens(tokens)
        if tokens.shape[2:] != (model.grid_size, model.grid_size):
            raise UserError(
                f"The start frames have {tokens.shape[2]}×{tokens.shape[3]} tokens, but the transformer's grid is "
                f"{model.grid_size}×{model.grid_size}: tokenize them with the VQ-VAE it was trained with, at its size."
            )
        last: Tensor | None = None
        for frame, codes in enumerate(tokens.flatten(2).unbind(1)):
            self._begin_frame(frame)
            first = local_tensor(model.start).expand(len(codes), -1) if last is None else model.token_embedding(last)
            x = torch.cat([first[:, None], model.token_embedding(codes[:, :-1])], dim=1) + self._pooled[:, None]
            if self._previous is not None:
                x = x + self._previous
            for block, cache, text, gate in zip(self._blocks, self.caches, self.text, self._gates, strict=True):
                x = block.extend(x, text, self._mask, gate, self._rotation, cache, self.position)
            last = codes[:, -1]
            self._recent = codes.reshape(self._recent.shape).clone()
            self.position += self._frame_size

    def _begin_frame(self, frame: int) -> None:
        """Compute what all positions of a frame share: rotation, gates, features of the previous frame."""
        model, start = self._model, frame * self._frame_size
        self._rotation: Rotation = model.rotation(start, start + self._frame_size, model.grid_size, model.grid_size)
        self._gates = model.gates(torch.full((1,), frame, device=self._device))
        if frame > 0:
            self._previous = model.previous_frame(self._recent[:, None])[:, 0]

    def _slots(self, position: int, size: int) -> CacheSlots:
        """Return the slot that a position takes in a cache of `size`, and the slots it attends to.

        A compiled step reads 1, 4, 16, … frames with a mask, so that few shapes are compiled.
        """
        write = self._slot_numbers[position % size, None]
        filled = min(position + 1, size)
        if not self._compiled:
            return CacheSlots(write, filled, None)
        read = self._frame_size
        while read < filled:
            read *= 4
        read = min(read, size)
        return CacheSlots(write, read, (torch.arange(read, device=self._device) <= position)[None])


def _pad_text(
    tokens: Float[Tensor, "b l text_dim"], mask: Bool[Tensor, "b l"]
) -> tuple[Float[Tensor, "b padded text_dim"], Bool[Tensor, "b padded"]]:
    """Pad text to a power of two, so that prompts of different lengths run the same compiled code."""
    length = _SHORTEST_TEXT
    while length < mask.shape[1]:
        length *= 2
    padding = length - mask.shape[1]
    return F.pad(tokens, (0, 0, 0, padding)), F.pad(mask, (0, padding))


def run_layers(
    model: VideoTransformer,
    x: Float[Tensor, "b 1 d"],
    text: list[TextKeysValues],
    mask: Bool[Tensor, "b l"] | None,
    gates: list[Float[Tensor, "1 heads"]] | list[None],
    rotate: Rotation,
    caches: list[KVCache],
    spatial: CacheSlots,
    temporal: CacheSlots,
) -> Float[Tensor, "b 1 v"]:
    """Return the logits at one position: all layers and the output projection, which is what a step compiles."""
    blocks = cast("list[Block]", model.blocks)
    for block, keys_values, gate, cache in zip(blocks, text, gates, caches, strict=True):
        slots = temporal if block.temporal else spatial
        x = block.step(x, keys_values, mask, gate, rotate, cache, slots)
    return model.logits(x)


_COMPILED: WeakKeyDictionary[VideoTransformer, Callable[..., Any]] = WeakKeyDictionary()
"""`run_layers`, compiled for each model."""


def _compiled_layers(model: VideoTransformer) -> Callable[..., Any]:
    """Return `run_layers` compiled for a model, whose modules must not change from then on.

    Guards on modules would be checked in every step (0.4 ms for ten layers on a CPU) and are left out. Without them a
    model could run the code of another, therefore the code of each model is isolated.
    """
    prepare_compilation(_COMPILED_STEPS)
    if model not in _COMPILED:
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        _COMPILED[model] = torch.compile(  # type: ignore[call-overload]  # the overloads lack isolate_recompiles
            run_layers, dynamic=False, isolate_recompiles=True, options=options
        )
    return _COMPILED[model]
