"""Model weights on disk: training checkpoints, exported folders, and networks trained by others."""
