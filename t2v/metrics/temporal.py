"""Temporal quality of a reconstruction."""

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol
from t2v.metrics.metric import MeanVideoMetric
from t2v.video.flow import DISFlow, OpticalFlow, warp


class Flicker(MeanVideoMetric):
    """Mean absolute error of the frame differences between reconstruction and original, for pixels in [-1, 1].

    Zero if the reconstruction changes from frame to frame as the original does, even if every frame has the same error.
    """

    name = "flicker"

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        """Add clips; a clip of one frame adds nothing."""
        error = (reconstruction.diff(dim=1) - video.diff(dim=1)).abs()
        self.total += error.sum(dtype=self.total.dtype)
        self.count += error.numel()


class WarpError(MeanVideoMetric):
    """Warping error of Lai et al. (https://arxiv.org/abs/1808.00449): change of appearance along the motion.

    Every frame of the reconstruction is compared with the previous one, warped by the flow of the original: the mean
    squared difference of the visible pixels in [0, 1], averaged over frame pairs. The original itself has an error
    above zero, and a blurred video has a low error, so report a measure of sharpness too.

    Args:
        flow: Estimates the motion of the original; by default `t2v.video.flow.DISFlow`.
    """

    name = "warp_error"

    def __init__(self, flow: OpticalFlow | None = None) -> None:
        super().__init__()
        self.flow = flow or DISFlow()

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        """Add clips; a clip of one frame, or a pair of frames without visible pixels, adds nothing."""
        if video.shape[1] < 2:
            return
        flow, visible = self.flow.flow_and_visibility(video)
        residual = (reconstruction[:, 1:] - warp(reconstruction[:, :-1], flow)) / 2
        errors = (residual.square().mean(2, keepdim=True) * visible).sum((2, 3, 4), dtype=self.total.dtype)
        pixels = visible.sum((2, 3, 4))
        self.total += (errors / pixels.clamp(min=1)).sum()
        self.count += (pixels > 0).sum()

    def protocol(self) -> Protocol:
        return self.flow.protocol()
