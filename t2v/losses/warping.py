"""A term that compares frames along the motion of the original video."""

from jaxtyping import Float
from torch import Tensor

from t2v.batch import Video
from t2v.losses.term import LossTerm
from t2v.video.flow import DISFlow, OpticalFlow, warp


class FlowConsistencyLoss(LossTerm):
    """Temporal consistency along the motion: moving content must change its appearance as in the original.

    The optical flow of the original warps every frame to the next one; the remaining difference is the residual. The
    term is the mean absolute error between the residuals of reconstruction and original over the visible pixels (after
    the warping error of https://arxiv.org/abs/1808.00449). Zero for a perfect reconstruction, for an error that moves
    with the content, and for a clip of one frame.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
        flow: Estimates the motion of the original; by default `t2v.video.flow.DISFlow`.
    """

    name = "flow"

    def __init__(self, weight: float = 1.0, start_step: int = 0, flow: OpticalFlow | None = None) -> None:
        super().__init__(weight, start_step)
        self.flow = flow or DISFlow()

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        if video.shape[1] < 2:
            return reconstruction.new_zeros(())
        flow, visible = self.flow.flow_and_visibility(video)
        error = reconstruction - video  # warping is linear: the residual of the error is the error of the residual
        residual = (error[:, 1:] - warp(error[:, :-1], flow)).abs() * visible
        return residual.sum() / (visible.sum() * video.shape[2]).clamp(min=1)
