"""The terms of the VQ-VAE's loss: each a small module with a weight and a first step.

All compare a reconstruction with its footage, both (b, t, c, h, w) in [-1, 1].
"""

from t2v.vqvae.losses.adversarial import AdversarialLoss
from t2v.vqvae.losses.flow import FlowConsistencyLoss
from t2v.vqvae.losses.perceptual import LPIPSLoss, MobileNetLoss, PerceptualLoss
from t2v.vqvae.losses.pixel import L1Loss, L2Loss, TemporalDifferenceLoss
from t2v.vqvae.losses.term import LossTerm

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
