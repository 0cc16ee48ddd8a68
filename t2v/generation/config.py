"""Samplers, schedules and text encoders as JSON, and back."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.text import TextEncoder

KINDS = (Sampler, Schedule, TextEncoder)


def to_config(part: Any) -> Any:
    """The class and the arguments of a sampler, schedule or text encoder, in JSON's types; other values as they are."""
    if not isinstance(part, KINDS):
        return part
    kind = type(part)
    arguments = {name: to_config(getattr(part, name)) for name in inspect.signature(kind).parameters}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def from_config(config: Any, kind: type) -> Any:
    """Builds what `to_config` described. Only classes that are imported already count: a file cannot name any code.

    Args:
        config: a class and its arguments, or the number that is a constant schedule.
        kind: what it must be: `Sampler`, `Schedule` or `TextEncoder`.

    Raises:
        UserError: if there is no such class of that kind.
    """
    if kind is Schedule and isinstance(config, int | float):
        return config
    known = {path: found for found in _concrete(kind) for path in _paths(found)}
    if config["class_path"] not in known:
        raise UserError(
            f"{config['class_path']} is no known {kind.__name__}: import the module that defines it first. Known are "
            f"{', '.join(sorted({_paths(found)[-1] for found in known.values()}))}."
        )
    arguments = {
        name: from_config(value, Schedule) if isinstance(value, dict) else value
        for name, value in config.get("init_args", {}).items()
    }
    return known[config["class_path"]](**arguments)


def _concrete(kind: type) -> Iterator[type]:
    """The class and all below it that can be built."""
    if not inspect.isabstract(kind):
        yield kind
    below: type
    for below in kind.__subclasses__():
        yield from _concrete(below)


def _paths(kind: type) -> list[str]:
    """The names of a class: in its module, and in the packages above that export it."""
    modules, found = kind.__module__, [f"{kind.__module__}.{kind.__qualname__}"]
    while modules := modules.rpartition(".")[0]:
        if getattr(sys.modules.get(modules), kind.__qualname__, None) is kind:
            found.append(f"{modules}.{kind.__qualname__}")
    return found
