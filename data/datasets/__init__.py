"""Map-style data sets over shards."""

from data.datasets.base import Clips
from data.datasets.tokens import TokenClip, TokenClips
from data.datasets.video import VideoClip, VideoClips, WholeClips

__all__ = ["Clips", "TokenClip", "TokenClips", "VideoClip", "VideoClips", "WholeClips"]
