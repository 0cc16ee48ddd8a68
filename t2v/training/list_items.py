"""Flags for one item of a list in the config, such as ``--model.losses.0.weight 2``."""

import json
import re
from typing import Any

import yaml
from jsonargparse import Namespace

from t2v.errors import UserError

_ITEM = re.compile(r"--([A-Za-z_][\w.]*?)\.(\d+)\.([A-Za-z_][\w.]*)")

Item = tuple[str, int, str, str]
"""The key of a list, the number of an item, the key in it, and the value."""


def split_items(args: list[str]) -> tuple[list[str], list[Item]]:
    """Return the flags of a command line that jsonargparse knows, and those for items of lists."""
    others: list[str] = []
    items: list[Item] = []
    given = iter(args)
    for arg in given:
        flag, equals, value = arg.partition("=")
        match = _ITEM.fullmatch(flag)
        if match is None:
            others.append(arg)
        else:
            items.append((match[1], int(match[2]), match[3], value if equals else next(given, "")))
    return others, items


def set_items(config: Namespace, items: list[Item]) -> list[str]:
    """Return flags for whole lists, in which the items are set.

    Args:
        config: The config of the command without the items; it is not changed.
        items: From `split_items`.

    Raises:
        UserError: If there is no such list, or no such item in it.
    """
    lists: dict[str, list[Any]] = {}
    for key, index, inner, value in items:
        if key not in lists:
            found = _find(config, key.split("."))
            if not isinstance(found, list):
                raise UserError(f"--{key}.{index}.{inner} sets an item of {key}, which is no list in this config.")
            lists[key] = [each.clone().as_dict() if isinstance(each, Namespace) else each for each in found]
        if index >= len(lists[key]):
            raise UserError(
                f"--{key}.{index}.{inner} sets item {index} of {key}, which has {len(lists[key])}, counted from 0."
            )
        *path, last = inner.split(".")
        node = lists[key][index]
        for part in path:
            node = _inside(node).setdefault(part, {})
        try:
            _inside(node)[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--{key}.{index}.{inner} has the value {value}, which is no YAML: close its brackets, or put text "
                "with a colon in quotes of its own."
            ) from error
    return [f"--{key}={json.dumps(found, default=str)}" for key, found in lists.items()]


def _find(config: Any, keys: list[str]) -> Any:
    """Return the value at a key, in which `init_args` may be left out, or None."""
    for key in keys:
        if not isinstance(config, Namespace):
            return None
        config = config.get(key) if key in config else (config.get("init_args") or Namespace()).get(key)
    return config


def _inside(node: Any) -> dict[str, Any]:
    """Return the arguments of a class, or a group of options itself."""
    if not isinstance(node, dict):
        raise UserError(f"{node!r} has no options that a flag could set: replace the list in a config file.")
    return node.setdefault("init_args", {}) if "class_path" in node else node
