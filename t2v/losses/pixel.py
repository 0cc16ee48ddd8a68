"""Terms that compare pixels."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from t2v.batch import Video
from t2v.losses.term import LossTerm


class L1Loss(LossTerm):
    """Mean absolute error of the pixels; gives sharper edges than `L2Loss`.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
    """

    name = "l1"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        return F.l1_loss(reconstruction, video)


class L2Loss(LossTerm):
    """Mean squared error of the pixels, which PSNR measures too.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
    """

    name = "l2"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        return F.mse_loss(reconstruction, video)


class TemporalDifferenceLoss(LossTerm):
    """Temporal consistency: mean absolute error of the differences between consecutive frames.

    Zero for a clip of one frame.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
    """

    name = "temporal"

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        if video.shape[1] < 2:
            return video.new_zeros(())
        return (reconstruction - video).diff(dim=1).abs().mean()  # equals the error of the differences
