"""Perceptual distance of a reconstruction."""

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol
from t2v.losses.perceptual import CHUNK, PerceptualLoss
from t2v.metrics.metric import MeanVideoMetric


class PerceptualDistance(MeanVideoMetric):
    """Mean perceptual distance over all frames, in float32, with the name of the loss term that computes it.

    Args:
        term: Computes the distance; its weight, first step and number of frames are not used.
    """

    def __init__(self, term: PerceptualLoss) -> None:
        super().__init__()
        self.term, self.name = term, term.name

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        x, y = reconstruction.flatten(0, 1), video.flatten(0, 1)
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            self.total += self.term.distance(x_chunk, y_chunk) * len(x_chunk)
        self.count += len(x)

    def protocol(self) -> Protocol:
        return self.term.protocol()
