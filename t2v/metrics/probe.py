"""A linear map from features of clips to the attributes that their captions name, and the accuracy of attributes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from t2v.errors import UserError

_PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))
"""Ridge penalties to choose from, relative to the mean square of the features' singular values."""

Attributes = dict[str, str]
"""The value of each attribute of a clip by its name."""


class Accuracy(NamedTuple):
    """A fraction of correct answers with its interval of 95 % confidence (Wilson)."""

    correct: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: Sequence[bool]) -> "Accuracy":
        """Count correct answers; NaN without any answers."""
        n, z = len(correct), 1.959964
        if n == 0:
            return cls(0, 0, math.nan, math.nan, math.nan)
        p = sum(correct) / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return cls(sum(correct), n, p, max(0.0, centre - half), min(1.0, centre + half))


class LinearProbe:
    """Names the attributes of clips from frozen features: the text–video score of a generated clip.

    One linear map per attribute, by ridge regression to the one-hot attribute in float64; the penalty with the
    smallest leave-one-out error is chosen. Fit it on real training clips, and print its accuracy on real held-out clips
    beside any other: that is its ceiling.

    Args:
        features: One vector for each clip.
        attributes: The attributes of each clip; all have the same names.

    Raises:
        UserError: If there are fewer than two clips, or the clips have different attributes.
    """

    def __init__(self, features: Float[Tensor, "n d"], attributes: Sequence[Attributes]) -> None:
        if len(attributes) < 2 or len({tuple(sorted(each)) for each in attributes}) != 1:
            raise UserError(
                f"The linear map to attributes needs at least 2 clips with the same attributes, but got "
                f"{len(attributes)}: give more clips, all with the columns of their attributes."
            )
        x = features.double()
        self._mean, self._scale = x.mean(0), x.std(0).clamp(min=1e-8)
        u, s, vh = torch.linalg.svd((x - self._mean) / self._scale, full_matrices=False)
        self._maps: dict[str, tuple[list[str], Tensor, Tensor]] = {}
        for name in attributes[0]:
            values = sorted({each[name] for each in attributes})
            targets = torch.tensor([[each[name] == value for value in values] for each in attributes]).to(x)
            offset = targets.mean(0)
            weight = vh.T @ _ridge(u, s, targets - offset)
            self._maps[name] = values, weight, offset

    def predict(self, features: Float[Tensor, "n d"]) -> list[Attributes]:
        """Return the most likely value of each attribute of each clip."""
        x = (features.double() - self._mean) / self._scale
        chosen = {name: (x @ weight + offset).argmax(1) for name, (_, weight, offset) in self._maps.items()}
        return [{name: self._maps[name][0][int(chosen[name][i])] for name in self._maps} for i in range(len(x))]

    def accuracy(self, features: Float[Tensor, "n d"], attributes: Sequence[Attributes]) -> dict[str, Accuracy]:
        """Return the accuracy of each attribute, and of all of them together as `all`."""
        return accuracies(self.predict(features), attributes)


def accuracies(answers: Sequence[Attributes], truths: Sequence[Attributes]) -> dict[str, Accuracy]:
    """Return the accuracy of each attribute, and of all of them together as `all`.

    Args:
        answers: What was recognized in each clip.
        truths: What each clip should show; only the attributes that it names are counted.
    """
    names = list(truths[0]) if truths else []
    correct = [{name: a.get(name) == t[name] for name in names} for a, t in zip(answers, truths, strict=True)]
    counted = {name: Accuracy.of([each[name] for each in correct]) for name in names}
    return {**counted, "all": Accuracy.of([all(each.values()) for each in correct])}


def _ridge(
    u: Float64[Tensor, "n r"], s: Float64[Tensor, " r"], targets: Float64[Tensor, "n k"]
) -> Float64[Tensor, "r k"]:
    """Return the ridge solution in the basis of the right singular vectors, at the best penalty by leave-one-out.

    The features and the targets have the mean 0, so that the offset, which is fitted too, has the leverage 1 / n.
    """
    projected, best = u.T @ targets, (math.inf, torch.zeros_like(s))
    for relative in _PENALTIES:
        shrink = s**2 / (s**2 + relative * s.square().mean())
        leverage = ((u.square() * shrink).sum(1, keepdim=True) + 1 / len(u)).clamp(max=1 - 1e-9)
        error = ((targets - u @ (shrink[:, None] * projected)) / (1 - leverage)).square().sum().item()
        if error < best[0]:
            best = error, shrink
    return best[1][:, None] * projected / s.clamp(min=1e-12)[:, None]
