"""Numbers of fewer bits: training in FP8, weights of 8 or 4 bits for generation."""

from importlib import import_module

_HOMES = {"Float8Precision": "t2v.precision.float8"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Loads the public names when they are asked for: the plugin needs Lightning, generation does not."""
    if name not in _HOMES:
        raise AttributeError(f"module 't2v.precision' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
