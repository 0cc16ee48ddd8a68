"""The exception for a user's mistake, and how a command reports it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, reported in one sentence.

    The message names the value, the limit, the likely cause and what to change. Commands print it without a traceback
    and exit with status 2.
    """


def run_tool(commands: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Run typed functions as a command: the signature gives the flags, the docstring gives the help.

    Args:
        commands: One function, or several as subcommands by name; required arguments are positional on the command
            line.

    Raises:
        SystemExit: With status 2, after one line on stderr, if the function raises a `UserError` or the command line is
            invalid.
    """
    from jsonargparse import auto_cli

    module = sys.modules["__main__"].__spec__  # None if a file is run
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    with exit_on_user_error():
        auto_cli(commands, exit_on_error=False, prog=program)  # type: ignore[arg-type]  # a dict may hold plain functions


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Report a `UserError`, or jsonargparse's error for an invalid command line, and exit.

    Raises:
        SystemExit: With status 2, after one `error:` line on stderr.
    """
    from jsonargparse import ArgumentError

    try:
        yield
    except UserError as error:
        message = str(error)
    except ArgumentError as error:
        message = parsing_message(error)
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def parsing_message(error: Exception) -> str:
    """Return the message of jsonargparse's error on one line, without the types that it tried."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(noise))
