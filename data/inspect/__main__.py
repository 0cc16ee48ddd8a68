"""The command `python -m data.inspect SHARDS`."""

import io
import sys

from data.inspect import inspect
from t2v.errors import run_tool

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and captions that the terminal cannot show
    run_tool(inspect)
