"""Map-style data sets over shards."""

from data.datasets.base import Clips, TokenClip, TokenClips, VideoClip, VideoClips, WholeClips

__all__ = ["Clips", "TokenClip", "TokenClips", "VideoClip", "VideoClips", "WholeClips"]
