"""Training both stages with Lightning: the LightningModules, optimization, precision and sharding."""

from importlib import import_module

_MODULES = {
    "Float8Precision": "t2v.training.float8",
    "LitVQVAE": "t2v.training.vqvae",
    "LitVideoTransformer": "t2v.training.transformer",
    "MuonAdamW": "t2v.training.optimization",
    "ShardedStrategy": "t2v.training.sharding",
    "TokenObjective": "t2v.training.objective",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    """Import the public names on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 't2v.training' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
