"""Temporal quality of a reconstruction."""

from t2v.checkpoints.pretrained import Protocol
from t2v.metrics.metric import MeanVideoMetric, Video
from t2v.video.flow import DISFlow, OpticalFlow, warp


class Flicker(MeanVideoMetric):
    """Mean absolute error of the frame differences, reconstruction against footage, in the pixels' own units.

    Zero when the reconstruction moves exactly as the footage does, even if every frame has the same error.
    """

    name = "flicker"

    def update(self, reconstruction: Video, video: Video) -> None:
        """Adds clips; a clip of one frame adds nothing."""
        error = (reconstruction.diff(dim=1) - video.diff(dim=1)).abs()
        self.total += error.sum(dtype=self.total.dtype)
        self.count += error.numel()


class WarpError(MeanVideoMetric):
    """Warping error of Lai et al. (https://arxiv.org/abs/1808.00449): how much looks change along the motion.

    Every frame of the reconstruction is compared with the frame before it, warped by the footage's flow: the mean
    squared difference of pixels in [0, 1] where the flow can be relied on, then the mean over frame pairs. The footage
    itself has an error above zero, and a blur has a low one, so that it is read beside a measure of sharpness.
    """

    name = "warp_error"

    def __init__(self, flow: OpticalFlow | None = None):
        """
        Args:
            flow: estimates the motion of the footage; `t2v.video.flow.DISFlow` by default.
        """
        super().__init__()
        self.flow = flow or DISFlow()

    def update(self, reconstruction: Video, video: Video) -> None:
        """Adds clips; a clip of one frame, or a pair without a pixel to follow, adds nothing."""
        if video.shape[1] < 2:
            return
        flow, visible = self.flow.follow(video)
        residual = (reconstruction[:, 1:] - warp(reconstruction[:, :-1], flow)) / 2
        errors = (residual.square().mean(2, keepdim=True) * visible).sum((2, 3, 4), dtype=self.total.dtype)
        pixels = visible.sum((2, 3, 4))
        self.total += (errors / pixels.clamp(min=1)).sum()
        self.count += (pixels > 0).sum()

    def protocol(self) -> Protocol:
        return self.flow.protocol()
