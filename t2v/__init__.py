"""Text-to-video by next-token prediction: a VQ-VAE, and a transformer over its tokens."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2v.generation.text_to_video import TextToVideo as TextToVideo
    from t2v.training.transformer import LitVideoTransformer as LitVideoTransformer
    from t2v.training.vqvae import LitVQVAE as LitVQVAE
    from t2v.transformer.model import VideoTransformer as VideoTransformer
    from t2v.vqvae.model import VQVAE as VQVAE

try:
    __version__ = version("t2v")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

_MODULES = {
    "LitVQVAE": "t2v.training.vqvae",
    "LitVideoTransformer": "t2v.training.transformer",
    "TextToVideo": "t2v.generation.text_to_video",
    "VQVAE": "t2v.vqvae.model",
    "VideoTransformer": "t2v.transformer.model",
}
__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that importing `t2v.batch` in a data worker does not import the models."""
    if name not in _MODULES:
        raise AttributeError(f"module 't2v' has no attribute '{name}'")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("t2v"):
            raise
        raise ImportError(
            f't2v.{name} needs {error.name}, which generation does not: pip install -e ".[train]" in a checkout.'
        ) from error
