"""The LightningDataModules: clips of footage for stage 1, token clips and prompts for stage 2."""

from data.modules.base import ShardDataModule, TokenDataModule, VideoDataModule

__all__ = ["ShardDataModule", "TokenDataModule", "VideoDataModule"]
