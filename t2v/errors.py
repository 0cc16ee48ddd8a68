"""The one exception that a user's mistake raises, and how a command tells it."""

import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, told in one sentence.

    The message names the value, the limit, the likely cause and what to change. Commands print it without a traceback
    and exit with status 2.
    """


def run_tool(function: Callable[..., Any]) -> None:
    """Run a typed function as a command: its signature is the flags, its docstring is the help.

    Args:
        function: what the command does; its required arguments are positional on the command line.

    Raises:
        SystemExit: with status 2, after one line on stderr, where the function raises a `UserError`.
    """
    from jsonargparse import auto_cli

    try:
        auto_cli(function)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
