"""What every metric of a reconstruction is."""

from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class VideoMetric(Metric):
    """A figure over all clips and ranks that compares reconstructions with their footage.

    Attributes:
        name: what it is logged as.
    """

    full_state_update = False
    name: str

    @abstractmethod
    def update(self, reconstruction: Float[Tensor, "b t c h w"], video: Float[Tensor, "b t c h w"]) -> None:
        """Adds clips in [-1, 1]."""

    @abstractmethod
    def compute(self) -> Float[Tensor, ""]:
        """The figure over everything added."""

    def protocol(self) -> dict[str, Any]:
        """What must be known to compare the figure with another: networks, files and their hashes."""
        return {}
