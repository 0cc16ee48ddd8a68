"""Stage 1: the VQ-VAE that turns frames into tokens."""
