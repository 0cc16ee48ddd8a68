"""Stage 2: the transformer that predicts a video's tokens from text."""

from t2v.transformer.lightning import LitVideoTransformer
from t2v.transformer.model import VideoTransformer

__all__ = ["LitVideoTransformer", "VideoTransformer"]
