"""Fréchet distance between two sets of clips."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol
from t2v.metrics.features import ClipFeatures
from t2v.metrics.metric import VideoMetric


class FrechetVideoDistance(VideoMetric, FrechetInceptionDistance):  # type: ignore[misc]
    """Fréchet distance between the features of originals and reconstructions (https://arxiv.org/abs/1812.01717).

    Its name contains that of the network: values of different networks, or of different numbers of clips, are **not**
    comparable, and the published FVD uses yet another network. It needs at least two clips, and many more clips than
    features to be reliable.

    Args:
        features: The network that maps a clip to a vector.
    """

    inception: ClipFeatures

    def __init__(self, features: ClipFeatures) -> None:
        FrechetInceptionDistance.__init__(self, features, normalize=True)
        self.name = f"frechet_{features.name}"
        self.orig_dtype = torch.float32  # otherwise missing on a rank that gets no clip
        self.clips = 0
        self.warned = False

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        FrechetInceptionDistance.update(self, video, real=True)
        FrechetInceptionDistance.update(self, reconstruction, real=False)

    def compute(self) -> Float[Tensor, ""]:
        """Return the distance over all clips added; NaN, with a warning, for fewer than two."""
        self.clips = int(self.real_features_num_samples)
        if self.clips >= 2:
            return FrechetInceptionDistance.compute(self)
        if not self.warned:
            warnings.warn(f"{self.name} needs at least 2 clips but got {self.clips}, so it is NaN.", stacklevel=2)
            self.warned = True
        return self.real_features_sum.new_tensor(torch.nan, dtype=torch.float32)

    def protocol(self) -> Protocol:
        """Return what a report must state: the network, and the number of clips of the last value."""
        return {**self.inception.protocol(), "clips": self.clips}
