"""Temporal quality of a reconstruction."""

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.metrics.metric import VideoMetric


class Flicker(VideoMetric):
    """Mean absolute error of the frame differences, reconstruction against footage, in the pixels' own units.

    Zero when the reconstruction moves exactly as the footage does, even if every frame has the same error.
    """

    name = "flicker"
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, reconstruction: Float[Tensor, "b t c h w"], video: Float[Tensor, "b t c h w"]) -> None:
        """Adds clips; a clip of one frame adds nothing."""
        error = (reconstruction.diff(dim=1) - video.diff(dim=1)).abs()
        self.total += error.sum(dtype=torch.float64)
        self.count += error.numel()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all frame pairs seen."""
        return (self.total / self.count.clamp(min=1)).float()
