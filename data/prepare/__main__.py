"""The command `python -m data.prepare SOURCE OUT`."""

import io
import sys

from data.prepare import prepare
from t2v.errors import run_tool

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and captions that the terminal cannot show
    run_tool(prepare)
