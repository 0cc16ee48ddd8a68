"""Sampling, schedules, the decoding loop, and the whole way from text to video."""

from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Cosine, Interval, Linear, Schedule

__all__ = ["Cosine", "Interval", "Linear", "Sampler", "Schedule"]
