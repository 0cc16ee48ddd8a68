"""Command line of both stages: ``python cli.py {fit,validate,test,predict,plan} -c CONFIG``.

- Flags are the arguments of the classes: ``--help``, ``--model.help CLASS`` and ``--print_config`` show them.
- ``${...}`` in a config is resolved after all files and flags are read, so that a flag also changes what refers to it.
- ``--ckpt_path`` makes the hyper-parameters of the checkpoint the defaults of the model: config files and flags
  override them.
- ``--model.losses.0.weight 2`` sets an argument of an item of a list.
- ``--import MODULE`` imports a module with classes of your own, which checkpoints name.
- ``--ckpt_path last`` is ``last.ckpt`` in the run's checkpoint folder, single-file or sharded; if it is damaged, the
  newest complete checkpoint. ``best`` is the one with the best value of the metric that its `ModelCheckpoint` monitors.
- An expected error is reported in one ``error:`` line, with exit status 2. SIGTERM and SIGUSR1 stop ``fit`` with
  status 75, Ctrl-C with 130; other commands stop at once, with 143 or 130.
"""

import gc
import signal
import sys

from t2v.training.startup import answer, defer_torchmetrics, keep_freed_memory

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
    answer(sys.argv[1:])
    keep_freed_memory()
    gc.disable()  # what is imported stays, and a thousand collections would walk through it
defer_torchmetrics()  # before the imports below, which take seconds

import argparse
import json
import logging
import os
import shlex
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from callbacks.accumulation import AccumulationScale
from callbacks.checkpoint import LastCheckpoint
from callbacks.config import SaveConfig
from callbacks.early_stopping import ResumedEarlyStopping
from callbacks.guard import NaNGuard
from callbacks.lock import RunLock
from callbacks.logging import GenerationLogger
from callbacks.progress import ProgressLines
from callbacks.seeding import StepSeed
from callbacks.signals import StopOnSignal, Stopped, stopping_at_once
from callbacks.summary import RunSummary, ended_by_time
from t2v.checkpoints.config import import_modules
from t2v.checkpoints.lookup import best_checkpoint, is_local, newest_last, read_model_config
from t2v.checkpoints.pretrained import without_weights
from t2v.errors import UserError, exit_on_expected_error, shorten_tracebacks
from t2v.files import is_writable
from t2v.training.arguments import check_nulls, check_same_classes, check_trainer_arguments
from t2v.training.lightning_private import command_parser, saves_sharded_checkpoints
from t2v.training.list_items import set_items, split_items
from t2v.training.recipe import RecipeFile, escape_arguments
from t2v.training.sharding import FolderCheckpointIO, ShardedStrategy

IGNORED_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # run folders are fixed
    "The dirpath has changed from",  # a checkpoint of another folder; only its best scores are not taken over
    "You.re using the WeightAveraging callback with a model that overrides the configure_model",
    "Couldn't infer the batch indices",  # the writers take names from the batch
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # called by Lightning
    r"It is recommended to use `self.log\('val/",  # torchmetrics reduces over the ranks
    "FSDP2-wrapped module .* returned a view tensor",  # the loss changes it in place without autograd
)
"""Warnings about which a user need not do anything."""
IGNORED_VARIABLES = tuple(f"PL_{command.upper()}__" for command in ("fit", "validate", "test", "predict", "plan"))
"""Beginnings of the names of variables that other programs with a LightningCLI read."""

_PRINT = "--print_config"


class PlanningTrainer(Trainer):
    """Lightning's `Trainer` with the command ``plan``."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        memory: float = 80.0,
        tflops: float | None = None,
    ) -> None:
        """Print the memory and time that a run needs, without allocating its model or reading its data.

        Args:
            model: The configured model, on the meta device.
            datamodule: The configured data, which is not opened.
            memory: Memory of one device in GB.
            tflops: TFLOP/s that one device achieves; without it no times are printed.
        """
        from t2v.training.planner import report

        print(report(model, datamodule, trainer=self, memory=memory, tflops=tflops))


class T2VCLI(LightningCLI):
    """LightningCLI with fixed run folders, and checkpoints that contain the config of their model.

    Args:
        args: Command line as a list, or a config such as ``{"fit": {...}}``; ``sys.argv`` by default.
    """

    def __init__(self, args: ArgsType = None) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        commands = self.subcommands()
        if (command := next(iter(_to_list(args)), "")) in commands:  # the parser of each takes a fifth of a second
            self.subcommands = partial(dict, {command: commands[command]})  # type: ignore[method-assign]
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=PlanningTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},  # a resumed run rewrites its own config.yaml
            trainer_defaults={
                "callbacks": [
                    RunSummary(),
                    StepSeed(),
                    AccumulationScale(),
                    NaNGuard(),
                    LastCheckpoint(),
                    ResumedEarlyStopping(),
                    RunLock(),
                    StopOnSignal(),
                    ProgressLines(),
                ],
                "enable_model_summary": False,
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands and ``plan``."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser that resolves ``${...}`` and raises errors, which `main` reports."""
        parser = LightningArgumentParser(parser_mode="omegaconf+", exit_on_error=False, **kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="Path of a YAML or JSON config; may be repeated.")
        return parser

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Set defaults: load checkpoints without pickle; do not keep predictions, which callbacks write, in memory."""
        super().setup_parser(*args, **kwargs)
        for command in self.subcommands():
            command_parser(self, command).usage = f"python cli.py {command} -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]"
            if command != "plan":
                command_parser(self, command).set_defaults(weights_only=True)
            if command == "predict":
                command_parser(self, command).set_defaults(return_predictions=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, with the hyper-parameters of the checkpoint as defaults of the model."""
        given = _to_list(args)
        args, items = split_items(escape_arguments(import_modules(given)))
        # Flags of a model are valid only once its class is known, which may be from the checkpoint alone. So this flag
        # is read first, by a parser that ignores all others.
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--ckpt_path")
        known, others = first.parse_known_args(args)
        _, self._other_args = first.parse_known_args(given)
        path, parsed = known.ckpt_path, None
        if path in (None, "last", "best"):
            parsed = _parse_first(parser, others)
            path = _resolve_checkpoint(parsed[parsed.subcommand], parsed.subcommand, path)
        saved = read_model_config(path) if path else None
        is_unchanged = not saved or (parsed is not None and self._dump(parsed)["model"] == saved)
        if not is_unchanged:  # a part of the model may be given in the checkpoint alone
            for command in self.subcommands():
                command_parser(self, command).set_defaults(model=saved)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*discarding init_args", UserWarning)  # check_same_classes reports it
            if items:
                config = _parse_first(parser, args)
                args = [*args, *set_items(config[config.subcommand], items)]
            if parsed and is_unchanged and not items and not any(arg.startswith(_PRINT) for arg in args):
                self.config = _validated(parser, parsed)  # another parse would give the same
            else:
                self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        check_trainer_arguments(config)
        check_nulls(config)
        if path is None and self.config.subcommand == "predict":
            raise UserError("`predict` needs trained weights: give a checkpoint that `fit` wrote to --ckpt_path.")
        if path != config.get("ckpt_path"):
            config.ckpt_path = path
        if saved:
            check_same_classes(path, saved, config.model, training=self.config.subcommand == "fit")

    def _dump(self, config: Namespace) -> dict[str, Any]:
        """Return a config as plain values; to validate it again would take a fifth of the time before a run begins."""
        dump = self.parser.dump(config, skip_link_targets=False, skip_unset=False, skip_validation=True)
        return yaml.safe_load(dump)[config.subcommand]  # type: ignore[no-any-return]

    def _parse_ckpt_path(self) -> None:
        """No-op; Lightning would let the checkpoint override the command line."""

    def before_instantiate_classes(self) -> None:
        """Save the config of ``fit`` only; other commands must not overwrite it."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand == "plan":  # the planned devices need not exist here
            trainer = self.config.plan.trainer
            trainer.accelerator = "cpu"
            trainer.devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices

    def instantiate_classes(self) -> None:
        """Build all objects, for ``plan`` on the meta device, where weights take no memory."""
        self.config_dump = self._dump(self.config)
        planning = self.subcommand == "plan"
        with torch.device("meta") if planning else nullcontext(), without_weights() if planning else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer so that it reads sharded checkpoints with any strategy."""
        configured = self.config_init[self.subcommand].trainer.get("callbacks") or []
        if any(isinstance(callback, NaNGuard) for callback in configured):
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [each for each in defaults if not isinstance(each, NaNGuard)]
        trainer = super().instantiate_trainer(**kwargs)
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar not in configured:  # without max_epochs it shows "Epoch 3/-2"
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks[callbacks.index(bar)] = TQDMProgressBar()
        self._check_loggers(trainer)
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = FolderCheckpointIO(optimizers=self.subcommand == "fit")
        if type(strategy) is ModelParallelStrategy and saves_sharded_checkpoints(strategy):
            raise UserError(
                "trainer.strategy=ModelParallelStrategy overwrites the last checkpoint in place, so that a run killed "
                f"while saving loses it: use t2v.training.sharding.{ShardedStrategy.__name__}, as in "
                "configs/cluster/fsdp.yaml, or set save_distributed_checkpoint: false."
            )
        return trainer

    def _check_loggers(self, trainer: Trainer) -> None:
        """Check that the folders of the loggers can be written to; only ``fit`` needs them.

        Raises:
            UserError: If one cannot, and the command is ``fit``.
        """
        if self.subcommand == "plan":
            return
        unwritable = [logger for logger in trainer.loggers if _refuses_files(logger.log_dir)]
        if not unwritable:
            return
        named = " and ".join(f"'{logger.log_dir}'" for logger in unwritable)
        if self.subcommand == "fit":
            raise UserError(
                f"{named} cannot be written to (no permission, or a read-only disk): give another folder, for example "
                "by --trainer.default_root_dir, and to resume the checkpoint's path to --ckpt_path."
            )
        rank_zero_warn(f"{named} cannot be written to: nothing is logged there.")
        trainer.loggers = [logger for logger in trainer.loggers if logger not in unwritable]

    def after_instantiate_classes(self) -> None:
        """Save the config of the model in every checkpoint, including nested modules.

        Raises:
            UserError: If the command would measure nothing.
        """
        limit = {"validate": "limit_val_batches", "test": "limit_test_batches"}.get(str(self.subcommand))
        if limit and not getattr(self.trainer, limit):
            raise UserError(f"trainer.{limit}=0 leaves nothing to measure: raise it, or leave it out.")
        config = self.config_dump["model"]
        self.model.save_hyperparameters(
            {
                "_class_path": config["class_path"],
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
                **config.get("init_args", {}),
            }
        )

    @rank_zero_only
    def after_fit(self) -> None:
        """Print the command that uses the trained model, or that trains on if the time was up."""
        if not self.trainer.global_step:  # there is no checkpoint
            return
        if not any(getattr(saver, "save_last", None) for saver in self.trainer.checkpoint_callbacks):
            return
        if ended_by_time(self.trainer):
            command = [*self._other_args, "--ckpt_path", "last", "--trainer.max_time", "null"]
            print(f"Next         python cli.py {shlex.join(command)}")
            return
        if is_overridden("predict_dataloader", self.datamodule):
            command = [*self._other_args, "--ckpt_path", "last"]
            command[command.index("fit")] = "predict"
            if not getattr(self.datamodule, "prompts", True):
                loggers = (each for each in self.trainer.callbacks if isinstance(each, GenerationLogger))  # type: ignore[attr-defined]
                command += ["--data.prompts", next((each.prompts[0] for each in loggers), "a red circle moves left")]
            print(f"Next         python cli.py {shlex.join(command)}")


def _to_list(args: ArgsType) -> list[str]:
    """Return arguments as a command line; a dictionary becomes an inline config."""
    if args is None:
        return sys.argv[1:]
    if isinstance(args, list):
        return args
    config = args.as_dict() if isinstance(args, Namespace) else dict(args)
    command = config.get("subcommand") or next(iter(config))
    return [command, "--config", json.dumps(config[command], default=str)]


def _parse_first(parser: LightningArgumentParser, args: list[str]) -> Namespace:
    """Return a config before all of it is known: required values may be in a checkpoint."""
    others = [arg for arg in args if not arg.startswith(_PRINT)]  # printed by the second parse
    return parser.parse_args(others, _skip_validation=True)


def _validated(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    """Return a config after the checks that `_parse_first` left out."""
    try:
        parser.validate(config)
    except (TypeError, KeyError) as error:
        parser.error(str(error), error)
    return config


def _resolve_checkpoint(config: Namespace, command: str, flag: str | None) -> str | None:
    """Return the checkpoint to load if the flag is missing, ``last`` or ``best``."""
    path = flag or config.get("ckpt_path")
    if path not in ("last", "best"):
        return path
    folder = _checkpoint_folder(config)
    if path == "best":
        best = best_checkpoint(folder)
        if best is None:
            raise UserError(
                f"There is no best checkpoint in {folder}: train with a metric that the ModelCheckpoint monitors, "
                "such as monitor: val/loss, or give `last` to --ckpt_path."
            )
        return best
    newest = newest_last(folder)
    if newest is None and command != "fit":
        raise UserError(
            f"There is no last.ckpt in {folder}, so there is nothing to {command} with: "
            "run `fit` first, or give a checkpoint's path to --ckpt_path."
        )
    return newest


def _refuses_files(folder: str | None) -> bool:
    return folder is not None and is_local(folder) and not is_writable(Path(folder))


def _checkpoint_folder(config: Namespace) -> str:
    """Return the folder of the run's `ModelCheckpoint`."""
    callbacks = config.get("trainer", Namespace()).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if folder := callback.get("init_args", Namespace()).get("dirpath"):
            return str(folder)
    raise UserError(
        "`--ckpt_path last` needs a folder to look in: give trainer.callbacks a ModelCheckpoint with dirpath and "
        "save_last: true, or give a checkpoint's path to --ckpt_path."
    )


def main(args: ArgsType = None) -> T2VCLI:
    """Run one command.

    Args:
        args: Command line as a list, or a config such as ``{"fit": {...}}``; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 after an expected error, 75 after a signal stopped ``fit``, 130 after Ctrl-C, 143
            after SIGTERM stopped another command.
    """
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    if ignored := sorted(name for name in os.environ if name.startswith(IGNORED_VARIABLES)):
        warnings.warn(f"Settings are not read from the environment: give {', '.join(ignored)} as flags.", stacklevel=1)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls in Lightning
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # RunSummary prints it
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends kernels for other CPUs
    try:
        with stopping_at_once(), exit_on_expected_error():
            return T2VCLI(answer(_to_list(args)))
    except Stopped as stop:
        if stop.code:
            sys.stderr.write(f"{stop.message}\n")
        raise


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    shorten_tracebacks()
    main()
