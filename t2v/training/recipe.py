"""Config files that are based on another one."""

import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from t2v.errors import UserError


class RecipeFile(ActionConfigFile):
    """The `--config` of a parser, for files that may name a base.

    ``base: OTHER.yaml`` at the top of a YAML file, a path relative to the file, stands for ``--config OTHER.yaml``
    before the file itself: the file holds only what differs. A base may have a base.
    """

    def __call__(  # type: ignore[override]
        self, parser: ArgumentParser, cfg: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Apply the bases of a file, the most general first, and then the file.

        Raises:
            UserError: If a base is missing, or is based on itself.
        """
        for config in _with_bases(values, ()):
            super().__call__(parser, cfg, config, option_string)  # type: ignore[no-untyped-call]


def _with_bases(value: Any, seen: tuple[Path, ...]) -> list[Any]:
    """Return the configs that a config stands for, in the order in which they apply."""
    path = Path(str(value))
    content = _read(path)
    if content is None or "base" not in content:
        return [value]
    base = path.parent / str(content.pop("base"))
    if not base.is_file():
        raise UserError(f"{path} is based on {base}, which is not there: correct its `base`.")
    if base.resolve() in seen:
        raise UserError(f"{path} is based on {base}, which is based on {path.name} again: remove one `base`.")
    return [*_with_bases(base, (*seen, path.resolve())), json.dumps(content)]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a YAML file; None for what is no mapping, which jsonargparse reports, or no file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
