"""Memory, FLOPs and time of a run, without building its model or reading its data."""

from t2v.training.planner.report import report

__all__ = ["report"]
