"""What `cli.py` does before its imports, which take seconds: help screens, a shorter import of torchmetrics, memory."""

import ctypes
import difflib
import importlib
import logging
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

OVERVIEW = """\
usage: python cli.py COMMAND -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]

Train the two stages of a text-to-video model, and generate videos.

commands:
  fit       train stage 1 (a VQ-VAE) or stage 2 (a transformer of its tokens)
  validate  compute the metrics of a checkpoint on the validation set
  test      the same for stage 1; stage 2: generate videos for the validation
            set's captions and measure them too
  predict   stage 1: write the tokens on which stage 2 is trained;
            stage 2: generate videos from prompts
  plan      print the memory and time that a run needs, without running it

help:
  python cli.py COMMAND --help
  python cli.py COMMAND -c CONFIG --print_config   the complete config of a run

From nothing to generated clips: make demo. Recipes: configs/. To learn more:
docs/tutorial.md."""

_CHECKPOINT = """\
  --ckpt_path FILE   the checkpoint; last is the newest of the run's folder
"""


def _command(name: str, summary: str, examples: list[str], arguments: str) -> str:
    shown = "\n".join(f"  python cli.py {name} {example}" for example in examples)
    return f"""\
usage: python cli.py {name} -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]

{summary}

examples:
{shown}

arguments:
  -c, --config FILE  a recipe of configs/ or a file of your own; may be
                     repeated, and later files override earlier ones
  --KEY VALUE        a value of the config, such as --trainer.max_steps 1000
{arguments}
help:
  --help all                        the trainer's and the command's arguments
  --model.help t2v.LitVQVAE         a model's; t2v.LitVideoTransformer: stage 2
  --data.help data.VideoDataModule  the data's; data.TokenDataModule: stage 2
  -c FILE --print_config            the complete config of a run"""


SCREENS = {
    "fit": _command(
        "fit",
        "Train a model. Its checkpoints and metrics are written to the run's folder,\nwhich the recipe names.",
        [
            "-c configs/vqvae/shapes.yaml",
            "-c configs/vqvae/shapes.yaml --ckpt_path last     (continue)",
            "-c configs/vqvae/shapes.yaml -c configs/debug/steps.yaml",
        ],
        _CHECKPOINT.replace("the checkpoint;", "continue from it;") + "  --seed_everything N  the seed; 0 by default\n",
    ),
    "validate": _command(
        "validate",
        "Compute the metrics of a checkpoint on the validation set.",
        ["-c configs/vqvae/shapes.yaml --ckpt_path last"],
        _CHECKPOINT,
    ),
    "test": _command(
        "test",
        "Stage 1: compute the metrics of a checkpoint, as validate does.\n"
        "Stage 2: also generate videos for the captions of the validation set.",
        ["-c configs/vqvae/shapes.yaml --ckpt_path last", "-c configs/transformer/digits.yaml --ckpt_path last"],
        _CHECKPOINT,
    ),
    "predict": _command(
        "predict",
        "Stage 1: write the tokens of all videos, on which stage 2 is trained.\nStage 2: generate videos from prompts.",
        ["-c configs/vqvae/shapes.yaml --ckpt_path last", "-c configs/transformer/shapes.yaml --ckpt_path last"],
        _CHECKPOINT,
    ),
    "plan": _command(
        "plan",
        "Print the memory and time that a run needs, without allocating its model or\nreading its data.",
        [
            "-c configs/vqvae/256.yaml --memory 24",
            "-c configs/transformer/8b.yaml --memory 80 --tflops 400",
        ],
        "  --memory GB        memory of one device in GB; 80 by default\n"
        "  --tflops NUMBER    TFLOP/s that one device reaches; without it no times\n",
    ),
}
"""The help of each command."""


def answer(args: list[str]) -> list[str]:
    """Print the screen of help that the arguments of `cli.py` ask for, if they do, and exit.

    Args:
        args: The command line without the program.

    Returns:
        The arguments to parse: without the word `all` in `--help all`.

    Raises:
        SystemExit: With status 0 after help, 2 if the command is missing or unknown.
    """
    names = ", ".join(SCREENS)
    if not args:
        print(OVERVIEW, flush=True)
        _fail(f"give a subcommand: {names}.")
    command, *others = args
    if command in ("-h", "--help"):
        print(OVERVIEW)
        raise SystemExit(0)
    if command.startswith("-"):
        return args
    if command not in SCREENS:
        close = difflib.get_close_matches(command.lower(), SCREENS, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        _fail(f"there is no subcommand '{command}'{guess}: give one of {names}.")
    place = next((i for i, arg in enumerate(others) if arg in ("-h", "--help")), None)
    if place is None:
        return args
    if others[place + 1 : place + 2] == ["all"]:
        return [command, "--help"]
    print(SCREENS[command])
    raise SystemExit(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, in <malloc.h>."""


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


class _Deferred(ModuleType):
    """A module that runs its source when an attribute is used that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        self.__class__ = ModuleType  # type: ignore[assignment]  # as importlib.util.LazyLoader does
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _defer(spec: ModuleSpec, **attributes: Any) -> _Deferred:
    """Put a module with these attributes in place of one that is not imported yet."""
    module = _Deferred(spec.name)
    module.__dict__.update(vars(module_from_spec(spec)), **attributes)
    sys.modules[spec.name] = module
    return module


def _plot(*args: Any, **kwargs: Any) -> Any:
    """Plot the values of a metric, as `Metric.plot` does."""
    module = sys.modules["torchmetrics.utilities.plot"]
    if isinstance(module, _Deferred):
        del module.plot_single_or_multi_val  # this function
    return module.plot_single_or_multi_val(*args, **kwargs)


def defer_torchmetrics() -> None:
    """Import only what Lightning needs of torchmetrics, and the rest of it on first use.

    Importing all of it takes as long as importing PyTorch, since it imports transformers, torchvision, SciPy and
    Matplotlib if they are installed. Lightning needs two of its classes, which need Matplotlib only to plot. Call this
    before Lightning is imported.
    """
    spec = find_spec("torchmetrics") if "torchmetrics" not in sys.modules else None
    if spec is None or spec.origin is None:
        return
    package = _defer(spec, __version__=version("torchmetrics"), _logger=logging.getLogger("torchmetrics"))
    plot = spec_from_file_location("torchmetrics.utilities.plot", Path(spec.origin).parent / "utilities/plot.py")
    assert plot is not None
    plots = _defer(plot, _AX_TYPE=object, _PLOT_OUT_TYPE=object, plot_single_or_multi_val=_plot)
    try:
        utilities = importlib.import_module("torchmetrics.utilities")  # before .metric, which imports it in a cycle
        utilities.plot = plots  # type: ignore[attr-defined]
        for name, module in {"Metric": "metric", "MetricCollection": "collections"}.items():
            setattr(package, name, getattr(importlib.import_module(f"torchmetrics.{module}"), name))
    except ImportError:  # another version, with other needs: import it as it is
        for loaded in [module for module in sys.modules if module.partition(".")[0] == "torchmetrics"]:
            del sys.modules[loaded]


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for new ones, rather than return it to the system.

    The system clears every page that it gives to a process. Without this, writing the tokens of the moving shapes on a
    CPU, with tensors of tens of megabytes, takes 1.3 times as long. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, 2**31 - 1)
