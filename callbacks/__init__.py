"""Everything that watches a run or writes what it makes."""

from callbacks.checkpoint import FinalCheckpoint
from callbacks.logging import GenerationLogger, ReconstructionLogger
from callbacks.summary import RunSummary
from callbacks.tokens import TokenShardWriter
from callbacks.videos import VideoGalleryWriter

__all__ = [
    "FinalCheckpoint",
    "GenerationLogger",
    "ReconstructionLogger",
    "RunSummary",
    "TokenShardWriter",
    "VideoGalleryWriter",
]
