"""Metrics of both stages that torchmetrics does not have."""

from t2v.metrics.codebook import CodebookUsage
from t2v.metrics.features import ClipFeatures, MobileNetClipFeatures, VideoNetworkFeatures
from t2v.metrics.frechet import FrechetVideoDistance
from t2v.metrics.metric import MeanVideoMetric, VideoMetric, WeightedMean
from t2v.metrics.perceptual import PerceptualDistance
from t2v.metrics.pixel import PSNR, SSIM
from t2v.metrics.temporal import Flicker, WarpError

__all__ = [
    "PSNR",
    "SSIM",
    "ClipFeatures",
    "CodebookUsage",
    "Flicker",
    "FrechetVideoDistance",
    "MeanVideoMetric",
    "MobileNetClipFeatures",
    "PerceptualDistance",
    "VideoMetric",
    "VideoNetworkFeatures",
    "WarpError",
    "WeightedMean",
]
