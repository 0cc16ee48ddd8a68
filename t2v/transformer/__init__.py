"""Stage 2: the transformer that predicts a video's tokens from text."""
