"""Metrics of both stages that torchmetrics does not have."""

from t2v.metrics.codebook import CodebookUsage
from t2v.metrics.metric import VideoMetric
from t2v.metrics.temporal import Flicker

__all__ = ["CodebookUsage", "Flicker", "VideoMetric"]
