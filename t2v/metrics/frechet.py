"""Distances between two sets of clips: Fréchet and kernel."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol
from t2v.metrics.distances import clips_protocol, frechet_distance, kernel_distance
from t2v.metrics.features import ClipFeatures
from t2v.metrics.metric import VideoMetric


class ClipSetDistance(VideoMetric):
    """Base of the distances between the features of originals and reconstructions, over all clips of all ranks.

    Args:
        features: The network that maps a clip to a vector.
        name: Name in logs.
        distance: Computes the distance of two sets of vectors.
    """

    real: Tensor
    fake: Tensor

    def __init__(
        self, features: ClipFeatures, name: str, distance: Callable[[Tensor, Tensor], Float64[Tensor, ""]]
    ) -> None:
        super().__init__()
        self.features, self.name, self._distance = features, name, distance
        for state in ("real", "fake"):  # tensors, since ranks without clips cannot take part in gathering lists
            empty = torch.zeros(0, features.num_features, dtype=torch.float64)
            self.add_state(state, empty, dist_reduce_fx="cat")
        self.clips = 0
        self.warned = False

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        """Gather the vectors of all ranks; torchmetrics would stack them, which needs as many on each rank."""
        for state in ("real", "fake"):
            gathered = dist_sync_fn(getattr(self, state), process_group or self.process_group)
            setattr(self, state, torch.cat(gathered))

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        with torch.no_grad():
            self.real = torch.cat([self.real, self.features(video).double()])
            self.fake = torch.cat([self.fake, self.features(reconstruction).double()])

    def compute(self) -> Float[Tensor, ""]:
        """Return the distance over all clips added, in float64; NaN, with a warning, for fewer than two."""
        self.clips = len(self.real)
        if self.clips < 2 and not self.warned:
            warnings.warn(f"{self.name} needs at least 2 clips but got {self.clips}, so it is NaN.", stacklevel=2)
            self.warned = True
        return self._distance(self.real, self.fake)

    def protocol(self) -> Protocol:
        """Return what a report must state: the network, and the number of clips of the last value."""
        return {**self.features.protocol(), **clips_protocol(self.clips, self.features.num_features)}


class FrechetVideoDistance(ClipSetDistance):
    """Fréchet distance between the features of originals and reconstructions (https://arxiv.org/abs/1812.01717).

    With `I3D` it is the published FVD, logged as `fvd`; with another network its name contains that of the network.
    Values of different networks, or of different numbers of clips, are **not** comparable. It needs at least two clips,
    and many more clips than features to be reliable.

    Args:
        features: The network that maps a clip to a vector.
    """

    def __init__(self, features: ClipFeatures) -> None:
        super().__init__(features, "fvd" if features.name == "i3d" else f"frechet_{features.name}", frechet_distance)


class KernelVideoDistance(ClipSetDistance):
    """Kernel distance (polynomial MMD) between the features of originals and reconstructions, for small sets of clips.

    With `I3D` it is logged as `kvd` (https://arxiv.org/abs/1812.01717), with another network as `kernel_NETWORK`.

    Args:
        features: The network that maps a clip to a vector.
    """

    def __init__(self, features: ClipFeatures) -> None:
        super().__init__(features, "kvd" if features.name == "i3d" else f"kernel_{features.name}", kernel_distance)
