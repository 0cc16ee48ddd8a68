"""Text-to-video by next-token prediction: a VQ-VAE, and a transformer over its tokens."""

from importlib import import_module

_HOMES = {
    "LitVQVAE": "t2v.training.vqvae",
    "LitVideoTransformer": "t2v.training.transformer",
    "TextToVideo": "t2v.generation.text_to_video",
    "VQVAE": "t2v.vqvae.model",
    "VideoTransformer": "t2v.transformer.model",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Loads the public names when they are asked for, so that a data worker does not pay for the models."""
    if name not in _HOMES:
        raise AttributeError(f"module 't2v' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
