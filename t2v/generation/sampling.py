"""Sampling of tokens from logits: filters as pure functions, and the class that combines them.

A filter takes logits (b, v) and returns them with excluded tokens at -inf. They are applied in the order temperature,
top-k, top-p, typical, min-p, as in `transformers`. Tests compare them with the logits warpers of `transformers`; these
are not used here so that generation from given text embeddings does not import `transformers`.
"""

import hashlib
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
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
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
        """Return the logits that tokens of a frame are drawn from, in float32 or wider."""
        return self.exclude(wide(logits) / self.temperature_at(frame, frames))

    def exclude(self, logits: Logits) -> Logits:
        """Return logits, divided by the temperature already, with those of excluded tokens at -inf."""
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
        self, logits: Logits, noise: Logits, temperature: float | Float[Tensor, "b 1"] = 1.0
    ) -> Int[Tensor, " b"]:
        """Draw one token per row: that with the largest sum of logit and noise.

        With Gumbel noise these are draws from the softmax of the logits (https://arxiv.org/abs/1411.0030). The same
        noise gives the same token for logits that differ little.

        Args:
            logits: Logits of the tokens to draw.
            noise: Of `GumbelNoise`.
            temperature: Of each row, or of all.
        """
        logits = wide(logits) / temperature
        p, others = self.top_p or 1.0, (self.top_k, self.typical_p, self.min_p)
        if p < 1 and others == (None, None, None) and logits.is_cpu and not torch.compiler.is_compiling():
            return _draw_with_top_p(logits, noise, p)
        return (self.exclude(logits) + noise).argmax(dim=-1)  # an index in range, for NaN too


def _draw_with_top_p(logits: Logits, noise: Logits, p: float) -> Int[Tensor, " b"]:
    """Draw tokens, and sort only the rows in which top-p excludes that of the largest sum: sorting takes longest."""
    tokens = (logits + noise).argmax(dim=-1)
    more_probable = logits > logits.gather(-1, tokens[:, None])
    excluded = logits.softmax(dim=-1).where(more_probable, 0).sum(dim=-1) >= p
    if excluded.any():
        tokens[excluded] = (top_p(logits[excluded], p) + noise[excluded]).argmax(dim=-1)
    return tokens


class GumbelNoise:
    """Gumbel noise for the tokens of a video, a function of its seed and the position only.

    Kept for the frames that a decoding pass may reach, in constant memory.

    Args:
        seeds: One for each video; any integers.
        frame_size: Number of positions of a frame.
        vocab_size: Tokens to draw from.
        positions: Number of successive positions that `at` is asked for.
        device: Device of the noise. The noise depends on the kind of device.
    """

    def __init__(
        self, seeds: Sequence[int], frame_size: int, vocab_size: int, positions: int, device: torch.device
    ) -> None:
        self._frame_size, self._seeds = frame_size, list(seeds)
        self._frames = 1 + -(-(positions - 1) // frame_size)
        self._next = [0] * len(seeds)
        self._generator = torch.Generator(device)
        shape = len(seeds), self._frames, frame_size, vocab_size
        self._noise = torch.zeros(shape, dtype=torch.float32, device=device)

    def reach(self, row: int, first: int, stop: int) -> None:
        """Draw the noise of frames of a video that it was not drawn for yet; no pass asks for earlier ones again.

        Args:
            row: Number of the video.
            first: First frame that the next pass needs.
            stop: The frame after the last one.
        """
        for frame in range(max(first, self._next[row]), stop):
            key = hashlib.blake2b(f"{self._seeds[row]} {frame}".encode(), digest_size=8)
            self._generator.manual_seed(int.from_bytes(key.digest(), "little"))
            noise = self._noise[row, frame % self._frames]
            uniform = torch.rand(noise.shape, dtype=torch.float64, generator=self._generator, device=noise.device)
            noise.copy_(uniform.log_().neg_().log_().neg_())
        self._next[row] = max(stop, self._next[row])

    def at(self, positions: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Return the noise at raster positions of each video."""
        noise = self._noise.flatten(1, 2)
        first = noise.shape[1] * torch.arange(len(noise), device=noise.device)[:, None]
        rows = first + positions % noise.shape[1]
        selected = noise.flatten(0, 1).index_select(0, rows.flatten())
        return selected.view(*positions.shape, -1)

    def select(self, rows: Sequence[int], index: Int[Tensor, " rows"]) -> None:
        """Keep some videos, whose numbers are given on the host and on the device."""
        self._noise = self._noise[index]
        self._seeds, self._next = ([each[row] for row in rows] for each in (self._seeds, self._next))


def wide(logits: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch v"]:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
