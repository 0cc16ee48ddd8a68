"""Base classes of the metrics of a reconstruction."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol


class VideoMetric(Metric):
    """A value over all clips and ranks that compares reconstructions with their originals.

    Attributes:
        name: Name in logs.
    """

    full_state_update = False
    name: str

    @abstractmethod
    def update(self, reconstruction: Video, video: Video) -> None:
        """Add clips in [-1, 1]."""

    @abstractmethod
    def compute(self) -> Float[Tensor, ""]:
        """Return the value over all clips added."""

    def protocol(self) -> Protocol:
        """Return what a report must state for the value to be comparable: networks, files and their hashes."""
        return {}


class MeanVideoMetric(VideoMetric):
    """Base of the metrics that are a mean; zero if no clip was added."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Float[Tensor, ""]:
        return (self.total / self.count.clamp(min=1)).float()
