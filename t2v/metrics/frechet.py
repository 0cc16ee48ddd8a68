"""Distance of two sets of clips."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from t2v.checkpoints.pretrained import Protocol
from t2v.metrics.features import ClipFeatures
from t2v.metrics.metric import Video, VideoMetric


class FrechetVideoDistance(VideoMetric, FrechetInceptionDistance):
    """Fréchet distance of the features of footage and reconstructions (https://arxiv.org/abs/1812.01717).

    It is called after the network that sees the clips: figures of different networks, or of different numbers of clips,
    are **not** comparable, and the published FVD is another network's still. It needs two clips to be a number at all,
    and many more than the network has features to be a good one.
    """

    inception: ClipFeatures

    def __init__(self, features: ClipFeatures):
        """
        Args:
            features: sees a clip as one vector.
        """
        FrechetInceptionDistance.__init__(self, features, normalize=True)
        self.name = f"frechet_{features.name}"
        self.orig_dtype = torch.float32  # of a rank that sees no clip
        self.clips = 0
        self.warned = False

    def update(self, reconstruction: Video, video: Video) -> None:  # type: ignore[override]
        with torch.autocast(video.device.type, enabled=False):
            FrechetInceptionDistance.update(self, video, real=True)
            FrechetInceptionDistance.update(self, reconstruction, real=False)

    def compute(self) -> Float[Tensor, ""]:
        """The distance over all clips seen; not a number, with a warning, for fewer than two."""
        self.clips = int(self.real_features_num_samples)
        if self.clips >= 2:
            return FrechetInceptionDistance.compute(self)
        if not self.warned:
            warnings.warn(f"{self.name} needs at least 2 clips and saw {self.clips}: it is not a number.", stacklevel=2)
            self.warned = True
        return self.real_features_sum.new_tensor(torch.nan, dtype=torch.float32)

    def protocol(self) -> Protocol:
        """What a report must declare: the network, and how many clips the last value is of."""
        return {**self.inception.protocol(), "clips": self.clips}
