"""Perceptual distance of a reconstruction."""

import torch

from t2v.checkpoints.pretrained import Protocol
from t2v.losses.perceptual import CHUNK, PerceptualLoss
from t2v.metrics.metric import MeanVideoMetric, Video


class PerceptualDistance(MeanVideoMetric):
    """Mean distance of all frames by a term of the loss, under the term's own name and in full precision."""

    def __init__(self, term: PerceptualLoss):
        """
        Args:
            term: measures the distance; its weight, first step and choice of frames play no part.
        """
        super().__init__()
        self.term, self.name = term, term.name

    def update(self, reconstruction: Video, video: Video) -> None:
        x, y = reconstruction.flatten(0, 1), video.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            for few_x, few_y in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                self.total += self.term.distance(few_x.float(), few_y.float()) * len(few_x)
        self.count += len(x)

    def protocol(self) -> Protocol:
        return self.term.protocol()
