"""Classifier-free guidance (https://arxiv.org/abs/2207.12598): the branches with and without text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError

_UNGUIDED = 0.25
"""Share of the frames, without guidance, for which a pass with one branch is compiled too."""


def check_negative(scales: Sequence[float]) -> None:
    """Check that a negative prompt has an effect.

    Args:
        scales: Guidance scale of each generated frame.

    Raises:
        UserError: If there is no guidance.
    """
    if all(scale == 1.0 for scale in scales):
        raise UserError(
            "The negative prompt has no effect with guidance=1 in all generated frames: raise guidance to 2 to 8, or "
            "leave it out."
        )


def frames_of_both_branches(guidance: Sequence[float], first: int, compiled: bool) -> range:
    """Return the frames that passes compute in both branches, with and without text: from the first guided to the last.

    Each number of branches is compiled, so compiled passes have both at the beginning or the end too if it is short.

    Args:
        guidance: Guidance scale of each frame.
        first: The first frame to generate.
        compiled: Whether passes are compiled.
    """
    frames = len(guidance)
    guided = [frame for frame in range(first, frames) if guidance[frame] != 1.0]
    if not guided:
        return range(frames, frames)
    start, stop, fewest = guided[0], guided[-1] + 1, _UNGUIDED * (frames - first) if compiled else 0
    return range(start if start - first >= fewest else first, stop if frames - stop >= fewest else frames)


def with_negative(text: TextEmbedding, negative: TextEmbedding | None) -> tuple[TextEmbedding, Bool[Tensor, " rows"]]:
    """Return the texts of both branches of guidance, and which of them are replaced by "no text"."""
    batch = len(text.mask)
    if negative is None:
        both = TextEmbedding(*(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in text))
        return both, torch.arange(2 * batch, device=text.mask.device) >= batch
    length = max(text.mask.shape[1], negative.mask.shape[1])
    padded = [
        (F.pad(each.tokens, (0, 0, 0, length - each.mask.shape[1])), F.pad(each.mask, (0, length - each.mask.shape[1])))
        for each in (text, negative)
    ]
    tokens, mask = (torch.cat(parts) for parts in zip(*padded, strict=True))
    drop = torch.cat([torch.zeros_like(negative.mask[:, 0]), ~negative.mask.any(1)])
    return TextEmbedding(tokens, mask), drop
