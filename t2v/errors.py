"""The exception for a user's mistake, the check of an argument's range, and how commands report errors.

- Expected errors, the user's and the system's (a full disk, no permission, a damaged file, a missing package), are
  reported in one ``error:`` line, with exit status 2.
- Anything else is a bug: its traceback is shortened to the lines of this project, and kept in full in a file.
"""

import io
import math
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, EIO, EMFILE, ENAMETOOLONG, ENOENT, ENOSPC, EPERM, EROFS
from numbers import Real
from textwrap import shorten
from types import TracebackType
from typing import Any

_ADVICE = {
    EACCES: "give yourself the permission, or choose another place",
    EDQUOT: "delete files, or choose another disk",
    EFBIG: "raise the limit of a file's size by `ulimit -f`, or choose another disk",
    EIO: "the disk or the network file system fails: choose another",
    EMFILE: "raise the limit by `ulimit -n`, or lower data.num_workers",
    ENAMETOOLONG: "choose a shorter name",
    ENOENT: "correct the path",
    ENOSPC: "free space on that disk, or choose another",
    EPERM: "give yourself the permission, or choose another place",
    EROFS: "choose a place that can be written to",
}
_LIMIT = 700
"""Letters of another library's message that are repeated."""
_CHECKERS = ("jsonargparse", "lightning", "torch/optim", "torch/utils/data", "torch/random", "torchmetrics", "fsspec")
"""Parts of other libraries whose `ValueError` is about an argument that the user gave."""
_TYPE_CHECKERS = ("lightning/fabric/accelerators", "lightning/pytorch/callbacks")
"""The same for `TypeError` and `RuntimeError`."""
_REMOTE = (
    "aiohttp",
    "botocore",
    "gcsfs",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "s3fs",
    "urllib3",
)
_OWN = ("t2v", "data", "callbacks", "cli")


class UserError(ValueError):
    """A mistake of the user's, reported in one sentence.

    The message names the value, the limit, the likely cause and what to change. Commands print it without a traceback
    and exit with status 2.
    """


def check_range(owner: object, interval: str, **values: Any) -> None:
    """Check that arguments lie in an interval.

    Args:
        owner: The object, or the name of the class, that has the arguments; the message ends in it.
        interval: In mathematical notation, such as "[0, 1)" or "(0, inf)". Infinity itself is allowed if its bracket is
            square.
        values: The arguments by their names. A list must not be empty, and each of its numbers must lie in the
            interval. None, and what is no number (a schedule), is not checked.

    Raises:
        UserError: If one does not, or is NaN; the message names all of them.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def fits(value: Any) -> bool:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return len(value) > 0 and all(fits(each) for each in value)
        if not isinstance(value, Real):
            return True
        number = float(value)
        above = number >= low if interval[0] == "[" else number > low
        return above and (number <= high if interval[-1] == "]" else number < high)

    wrong = {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if not fits(value)
    }
    if wrong:
        named = " and ".join(f"{name}={value}" for name, value in wrong.items())
        empty = any(isinstance(value, list) and not value for value in wrong.values())
        demand = "not be empty" if empty else _demand(interval, low, high)
        finite = " and finite" if math.inf in wrong.values() and math.isfinite(low) else ""
        name = owner if isinstance(owner, str) else type(owner).__name__
        raise UserError(f"{named} must {demand}{finite} ({name}).")


def _demand(interval: str, low: float, high: float) -> str:
    """Return an interval in words."""
    if math.isfinite(high):
        return f"lie in {interval}" if math.isfinite(low) else f"be at most {high:g}"
    if not math.isfinite(low):
        return "be a finite number"
    return f"be at least {low:g}" if interval[0] == "[" else f"be greater than {low:g}"


def run_tool(commands: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Run typed functions as a command: the signature gives the flags, the docstring gives the help.

    Args:
        commands: One function, or several as subcommands by name; required arguments are positional on the command
            line.

    Raises:
        SystemExit: With status 2, after one line on stderr, after an expected error; with 130 after Ctrl-C.
    """
    from jsonargparse import auto_cli

    module = sys.modules["__main__"].__spec__  # None if a file is run
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    shorten_tracebacks()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and captions that the terminal cannot show
    with exit_on_interrupt(), exit_on_expected_error():
        auto_cli(commands, exit_on_error=False, prog=program)  # type: ignore[arg-type]  # a dict may hold functions


def reason_of(error: Exception, width: int = 200) -> str:
    """Return type and message of an error on one line, to be repeated in the sentence of a `UserError`.

    Args:
        error: The error of another library.
        width: Most letters.
    """
    return shorten(f"{type(error).__name__}: {error}", width, placeholder=" …")


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Report Ctrl-C and exit.

    Raises:
        SystemExit: With status 130, after one `error:` line on stderr.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\nerror: Interrupted.\n")
        raise SystemExit(130) from None


@contextmanager
def exit_on_expected_error() -> Iterator[None]:
    """Report an expected error and exit; raise any other.

    Raises:
        SystemExit: With status 2, after one `error:` line on stderr.
    """
    before, threading.excepthook = threading.excepthook, _report_of_thread
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
    else:
        return
    finally:
        threading.excepthook = before
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def _report_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, but not of TensorBoard's, whose error the main thread raises again."""
    if not (isinstance(args.exc_value, OSError) and _of_tensorboard(args.exc_value)):
        threading.__excepthook__(args)


def _of_tensorboard(error: BaseException) -> bool:
    files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)]
    return any("/site-packages/tensorboard/" in file for file in files)


def shorten_tracebacks() -> None:
    """Let an uncaught exception of this process print the lines of this project and how to report it."""
    sys.excepthook = _report_unexpected


def _report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, Exception):
        sys.__excepthook__(kind, error, trace)
        return
    full = "".join(traceback.format_exception(error))
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames[:-1] if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    lines = traceback.format_list([*own, *frames[-1:]])
    try:
        with tempfile.NamedTemporaryFile("w", prefix="t2v-error-", suffix=".txt", delete=False) as file:
            file.write(f"{sys.argv}\n{full}")
        where = f"The full traceback and the command line are in {file.name}"
    except OSError:
        lines, where = [full], "The full traceback is above"
    sys.stderr.write(
        f"Traceback, without other libraries:\n{''.join(lines)}{''.join(traceback.format_exception_only(error))}"
        f"This error was not expected. {where}: report it with them, the config files and the versions of "
        "`pip list`.\n"
    )


def explain(error: BaseException) -> str | None:
    """Return an expected error as one sentence, or None for a bug.

    Libraries wrap errors in their own: jsonargparse that of a class, PyTorch that of a DataLoader's worker, which
    contains its traceback as text. The innermost error that is expected is the one that is reported.
    """
    found: str | None = None
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, ImportError) and (each.name or "").partition(".")[0] in _OWN:
            return None
        message = _explain_one(each)
        if found is None or isinstance(each, UserError):
            found = message or found
        # The context of an unexpected error is not its cause.
        each = each.__cause__ or (each.__context__ if message else None)
    return found


def _explain_one(error: BaseException) -> str | None:
    text, kind = str(error), type(error)
    package = kind.__module__.partition(".")[0]
    if f"{UserError.__name__}: " in text and "Traceback" in text:  # of a worker
        return text.rsplit(f"{UserError.__name__}: ", 1)[-1].strip()
    if isinstance(error, UserError) or kind.__name__ == "MisconfigurationException":
        return _one_line(text)
    if kind.__name__ == "ArgumentError" and package in ("argparse", "jsonargparse"):
        return parsing_message(error)
    if package in ("omegaconf", "antlr4"):
        return _explain_interpolation(text)
    if package in _REMOTE:
        return (
            f"The address cannot be read ({_one_line(text) or kind.__name__}): check it and the network, or try again."
        )
    if isinstance(error, OSError):
        return _explain_system(error)
    if isinstance(error, ImportError):
        return f"A package that this command needs is not installed ({_one_line(text)}): install it, or do without it."
    if isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"The memory does not suffice ({_one_line(parsing_message(error), 200)}): lower data.batch_size or the "
            "size of the model; `python cli.py plan` prints what a run needs."
        )
    if text.startswith("Error(s) in loading state_dict"):
        return f"The checkpoint does not fit the model that the config describes. {_one_line(text)}"
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return f"A file could not be written completely ({_one_line(text, 150)}): free space on the disk of the run."
    if "PytorchStreamReader" in text or kind.__name__ in ("BadZipFile", "UnpicklingError", "EOFError"):
        return f"A file is damaged or of another kind ({_one_line(text, 150)}): give another, or write it again."
    if isinstance(error, ValueError) and _raised_by(error, _CHECKERS):
        return parsing_message(error)
    if text.startswith("DataLoader worker"):
        return f"A process of the loader died, probably for lack of memory ({_one_line(text)}): lower data.num_workers."
    if isinstance(error, TypeError | RuntimeError) and _raised_by(error, _TYPE_CHECKERS):
        return _one_line(text)
    return None


def _explain_system(error: OSError) -> str:
    """Return the error of the system with the path, the reason and what to do."""
    reason = error.strerror or _one_line(str(error)) or type(error).__name__
    unnamed = " of TensorBoard" if _of_tensorboard(error) else ""
    path = f" '{os.fsdecode(error.filename)}'" if error.filename else unnamed
    advice = _ADVICE.get(error.errno or 0, "correct the path, or choose another place")
    return f"The system refuses a file{path} ({reason}): {advice}."


def _explain_interpolation(text: str) -> str:
    """Return OmegaConf's error with the key whose value contains the interpolation."""
    reason, _, rest = text.partition("\n")
    key = re.search(r"full_key: (?:\w+\.)?(\S+)", rest)
    return (
        f"A value in ${{...}} cannot be resolved{f' for {key[1]}' if key else ''} ({_one_line(reason)}): name a key of "
        "the config from its top, such as ${trainer.default_root_dir}, or write \\${ for the characters themselves."
    )


def _raised_by(error: BaseException, places: Sequence[str]) -> bool:
    """Return whether the code that raised an error is in one of the places in site-packages."""
    frames = traceback.extract_tb(error.__traceback__)
    path = frames[-1].filename.replace("\\", "/").rpartition("site-packages/")[2] if frames else ""
    return path.startswith(tuple(places))


def _one_line(text: str, limit: int = _LIMIT) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"


def parsing_message(error: BaseException) -> str:
    """Return the message of jsonargparse's error on one line, without the types that it tried."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Expected a <class 'NoneType'>",
        "Given value",
        "Expected a path but [",
    )
    lines = str(error).splitlines()
    meant = [line.partition("Problem with given class_path")[0] for line in lines if "with given class_path" in line]
    other_types = tuple(f"{bullet}Expected a " for bullet in meant if bullet.endswith("- "))  # items of the same list
    kept = [line.strip().removeprefix("- ") for line in lines if not line.startswith(other_types)]
    return _one_line(" ".join(line for line in kept if line and not line.startswith(noise)))
