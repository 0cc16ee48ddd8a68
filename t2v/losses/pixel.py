"""Terms that compare pixels."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from t2v.losses.term import LossTerm, Video


class L1Loss(LossTerm):
    """Mean absolute error of the pixels: sharp edges."""

    name = "l1"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        return F.l1_loss(reconstruction, video)


class L2Loss(LossTerm):
    """Mean squared error of the pixels: what PSNR measures."""

    name = "l2"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        return F.mse_loss(reconstruction, video)


class TemporalDifferenceLoss(LossTerm):
    """Temporal consistency: the reconstruction must change from frame to frame as the footage does.

    Mean absolute error of the frame differences; zero for a single picture.
    """

    name = "temporal"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        if video.shape[1] < 2:
            return video.new_zeros(())
        return (reconstruction - video).diff(dim=1).abs().mean()  # the difference of the differences
