"""Progress of long steps: a bar in a terminal, a line every 15 seconds elsewhere, such as in the log of a job."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_SECONDS = 15.0
_LINES = {
    "delay": _SECONDS,  # a short step prints nothing
    "mininterval": _SECONDS,
    "maxinterval": _SECONDS,
    "bar_format": "{desc} {n_fmt}/{total_fmt}, {remaining} left",
}


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar on the standard error, with lines in its place where that is not a terminal; takes its arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options if sys.stderr.isatty() else {**_LINES, **options}))

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that shows a state of the bar."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text.strip():
                print(text, file=file, flush=True)

        return print_line
