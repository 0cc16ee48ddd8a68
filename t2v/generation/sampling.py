"""Sampling of tokens from logits: filters as pure functions, and the class that combines them.

A filter takes logits (b, v) and returns them with excluded tokens at -inf. They are applied in the order temperature,
top-k, top-p, typical, min-p, as in `transformers`. Tests compare them with the logits warpers of `transformers`; these
are not used here so that generation from given text embeddings does not import `transformers`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from t2v.errors import UserError, check_range
from t2v.generation.schedules import Schedule, value_at

Logits = Float[Tensor, "b v"]


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the k most probable tokens (https://arxiv.org/abs/1805.04833)."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the smallest set of tokens with a total probability of at least p (https://arxiv.org/abs/1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    return _keep_mass(logits, order, ordered.softmax(dim=-1), p)


def typical(logits: Logits, mass: float) -> Logits:
    """Keep the tokens with the information content nearest to the entropy (https://arxiv.org/abs/2202.00666).

    Args:
        logits: Logits.
        mass: Total probability of the tokens to keep.
    """
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).nansum(dim=-1, keepdim=True)
    order = (-log_p - entropy).abs().argsort(dim=-1)
    return _keep_mass(logits, order, log_p.exp().gather(-1, order), mass)


def min_p(logits: Logits, p: float) -> Logits:
    """Keep the tokens at least p times as probable as the most probable one (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def _keep_mass(logits: Logits, order: Int[Tensor, "b v"], probabilities: Logits, mass: float) -> Logits:
    """Keep the first tokens of an order, whose probabilities are given in that order, until they sum to `mass`."""
    excluded = probabilities.cumsum(dim=-1) - probabilities >= mass  # the tokens before this one suffice
    return logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)


class Sampler:
    """Draws tokens from logits, with a temperature and filters in any combination.

    Args:
        temperature: Divides the logits, > 0; a small one is nearly greedy. A number, or a schedule over the frames.
        top_k: Number of most probable tokens to keep, at least 1.
        top_p: Total probability of the most probable tokens to keep, in (0, 1].
        typical_p: Total probability of the most typical tokens to keep, in (0, 1].
        min_p: Keep tokens at least this many times as probable as the most probable one, in (0, 1].

    Raises:
        UserError: If a value is out of its range.
    """

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        min_p: float | None = None,
    ) -> None:
        check_range(self, "[1, inf)", top_k=top_k)
        check_range(self, "(0, 1]", top_p=top_p, typical_p=typical_p, min_p=min_p)
        self.temperature = temperature
        self.top_k, self.top_p, self.typical_p, self.min_p = top_k, top_p, typical_p, min_p
        if not isinstance(temperature, Schedule):
            self.temperature_at(0, 1)

    def temperature_at(self, frame: int, frames: int) -> float:
        """Return the temperature at a frame.

        Args:
            frame: Frame number, from 0.
            frames: Length of the whole video.

        Raises:
            UserError: If it is not a finite number greater than 0.
        """
        temperature = value_at(self.temperature, frame, frames)
        if not 0 < temperature < math.inf:
            where = f" at frame {frame} of {frames}" if isinstance(self.temperature, Schedule) else ""
            raise UserError(
                f"temperature={temperature}{where} must be greater than 0 and finite: use a small one such as 0.01 "
                "for greedy."
            )
        return temperature

    def filter(self, logits: Logits, frame: int = 0, frames: int = 1) -> Logits:
        """Return the float32 logits that tokens of a frame are drawn from."""
        logits = logits.float() / self.temperature_at(frame, frames)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:  # with 1, rounding could exclude the last tokens
            logits = top_p(logits, self.top_p)
        if self.typical_p is not None and self.typical_p < 1:
            logits = typical(logits, self.typical_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return logits

    def __call__(
        self, logits: Logits, generators: Sequence[torch.Generator], frame: int = 0, frames: int = 1
    ) -> Int[Tensor, " b"]:
        """Draw one token per row. Each row has its own generator, so that rows do not depend on each other.

        One uniform number per row is looked up in the cumulative distribution, which takes a tenth of the time of
        `torch.multinomial`'s one random number per token.

        Args:
            logits: Logits of the token to draw.
            generators: One per row.
            frame: Frame number of the token, from 0.
            frames: Length of the whole video.
        """
        cumulative = self.filter(logits, frame, frames).softmax(dim=-1).double().cumsum(dim=-1)
        uniform = torch.stack([torch.rand(1, generator=g, device=g.device, dtype=cumulative.dtype) for g in generators])
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=cumulative.shape[1] - 1)  # NaN is beyond the last token
