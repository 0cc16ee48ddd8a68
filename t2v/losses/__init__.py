"""Loss terms of the VQ-VAE, each a module with a weight and a first step, and the token loss of the transformer.

The terms of the VQ-VAE compare a reconstruction with its original, both (b, t, c, height, width) in [-1, 1].
"""

from t2v.losses.adversarial import AdversarialLoss
from t2v.losses.perceptual import LPIPSLoss, MobileNetLoss, PerceptualLoss
from t2v.losses.pixel import L1Loss, L2Loss, TemporalDifferenceLoss
from t2v.losses.term import LossTerm
from t2v.losses.warping import FlowConsistencyLoss

__all__ = [
    "AdversarialLoss",
    "FlowConsistencyLoss",
    "L1Loss",
    "L2Loss",
    "LPIPSLoss",
    "LossTerm",
    "MobileNetLoss",
    "PerceptualLoss",
    "TemporalDifferenceLoss",
]
