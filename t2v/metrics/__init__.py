"""Metrics of both stages that torchmetrics does not have."""

from t2v.metrics.codebook import CodebookUsage
from t2v.metrics.distances import frechet_distance, kernel_distance
from t2v.metrics.features import ClipFeatures, MobileNetClipFeatures, VideoNetworkFeatures
from t2v.metrics.frechet import ClipSetDistance, FrechetVideoDistance, KernelVideoDistance
from t2v.metrics.i3d import I3D
from t2v.metrics.metric import MeanVideoMetric, VideoMetric, WeightedMean
from t2v.metrics.perceptual import PerceptualDistance
from t2v.metrics.pixel import PSNR, SSIM
from t2v.metrics.probe import Accuracy, LinearProbe
from t2v.metrics.temporal import Flicker, WarpError

__all__ = [
    "I3D",
    "PSNR",
    "SSIM",
    "Accuracy",
    "ClipFeatures",
    "ClipSetDistance",
    "CodebookUsage",
    "Flicker",
    "FrechetVideoDistance",
    "KernelVideoDistance",
    "LinearProbe",
    "MeanVideoMetric",
    "MobileNetClipFeatures",
    "PerceptualDistance",
    "VideoMetric",
    "VideoNetworkFeatures",
    "WarpError",
    "WeightedMean",
    "frechet_distance",
    "kernel_distance",
]
