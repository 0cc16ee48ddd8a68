"""Callbacks: progress, logging, checkpoints, safety of a run, and writers of predictions."""

from callbacks.accumulation import AccumulationScale
from callbacks.averaging import EMA
from callbacks.checkpoint import LastCheckpoint
from callbacks.evaluation import GenerationEvaluation
from callbacks.guard import NaNGuard
from callbacks.lock import RunLock
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
    "AccumulationScale",
    "GenerationEvaluation",
    "GenerationLogger",
    "LastCheckpoint",
    "MetricsReport",
    "NaNGuard",
    "ProgressLines",
    "ReconstructionLogger",
    "RunLock",
    "RunSummary",
    "StepSeed",
    "Throughput",
    "TokenShardWriter",
    "VideoGalleryWriter",
]
