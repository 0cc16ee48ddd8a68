"""Preparing videos and captions, shards, and loading them in batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.modules import TokenDataModule, VideoDataModule

__all__ = ["TokenDataModule", "VideoDataModule"]


def __getattr__(name: str) -> Any:
    """Import the DataModules on first use, since the other tools do not need Lightning."""
    if name in __all__:
        return getattr(import_module("data.modules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
