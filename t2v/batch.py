"""Types of the batches that pass between data, models and callbacks, and the check of a token's range.

Axis letters: b batch, t frames, c channels, h w grid, l text length, d width; height and width are in pixels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from t2v.errors import UserError

Video = Float[Tensor, "b t c height width"]
"""RGB frames in [-1, 1], as models, losses and metrics take them."""


class TextEmbedding(NamedTuple):
    """Embeddings of captions or prompts, from a text encoder."""

    tokens: Float[Tensor, "b l d"]
    """One vector for each text token; padding is zero."""
    mask: Bool[Tensor, "b l"]
    """True at a text token, False at padding."""


class VideoBatch(NamedTuple):
    """Clips from a data loader."""

    video: UInt8[Tensor, "b t c height width"]
    captions: list[list[str]]
    """All captions of each clip."""
    keys: list[str]
    """The key of each sample in its shard."""


class TokenBatch(NamedTuple):
    """Tokenized clips with the embeddings of their captions."""

    tokens: Int[Tensor, "b t h w"]
    text: TextEmbedding
    captions: list[str]
    """The caption of each clip that `text` embeds."""
    keys: list[str]


ESCAPED = "$\u2060{"
"""What stands for `${` in the prompts of a config, in which `${` begins the name of another value."""


def unescape(prompt: str) -> str:
    """Return a prompt of a config as the user wrote it."""
    return prompt.replace(ESCAPED, "${")


class PromptBatch(NamedTuple):
    """Prompts to generate videos from."""

    prompts: list[str]
    seeds: list[int]
    """One seed for each sample, so that a video does not depend on the other samples of its batch."""
    names: list[str]
    """File name, without suffix, to which each video is written."""
    starts: list[str | None] | None = None
    """Picture or video that each video begins with, for all or for none; None for the model's setting."""
    negatives: list[str | None] | None = None
    """Negative prompt of each video; None for the model's setting, empty for none."""


class GeneratedVideos(NamedTuple):
    """Videos that are generated while they are read."""

    frames: Iterator[UInt8[Tensor, "b 1 c height width"]]
    """The next frame of all videos at each step. The frames are generated while iterating, which is possible once."""
    length: int
    """Number of frames."""
    prompts: list[str]
    names: list[str]
    fps: float
    speed: Callable[[], dict[str, float]] = dict
    """Returns how fast they are generated, by name."""


def check_token_range(tokens: Int[Tensor, "*shape"], size: int, cause: str) -> None:
    """Check that tokens are indices of a codebook. On a GPU this waits for the tokens to be computed.

    Args:
        tokens: At least one token, of any shape.
        size: Number of codes; valid tokens are 0 to `size` - 1.
        cause: The likely cause and what to change, which ends the error message.

    Raises:
        UserError: If a token is out of range.
    """
    low, high = torch.stack(tokens.aminmax()).tolist()
    if low < 0 or high >= size:
        raise UserError(f"Token {low if low < 0 else high} is outside the codebook (0 to {size - 1}): {cause}")
