"""Callbacks: progress, logging, checkpoints, safety of a run, and writers of predictions."""

from callbacks.averaging import EMA
from callbacks.checkpoint import FinalCheckpoint
from callbacks.guard import NaNGuard
from callbacks.logging import GenerationLogger, ReconstructionLogger
from callbacks.progress import ProgressLines
from callbacks.report import MetricsReport
from callbacks.seeding import StepSeed
from callbacks.summary import RunSummary
from callbacks.throughput import Throughput
from callbacks.tokens import TokenShardWriter
from callbacks.videos import VideoGalleryWriter

__all__ = [
    "EMA",
    "FinalCheckpoint",
    "GenerationLogger",
    "MetricsReport",
    "NaNGuard",
    "ProgressLines",
    "ReconstructionLogger",
    "RunSummary",
    "StepSeed",
    "Throughput",
    "TokenShardWriter",
    "VideoGalleryWriter",
]
