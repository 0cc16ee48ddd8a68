"""The LightningDataModules: clips of videos for stage 1, token clips and prompts for stage 2."""

from data.modules.base import ShardDataModule
from data.modules.tokens import TokenDataModule
from data.modules.video import VideoDataModule

__all__ = ["ShardDataModule", "TokenDataModule", "VideoDataModule"]
