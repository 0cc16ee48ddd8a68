"""A term that compares frames along the motion of the footage."""

from jaxtyping import Float
from torch import Tensor

from t2v.losses.term import LossTerm, Video
from t2v.video.flow import DISFlow, OpticalFlow, warp


class FlowConsistencyLoss(LossTerm):
    """Temporal consistency along the motion: what moves must keep its looks as it does in the footage.

    The optical flow of the footage takes every frame to the next one; what then differs is the residual. The term is
    the mean absolute error of the reconstruction's residual against the footage's, where a pixel can be followed (after
    the warping error of https://arxiv.org/abs/1808.00449). Zero for a perfect reconstruction, for an error that moves
    with the picture, and for a single picture.
    """

    name = "flow"

    def __init__(self, weight: float = 1.0, start_step: int = 0, flow: OpticalFlow | None = None):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            flow: estimates the motion of the footage; `t2v.video.flow.DISFlow` by default.
        """
        super().__init__(weight, start_step)
        self.flow = flow or DISFlow()

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        if video.shape[1] < 2:
            return reconstruction.new_zeros(())
        flow, visible = self.flow.follow(video)
        error = reconstruction - video  # warping is linear: the residual of the error is the error of the residual
        residual = (error[:, 1:] - warp(error[:, :-1], flow)).abs() * visible
        return residual.sum() / (visible.sum() * video.shape[2]).clamp(min=1)
