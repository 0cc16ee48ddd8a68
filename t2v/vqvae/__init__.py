"""Stage 1: the VQ-VAE that turns frames into tokens."""

from t2v.vqvae.lightning import LitVQVAE
from t2v.vqvae.model import VQVAE

__all__ = ["VQVAE", "LitVQVAE"]
