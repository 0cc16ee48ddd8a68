"""The command `python -m data.inspect SHARDS`."""

from data.inspect import inspect
from t2v.errors import run_tool

if __name__ == "__main__":
    run_tool(inspect)
