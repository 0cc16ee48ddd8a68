"""The command `python -m data.inspect SHARDS`."""

from data.inspect import inspect
from t2v.errors import run_tool

run_tool(inspect)
