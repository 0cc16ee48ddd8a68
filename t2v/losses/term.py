"""What every term of the VQ-VAE's loss is."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

Video = Float[Tensor, "b t c h w"]


class LossTerm(nn.Module, ABC):
    """One term of the loss.

    Attributes:
        name: what it is logged as.
        weight: its factor in the sum.
        start_step: the first training step it counts in.
    """

    name: str

    def __init__(self, weight: float = 1.0, start_step: int = 0):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
        """
        super().__init__()
        self.weight, self.start_step = weight, start_step

    @abstractmethod
    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        """The term, unweighted."""
