"""One command line for both stages: ``python cli.py {fit,validate,test,predict,plan} -c CONFIG``.

- Flags are the arguments of the classes: ``--help``, ``--model.help CLASS`` and ``--print_config`` show them.
- ``${...}`` in a config is resolved after all files and flags, so that a flag reaches everything derived from it.
- ``--ckpt_path`` reads the model's hyper-parameters as if they were the first config: what the files and the command
  line say wins, what they do not say comes from the checkpoint.
- ``--ckpt_path last`` is the newest complete ``last*.ckpt`` in the run's checkpoint folder, a file or a sharded one.
- A user's mistake ends with one ``error:`` line and status 2; a SIGTERM or SIGUSR1 stops ``fit`` with status 75.
"""

import json
import logging
import os
import shlex
import sys
import warnings
from contextlib import nullcontext
from pathlib import PurePath
from pkgutil import resolve_name
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from callbacks.checkpoint import FinalCheckpoint
from callbacks.seeding import StepSeed
from callbacks.signals import StopOnSignal, Stopped
from callbacks.summary import RunSummary
from t2v.checkpoints.storage import MARKER
from t2v.errors import UserError, parsing_message
from t2v.training.lightning_private import command_parser, saves_sharded_checkpoints
from t2v.training.recipe import RecipeFile
from t2v.training.sharding import FolderCheckpointIO, ShardedStrategy

STAGES = {"t2v.vqvae": "stage 1, the video tokenizer", "t2v.transformer": "stage 2, the transformer"}
SILENCED = (
    "Checkpoint directory .* exists and is not empty",  # a fixed run folder
    "You.re using the WeightAveraging callback with a model that overrides the configure_model",
    "Couldn't infer the batch indices",  # the writers take names from the batch
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own
    r"It is recommended to use `self.log\('val/",  # torchmetrics has them of all ranks
    "FSDP2-wrapped module .* returned a view tensor",  # the loss writes into it where autograd does not look
)
"""Warnings that tell a user nothing."""


class SaveConfig(SaveConfigCallback):
    """Saves the config when training begins: a run that is refused leaves the config of the one before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``config.yaml`` in the run's folder."""
        super().setup(trainer, pl_module, "fit")


class PlanningTrainer(Trainer):
    """Lightning's `Trainer`, and the command ``plan``."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        memory: float = 80.0,
        tflops: float | None = None,
    ) -> None:
        """Tell what a run takes in memory and time, without making its model or reading its data.

        Args:
            model: What the config describes, on the meta device.
            datamodule: Its data, which is not opened.
            memory: Of one device, in GB.
            tflops: TFLOP/s that one device reaches; without it no times are told.
        """
        from t2v.training.planner import report

        print(report(model, datamodule, trainer=self, memory=memory, tflops=tflops))


class T2VCLI(LightningCLI):
    """LightningCLI with fixed run folders, checkpoints that know their model, and short errors.

    Args:
        args: The command line as a list, or ``{"fit": {...}}``; ``sys.argv`` by default.
    """

    def __init__(self, args: ArgsType = None) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        self.argv = _as_command_line(args)
        self.command = next((arg for arg in self.argv if arg in self.subcommands()), "")
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
                "callbacks": [RunSummary(), StepSeed(), FinalCheckpoint(), StopOnSignal()],
                "enable_model_summary": False,
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `PlanningTrainer.plan`."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let ``${...}`` in configs refer to other keys, and `main` tell what is wrong with the arguments."""
        parser = LightningArgumentParser(parser_mode="omegaconf+", exit_on_error=False, **kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="Path of a YAML or JSON config; may be repeated.")
        return parser

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Load no pickles, and do not keep every prediction in memory: callbacks write them as they come."""
        super().setup_parser(*args, **kwargs)
        for command in LightningCLI.subcommands():
            command_parser(self, command).set_defaults(weights_only=True)
        command_parser(self, "predict").set_defaults(return_predictions=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, over the hyper-parameters of ``--ckpt_path`` where there is one."""
        path = self._find_checkpoint(parser)
        saved = _saved_model(path) if path else {}
        first = ["--config", json.dumps({self.command: {"model": saved}})] if saved else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*discarding init_args", UserWarning)  # another class: told below
            self.config = parser.parse_args([*first, *self.argv])
        if path is None and self.command == "predict":
            raise UserError("`predict` needs trained weights: give a checkpoint that `fit` wrote to --ckpt_path.")
        config = self.config[self.config.subcommand]
        if path != config.get("ckpt_path"):
            config.ckpt_path = path
        if saved and (made := resolve_name(saved["class_path"])) is not (
            asked := resolve_name(config.model.class_path)
        ):
            raise UserError(
                f"{path} holds a {_describe(made)}, but this run's config asks for a {_describe(asked)}: "
                "give the checkpoint of that model, or the other config."
            )

    def _parse_ckpt_path(self) -> None:
        """Nothing is left to do: Lightning's own way lets the checkpoint override the command line."""

    def _find_checkpoint(self, parser: LightningArgumentParser) -> str | None:
        """The checkpoint that this run loads, or None."""
        asked = _flag(self.argv, "--ckpt_path")
        if asked is None or asked == "last":
            # What is missing does not matter yet: the checkpoint may have it.
            quiet = [arg for arg in self.argv if not arg.startswith("--print_config")]
            draft = parser.parse_args(quiet, _skip_validation=True)
            draft = draft[draft.subcommand]
            asked = asked or draft.get("ckpt_path")
        if asked != "last":
            return asked
        folder = _checkpoint_folder(draft)
        last = _newest_last(folder)
        if last is None and self.command != "fit":
            raise UserError(
                f"There is no last.ckpt in {folder}, so there is nothing to {self.command} with: "
                "run `fit` first, or give a checkpoint's path to --ckpt_path."
            )
        return last

    def before_instantiate_classes(self) -> None:
        """Save the config beside a training run only; other commands must not replace it."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand == "plan":  # devices that are planned for need not be here
            trainer = self.config.plan.trainer
            trainer.accelerator = "cpu"
            trainer.devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices

    def instantiate_classes(self) -> None:
        """Build everything, for ``plan`` with weights that take no memory."""
        with torch.device("meta") if self.subcommand == "plan" else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Have a trainer of any strategy read sharded checkpoints."""
        trainer = super().instantiate_trainer(**kwargs)
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = FolderCheckpointIO(optimizers=self.subcommand == "fit")
        if type(strategy) is ModelParallelStrategy and saves_sharded_checkpoints(strategy):
            raise UserError(
                "trainer.strategy=ModelParallelStrategy writes a sharded checkpoint over the last one, and a run that "
                f"is killed meanwhile has none: take t2v.training.sharding.{ShardedStrategy.__name__}, as in "
                "configs/cluster/fsdp.yaml, or set save_distributed_checkpoint: false."
            )
        return trainer

    def after_instantiate_classes(self) -> None:
        """Have every checkpoint say how its model was built, nested modules too."""
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
        """Say which command comes next."""
        if self.trainer.checkpoint_callback is not None and is_overridden("predict_dataloader", self.datamodule):
            rest = _without_flag(self.argv, "--ckpt_path")
            rest[rest.index("fit")] = "predict"
            print(f"Next         python cli.py {shlex.join([*rest, '--ckpt_path', 'last'])}")


def _as_command_line(args: ArgsType) -> list[str]:
    """Arguments given as a dictionary are an inline config."""
    if args is None:
        return sys.argv[1:]
    if isinstance(args, list):
        return args
    tree = args.as_dict() if isinstance(args, Namespace) else dict(args)
    subcommand = tree.get("subcommand") or next(iter(tree))
    return [subcommand, "--config", json.dumps(tree[subcommand], default=str)]


def _flag(argv: list[str], name: str) -> str | None:
    """The last value given to a flag."""
    pairs = zip(argv, [*argv[1:], None], strict=False)
    values = [
        after if arg == name else arg.removeprefix(f"{name}=") for arg, after in pairs if arg.split("=")[0] == name
    ]
    return values[-1] if values else None


def _without_flag(argv: list[str], name: str) -> list[str]:
    return [
        arg for before, arg in zip([None, *argv], argv, strict=False) if arg.split("=")[0] != name and before != name
    ]


def _describe(model: type) -> str:
    stage = next((text for package, text in STAGES.items() if model.__module__.startswith(package)), None)
    return f"{model.__name__} ({stage})" if stage else model.__name__


def _checkpoint_folder(config: Namespace) -> str:
    """The folder of the run's `ModelCheckpoint`."""
    callbacks = config.get("trainer", Namespace()).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if folder := callback.get("init_args", Namespace()).get("dirpath"):
            return str(folder)
    raise UserError(
        "`--ckpt_path last` needs a folder to look in: give trainer.callbacks a ModelCheckpoint with dirpath and "
        "save_last: true, or give a checkpoint's path to --ckpt_path."
    )


def _newest_last(folder: str) -> str | None:
    filesystem, root = fsspec.url_to_fs(folder)
    written = {}
    for path in filesystem.glob(f"{root}/last*.ckpt"):
        last = f"{path}/{MARKER}" if filesystem.isdir(path) else path  # what is written last
        if filesystem.exists(last):
            written[path] = filesystem.modified(last)
    newest = max(written, key=written.__getitem__, default=None)
    return newest and f"{folder.rstrip('/')}/{PurePath(newest).name}"


def _saved_model(path: str) -> dict[str, Any]:
    """The model that a checkpoint was made by, as ``{class_path, init_args}``; empty where it does not say."""
    filesystem, inner = fsspec.url_to_fs(path)
    if not filesystem.exists(inner):
        raise UserError(f"There is no checkpoint at {path}: check the path given to --ckpt_path.")
    if filesystem.isdir(inner):  # sharded: one file holds all that is not a tensor
        inner = f"{inner}/{MARKER}"
        if not filesystem.exists(inner):
            raise UserError(
                f"{path} is a folder without {MARKER}, so no checkpoint, or one that was not written to its end: give "
                "another to --ckpt_path, or `last` for the newest complete one."
            )
    try:
        if isinstance(filesystem, LocalFileSystem):
            checkpoint = torch.load(inner, map_location="cpu", weights_only=True, mmap=True)
        else:
            with filesystem.open(inner, "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        hyper_parameters = dict(checkpoint.get("hyper_parameters", {}))
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{path} is not a checkpoint of this program, or it is damaged ({type(error).__name__}: {reason}): "
            "give the path of a .ckpt file that `fit` wrote to --ckpt_path."
        ) from error
    hyper_parameters.pop("_instantiator", None)
    class_path = hyper_parameters.pop("_class_path", None)
    return {"class_path": class_path, "init_args": hyper_parameters} if class_path else {}


def _explain(error: BaseException | None) -> str | None:
    """The sentence of a user's mistake, or None where the error is not one.

    jsonargparse raises its own error from a class's; a DataLoader worker's holds the traceback as text.
    """
    parsing = parsing_message(error) if isinstance(error, ArgumentError) else None
    while error is not None:
        if isinstance(error, (UserError, MisconfigurationException)):
            return str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()
        if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
            return f"The checkpoint does not fit the model that the config describes. {error}"
        error = error.__cause__
    return parsing


def main(args: ArgsType = None) -> T2VCLI:
    """Run one command.

    Args:
        args: The command line as a list, or ``{"fit": {...}}``; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 after a user's mistake, 75 after a signal that stopped ``fit``.
    """
    for harmless in SILENCED:
        warnings.filterwarnings("ignore", harmless)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, nothing a user can change
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # RunSummary says it
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it offers kernels of its own for other CPUs
    try:
        return T2VCLI(args)
    except Stopped as stop:
        if stop.code:
            sys.stderr.write(f"{stop.message}\n")
        raise
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
