"""Sampling: pure functions on logits, and the one class that combines them.

Each filter takes logits (b, v) and returns them with what must not be drawn at -inf. They are applied in the order
temperature, top-k, top-p, typical, min-p, as in `transformers`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from t2v.errors import UserError
from t2v.generation.schedules import Schedule, value_at

Logits = Float[Tensor, "b v"]


def top_k(logits: Logits, k: int) -> Logits:
    """Keeps the k most probable tokens (https://arxiv.org/abs/1805.04833)."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Keeps the smallest set of most probable tokens whose probabilities sum to p (https://arxiv.org/abs/1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= p  # all that is needed stands before this token
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def typical(logits: Logits, mass: float) -> Logits:
    """Keeps the tokens whose surprise is nearest to the entropy, up to a mass (https://arxiv.org/abs/2202.00666)."""
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).nansum(dim=-1, keepdim=True)
    order = (-log_p - entropy).abs().argsort(dim=-1)
    probabilities = log_p.exp().gather(-1, order)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= mass
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def min_p(logits: Logits, p: float) -> Logits:
    """Keeps the tokens at least p times as probable as the most probable one (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


class Sampler:
    """Draws tokens from logits: temperature and filters in any combination."""

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        min_p: float | None = None,
    ):
        """
        Args:
            temperature: logits are divided by it, > 0; small is greedy. A schedule changes it from frame to frame.
            top_k: keep this many tokens, at least 1.
            top_p: keep the most probable tokens up to this mass, in (0, 1].
            typical_p: keep the most typical tokens up to this mass, in (0, 1].
            min_p: keep tokens at least this many times as probable as the most probable, in (0, 1].
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k} must be at least 1, or null for no limit.")
        for name, share in (("top_p", top_p), ("typical_p", typical_p), ("min_p", min_p)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name}={share} must lie in (0, 1], or be null for no limit.")
        self.temperature = temperature
        self.top_k, self.top_p, self.typical_p, self.min_p = top_k, top_p, typical_p, min_p
        if not isinstance(temperature, Schedule):
            self.temperature_at(0, 1)

    def temperature_at(self, frame: int, frames: int) -> float:
        """The temperature at a frame.

        Args:
            frame: counted from 0.
            frames: length of the whole video.

        Raises:
            UserError: if it is not a number greater than 0.
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
        """The logits that tokens of a frame are drawn from."""
        logits = logits.float() / self.temperature_at(frame, frames)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:  # all of the mass may round to less
            logits = top_p(logits, self.top_p)
        if self.typical_p is not None and self.typical_p < 1:
            logits = typical(logits, self.typical_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return logits

    def __call__(
        self, logits: Logits, generators: Sequence[torch.Generator], frame: int = 0, frames: int = 1
    ) -> Int[Tensor, " b"]:
        """Draws one token a row, each row with its own generator, so that rows do not depend on each other.

        One uniform number a row is looked up in the row's distribution function, which takes a tenth of the time that
        a random number a token does.

        Args:
            logits: of the token to draw.
            generators: one a row.
            frame: the frame that the token belongs to, counted from 0.
            frames: length of the whole video.
        """
        mass = self.filter(logits, frame, frames).softmax(dim=-1).double().cumsum(dim=-1)
        uniform = torch.stack([torch.rand(1, generator=g, device=g.device, dtype=mass.dtype) for g in generators])
        return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0]
