"""What every metric of a reconstruction is."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from t2v.checkpoints.pretrained import Protocol

Video = Float[Tensor, "b t c h w"]


class VideoMetric(Metric):
    """A figure over all clips and ranks that compares reconstructions with their footage.

    Attributes:
        name: what it is logged as.
    """

    full_state_update = False
    name: str

    @abstractmethod
    def update(self, reconstruction: Video, video: Video) -> None:
        """Adds clips in [-1, 1]."""

    @abstractmethod
    def compute(self) -> Float[Tensor, ""]:
        """The figure over everything added."""

    def protocol(self) -> Protocol:
        """What must be known to compare the figure with another: networks, files and their hashes."""
        return {}


class MeanVideoMetric(VideoMetric):
    """Base of the metrics that are a mean; zero where nothing was seen."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Float[Tensor, ""]:
        return (self.total / self.count.clamp(min=1)).float()
