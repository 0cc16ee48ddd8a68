"""Model weights on disk: training checkpoints, exported folders, and weights of pretrained networks."""
