"""Everything of Lightning's private API that this project uses; `tests/test_private_api.py` fails if it changes.

Two uses are elsewhere, and the same test covers them: `cli.T2VCLI` overrides `LightningCLI._parse_ckpt_path`, and
`data.modules.resuming`, which may not import this package, changes the progress of the training loop.
"""

from jsonargparse import ArgumentParser
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

FETCH_ACTION = "[_TrainingEpochLoop].train_dataloader_next"
"""The name under which Lightning profiles the wait for the next training batch."""


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a module is attached to, or None; `module.trainer` raises an error then."""
    return module._trainer


def clear_device_mesh(module: LightningModule) -> None:
    """Remove a module's device mesh, so that `configure_model` does not shard the model."""
    module._device_mesh = None


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the data-parallel size, which Lightning takes as a constant before the world size is known."""
    strategy._data_parallel_size = size


def saves_sharded_checkpoints(strategy: ModelParallelStrategy) -> bool:
    """Return whether Lightning's own strategy writes checkpoints as folders."""
    return strategy._save_distributed_checkpoint


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Return the cluster environment, for one device too; strategies of one device have none."""
    return trainer._accelerator_connector.cluster_environment


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """Return the moving average that a callback keeps, or None before it has begun."""
    return callback._average_model


def start_average(callback: WeightAveraging, network: nn.Module) -> None:
    """Begin the moving average of `network`, in place of Lightning's copy of the LightningModule."""
    callback._average_model = AveragedModel(network, use_buffers=False, **callback._kwargs)


def skip_average_update(callback: WeightAveraging, step: int) -> None:
    """Let the moving average leave out the optimizer step that ends at `step`."""
    callback._latest_update_step = step


def command_parser(cli: LightningCLI, command: str) -> ArgumentParser:
    """Return the parser of a subcommand."""
    return cli._subcommand_parsers[command]


def checkpoint_intervals(callback: ModelCheckpoint) -> tuple[int, int, float | None]:
    """Return when a callback saves: every so many steps, epochs or seconds; 0 and None stand for never."""
    interval = callback._train_time_interval
    seconds = None if interval is None else interval.total_seconds()
    return callback._every_n_train_steps, callback._every_n_epochs, seconds
