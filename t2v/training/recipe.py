"""Config files: based on another one, of a run whose folder was moved, or with prompts, in which `${` is text."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from t2v.batch import ESCAPED
from t2v.errors import UserError

_PROMPTS = re.compile(r"--(?:[\w.]+\.)?prompts\+?")
_LITERAL = re.compile(r"(?<!\\)\$\{(?!(?:trainer|model|data|oc)[.:]|ckpt_path\}|seed_everything\})")
"""The beginning of `${...}` that names no key of the config."""


def escape_arguments(args: list[str]) -> list[str]:
    """Return a command line in whose prompts `${` is text, unless it names a key of the config."""
    escaped = []
    is_prompt = False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if is_prompt:
            escaped.append(_escape_text(arg))
        else:
            escaped.append(f"{flag}={_escape_text(value)}" if equals and _PROMPTS.fullmatch(flag) else arg)
        is_prompt = bool(_PROMPTS.fullmatch(arg))
    return escaped


def _escape_text(text: str) -> str:
    return _LITERAL.sub(ESCAPED, text)


def _escape(content: Any, prompt: bool = False) -> Any:
    """Return the content of a config in whose prompts `${` is text."""
    if isinstance(content, dict):
        return {key: _escape(value, prompt or key == "prompts") for key, value in content.items()}
    if isinstance(content, list):
        return [_escape(value, prompt) for value in content]
    return _escape_text(content) if prompt and isinstance(content, str) else content


class RecipeFile(ActionConfigFile):
    """The `--config` of a parser, for files that may name a base.

    ``base: OTHER.yaml`` at the top of a YAML file, a path relative to the file, stands for ``--config OTHER.yaml``
    before the file itself: the file holds only what differs. A base may have a base. A list replaces that of an earlier
    file; jsonargparse alone would give an item the arguments of the earlier item of the same class and place.
    """

    def __call__(  # type: ignore[override]
        self, parser: ArgumentParser, cfg: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Apply the bases of a file, the most general first, and then the file.

        Raises:
            UserError: If a base is missing, or is based on itself.
        """
        for config, content in _with_bases(values, ()):
            _forget_lists(cfg, content)
            super().__call__(parser, cfg, config, option_string)  # type: ignore[no-untyped-call]


def _forget_lists(config: Namespace, replacing: dict[str, Any]) -> None:
    """Empty the lists of a config that the content of another file replaces."""
    for key, value in replacing.items():
        if isinstance(value, list) and isinstance(config.get(key), list):
            config[key] = []
        elif isinstance(value, dict) and isinstance(config.get(key), Namespace):
            _forget_lists(config[key], value)


def _with_bases(value: Any, seen: tuple[Path, ...]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the configs that a config stands for, in the order in which they apply, with the content of each."""
    path = Path(str(value))
    read = _read(str(value))
    if read is None:
        return [(value, {})]
    content = _escape(read)
    if "base" not in content:
        if _is_moved(content, path):
            content = _moved(content, path.parent)
        return [(value if content == read else json.dumps(content), content)]
    base = path.parent / str(content.pop("base"))
    if not base.is_file():
        raise UserError(f"{path} is based on {base}, which is not there: correct its `base`.")
    if base.resolve() in seen:
        raise UserError(f"{path} is based on {base}, which is based on {path.name} again: remove one `base`.")
    return [*_with_bases(base, (*seen, path.resolve())), (json.dumps(content), content)]


def _run_folder(content: dict[str, Any]) -> str:
    """Return the folder in which a run with this config keeps its own config, or an empty string if it has none."""
    trainer = content.get("trainer")
    logger = trainer.get("logger") if isinstance(trainer, dict) else None
    options = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
    parts = [options.get(name) or "" for name in ("save_dir", "name", "version")]
    return os.path.normpath(Path(*parts)) if all(isinstance(part, str) for part in parts) and any(parts) else ""


def _is_moved(content: dict[str, Any], path: Path) -> bool:
    """Return whether a config is the one that a run saved in its folder, and that folder was moved or copied."""
    old = _run_folder(content)
    has_checkpoints = path.name == "config.yaml" and (path.parent / "checkpoints").is_dir()
    return bool(old) and has_checkpoints and path.parent.resolve() != Path(old).resolve()


def _moved(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a run's config with the paths of its folder replaced by those of the folder where it is now.

    If the folder that all stages share was moved too, what is in it is used there.
    """
    old, root = _run_folder(content), os.path.normpath(content["trainer"].get("default_root_dir") or ".")
    inside = os.path.relpath(old, root)
    new_root = str(folder)[: -len(inside) - 1] if str(folder).endswith(f"/{inside}") else ""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replaced(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
            return f"{folder}{value[len(old) :]}"
        if new_root and isinstance(value, str) and (value == root or value.startswith(f"{root}/")):
            moved = f"{new_root}{value[len(root) :]}"
            return moved if Path(moved).exists() or not Path(value).exists() else value
        return value

    content = replaced(content)
    options = content["trainer"]["logger"]["init_args"]
    options |= {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    return content


class _RepeatedKeyError(Exception):
    """A mapping of a YAML file has a key twice, of which YAML would forget the first."""


class _UniqueKeys(yaml.SafeLoader):
    """A loader of YAML that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _RepeatedKeyError(f"{key.value} in line {lines[key.value]} and in line {line}")
            lines[key.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _read(value: str) -> dict[str, Any] | None:
    """Return the content of a YAML file or of a config on the command line.

    Returns:
        None for what is no mapping, which jsonargparse reports, or no file.

    Raises:
        UserError: If a file is not text, or has a key twice.
    """
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        content = yaml.load(text, _UniqueKeys)
    except _RepeatedKeyError as error:
        raise UserError(f"{value} has the key {error}: put all below it in one place.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{value} is not text in UTF-8 ({error.reason}): give a YAML file.") from error
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
