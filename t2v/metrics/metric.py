"""Base classes of the metrics, and a mean of numbers."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from t2v.autocast import without_autocast
from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol


class ExactMetric(Metric):
    """Base of the metrics whose sums stay in float32 or wider whatever the precision of the run."""

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "ExactMetric":
        """Move the state and the networks to another device, but keep their types under `bf16-true`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        return super()._apply(move, exclude_state)  # type: ignore[return-value]


class WeightedMean(ExactMetric):
    """Weighted mean of numbers over all batches and ranks, summed in float64."""

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Float[Tensor, ""], weight: int) -> None:
        """Add a number that counts `weight` times."""
        self.total += value.double() * weight
        self.weight += weight

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean in float32."""
        return (self.total / self.weight).float()


class VideoMetric(ExactMetric):
    """A value over all clips and ranks that compares reconstructions with their originals.

    Attributes:
        name: Name in logs.
    """

    name: str

    def update(self, reconstruction: Video, video: Video) -> None:
        """Add clips in [-1, 1] of any floating-point type; all metrics are computed in float32, without autocast."""
        with without_autocast(video), _default_float32():
            self.accumulate(reconstruction.float(), video.float())

    @abstractmethod
    def accumulate(self, reconstruction: Video, video: Video) -> None:
        """Add float32 clips in [-1, 1]."""

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


@contextmanager
def _default_float32() -> Iterator[None]:
    """Create new tensors in float32; Lightning's bf16-true makes bfloat16 the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
