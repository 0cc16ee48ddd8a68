"""Base class of the loss terms of the VQ-VAE."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from t2v.batch import Video
from t2v.errors import check_range


class LossTerm(nn.Module, ABC):
    """One term of the loss.

    Args:
        weight: Factor in the sum of the terms, at least 0.
        start_step: First training step that uses the term.

    Raises:
        UserError: If an argument is out of range.

    Attributes:
        name: Name in logs.
    """

    name: str

    def __init__(self, weight: float = 1.0, start_step: int = 0) -> None:
        super().__init__()
        check_range(self, "[0, inf)", weight=weight, start_step=start_step)
        self.weight, self.start_step = weight, start_step

    @abstractmethod
    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        """Compute the term, without its weight."""
