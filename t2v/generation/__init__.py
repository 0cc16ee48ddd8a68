"""Generation of videos: sampling, schedules, the decoding loop, quantized weights, `TextToVideo`."""

from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Cosine, Interval, Linear, Schedule

__all__ = ["Cosine", "Interval", "Linear", "Sampler", "Schedule"]
