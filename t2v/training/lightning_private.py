"""Everything of Lightning's private API that this project uses; `tests/test_private_api.py` fails if it changes."""

from lightning.pytorch import LightningModule, Trainer


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a module is attached to, or None; `module.trainer` raises an error then."""
    return module._trainer


def clear_device_mesh(module: LightningModule) -> None:
    """Remove a module's device mesh, so that `configure_model` does not shard the model."""
    module._device_mesh = None
