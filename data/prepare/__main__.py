"""The command `python -m data.prepare SOURCE OUT`."""

from data.prepare import prepare
from t2v.errors import run_tool

if __name__ == "__main__":
    run_tool(prepare)
