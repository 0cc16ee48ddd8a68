"""Distances between two sets of vectors, and how to report them. Everything is computed in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from t2v.checkpoints.pretrained import Protocol

REPORTED = ("network", "sha256", "resize", "frames", "clips", "split", "fps", "seed")
"""What a distance must be reported with: another value of any of them gives another distance."""


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float64[Tensor, ""]:
    """Return the Fréchet distance of the Gaussians with the means and covariances of two sets.

    The covariances are unbiased. The trace of the root of their product is the sum of the singular values of A Bᵀ,
    where A and B are the centred sets; so no product of covariances is formed, which would lose half of the digits.

    Args:
        a: At least two vectors.
        b: At least two vectors.

    Returns:
        The distance, at least 0; NaN if a set has fewer than two vectors or one that is not finite.
    """
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return a.new_tensor(torch.nan, dtype=torch.float64)
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    traces = roots[0].square().sum() + roots[1].square().sum()
    distance: Tensor = difference.square().sum() + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return distance.clamp(min=0)


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float64[Tensor, ""]:
    """Return the unbiased squared MMD of two sets under the kernel (x · y / d + 1)³.

    The distance of https://arxiv.org/abs/1801.01401 over the whole sets. Unlike the Fréchet distance its expectation
    does not depend on the number of vectors, so that it is usable for small sets. It may be below 0.

    Args:
        a: At least two vectors.
        b: At least two vectors.

    Returns:
        The distance; NaN if a set has fewer than two vectors.
    """
    if min(len(a), len(b)) < 2:
        return a.new_tensor(torch.nan, dtype=torch.float64)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    distance: Tensor = mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean()
    return distance


def clips_protocol(clips: int, dimensions: int) -> Protocol:
    """Return the number of clips for a report, with a remark if a Fréchet distance of so few is not reliable.

    Args:
        clips: Number of vectors in the smaller set.
        dimensions: Their width.
    """
    protocol: Protocol = {"clips": clips}
    if clips < 2 * dimensions:
        protocol["remark"] = (
            f"{clips} clips a side are fewer than 2 × {dimensions} dimensions: a Fréchet distance is biased upwards; "
            "compare it only with one of as many clips"
        )
    return protocol


def missing_from_report(protocol: Mapping[str, Any]) -> list[str]:
    """Return what a distance needs to be comparable and its protocol does not say."""
    return [name for name in REPORTED if name not in protocol]
