"""Base class of the loss terms of the VQ-VAE."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from t2v.batch import Video


class LossTerm(nn.Module, ABC):
    """One term of the loss.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.

    Attributes:
        name: Name in logs.
    """

    name: str

    def __init__(self, weight: float = 1.0, start_step: int = 0) -> None:
        super().__init__()
        self.weight, self.start_step = weight, start_step

    @abstractmethod
    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        """Compute the term, without its weight."""
