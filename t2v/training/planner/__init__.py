"""What a run will take in memory, work and time, told without making its model."""

from t2v.training.planner.report import report

__all__ = ["report"]
