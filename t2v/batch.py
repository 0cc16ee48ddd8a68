"""The value types that pass between the data, the models and the callbacks.

Axis letters: b batch, t frames, c channels, h w grid, l text length, d width.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class TextEmbedding(NamedTuple):
    """Captions as a text encoder sees them."""

    tokens: Float[Tensor, "b l d"]
    """One vector a word piece; padding is zero."""
    mask: Bool[Tensor, "b l"]
    """True where `tokens` holds a word piece, False on padding."""
    pooled: Float[Tensor, "b d"]
    """One vector a caption."""


class VideoBatch(NamedTuple):
    """Clips as they leave the loader."""

    video: UInt8[Tensor, "b t c h w"]
    captions: list[list[str]]
    """All captions of each clip."""
    keys: list[str]
    """The sample's key in its shard."""


class TokenBatch(NamedTuple):
    """Tokenised clips with the embeddings of their captions."""

    tokens: Int[Tensor, "b t h w"]
    text: TextEmbedding
    captions: list[str]
    """The one caption of each clip that `text` embeds."""
    keys: list[str]


class PromptBatch(NamedTuple):
    """What to generate."""

    prompts: list[str]
    seeds: list[int]
    """One seed a sample, so that a video does not depend on what else is in its batch."""
    names: list[str]
    """The stem of the file each video is written to."""


class GeneratedVideos(NamedTuple):
    """Clips that are being generated, to be written as they come."""

    frames: Iterator[UInt8[Tensor, "b 1 c h w"]]
    """One frame of all clips after the other; it can be gone through once, and that is when they are made."""
    prompts: list[str]
    names: list[str]
    fps: float
