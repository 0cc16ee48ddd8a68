"""The exception for a user's mistake, and how a command reports it."""

import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, reported in one sentence.

    The message names the value, the limit, the likely cause and what to change. Commands print it without a traceback
    and exit with status 2.
    """


def run_tool(commands: Callable[..., Any] | dict[str, Callable[..., Any]], program: str | None = None) -> None:
    """Run typed functions as a command: the signature gives the flags, the docstring gives the help.

    Args:
        commands: One function, or several as subcommands by name; required arguments are positional on the command
            line.
        program: Name of the command in its help; by default the name of the script.

    Raises:
        SystemExit: With status 2, after one line on stderr, if the function raises a `UserError`.
    """
    from jsonargparse import auto_cli

    try:
        auto_cli(commands, **({"prog": program} if program else {}))  # type: ignore[arg-type]
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
