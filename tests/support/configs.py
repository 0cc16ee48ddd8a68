"""The shipped config files."""

from pathlib import Path
from typing import Any

import yaml


def read(path: Path) -> dict[str, Any]:
    """Return a recipe merged with its base."""
    content = yaml.safe_load(path.read_text())
    base = content.pop("base", None)
    return merge(read(path.parent / base), content) if base else content


def merge(general: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    merged = dict(general)
    for name, value in special.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def transformer_arguments(size: str) -> dict[str, Any]:
    """Return the arguments of the transformer of `configs/transformer/SIZE.yaml`, built on the meta device."""
    content = read(Path(__file__).parents[2] / f"configs/transformer/{size}.yaml")
    return {**content["model"]["init_args"]["model"]["init_args"], "device": "meta"}
