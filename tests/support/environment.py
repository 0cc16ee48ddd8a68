"""A fresh virtual environment with the wheel of this checkout and its dependencies, made without a network."""

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout in a copy of its tracked files, so that the checkout gains no build folder."""
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "t2v", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """Create an environment that holds the wheel and what it requires, without extras.

    The required distributions are linked from the running environment, which takes a second where installing PyTorch
    would take minutes. Distributions that the wheel does not require, directly or indirectly, cannot be imported.

    Args:
        wheel: The wheel to install.
        folder: Where the environment goes; it must not exist.

    Returns:
        The environment's Python.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, env=_own_environment())
    for required in _required_by(Distribution.at(next(site.glob("t2v-*.dist-info")))):
        _link(required, site)
    return python


def run(python: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python, without the variables that would let it find other packages."""
    command = [str(argument) for argument in (python, *arguments)]
    return subprocess.run(command, cwd=cwd, env=_own_environment(), capture_output=True, text=True, timeout=300)


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def _required_by(package: Distribution) -> list[Distribution]:
    """All distributions that a distribution requires, directly or through others."""
    found: dict[str, Distribution] = {}
    waiting = [(package, frozenset[str]())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        current, extras = waiting.pop()
        for line in current.requires or []:
            requirement = Requirement(line)
            active = any(
                requirement.marker is None or requirement.marker.evaluate({"extra": extra})
                for extra in (extras or {""})
            )
            key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if not active or key in seen:
                continue
            seen.add(key)
            try:
                required = distribution(requirement.name)
            except PackageNotFoundError:
                continue  # checked by the imports that follow
            assert requirement.specifier.contains(required.version, prereleases=True), line
            found[key[0]] = required
            waiting.append((required, key[1]))
    return list(found.values())


def _link(package: Distribution, site: Path) -> None:
    """Link a distribution's files into a folder of packages: whole folders where nothing else is in them."""
    for file in package.files or []:
        target = Path(str(package.locate_file(file))).resolve()
        if file.parts[0] == ".." or not target.exists():
            continue
        link = site / file
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
