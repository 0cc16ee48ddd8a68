"""Objects as JSON: the path of their class and the arguments they were built with."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from t2v.errors import UserError


def import_modules(args: list[str]) -> list[str]:
    """Import the modules that a command line names by `--import MODULE`, so that their classes are known.

    Checkpoints and exported models name classes of a user's own by their class path. Nothing is imported for a name in
    a file; this is how a user asks for it.

    Args:
        args: The command line.

    Returns:
        The command line without these flags.

    Raises:
        UserError: If there is no such module.
    """
    others, names = [], []
    given = iter(args)
    for arg in given:
        flag, equals, name = arg.partition("=")
        if flag != "--import":
            others.append(arg)
        elif equals or (name := next(given, "")):
            names.append(name)
    folder = str(Path.cwd())
    if names and folder not in sys.path:
        sys.path.append(folder)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--import {name} cannot be imported ({error}): give a module of the working folder or of an installed "
                "package, such as own.quantizers."
            ) from error
    return others


def to_config(value: Any) -> Any:
    """Return an object as `{"class_path": ..., "init_args": {...}}`; numbers, strings and lists are returned unchanged.

    Args:
        value: A value of a type that JSON has, or an object that keeps every argument of `__init__` as an attribute of
            the same name.

    Raises:
        TypeError: If the value is of a built-in type that JSON does not have.
    """
    if value is None or isinstance(value, bool | int | float | str | list):
        return value
    cls = type(value)
    if cls.__module__ == "builtins":
        raise TypeError(f"{value!r} is of type {cls.__name__}, which JSON does not have.")
    arguments = {name: to_config(getattr(value, name)) for name in inspect.signature(cls).parameters}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def from_config(config: Any, base_class: type) -> Any:
    """Build the object that `to_config` described.

    Only subclasses that are already imported can be built, so that a file cannot run other code. An argument that is
    an object itself must be of the class in the type hint of that argument.

    Args:
        config: Class path and arguments, or a number, which is returned unchanged (a constant schedule).
        base_class: The object is of this class or of a subclass.

    Raises:
        UserError: If no subclass of `base_class` has this class path.
    """
    if isinstance(config, int | float):
        return config
    classes = {path: cls for cls in _concrete_subclasses(base_class) for path in _class_paths(cls)}
    class_path = config["class_path"]
    if class_path not in classes:
        known = sorted({_class_paths(cls)[-1] for cls in classes.values()})
        raise UserError(
            f"class_path={class_path} is not a known {base_class.__name__}: import the module that defines it first, "
            f"on the command line by --import {class_path.rpartition('.')[0]}, or choose one of {', '.join(known)}."
        )
    cls = classes[class_path]
    arguments = dict(config.get("init_args", {}))
    parameters = inspect.signature(cls, eval_str=True).parameters
    for name, value in arguments.items():
        if isinstance(value, dict):
            arguments[name] = from_config(value, _class_in_hint(parameters[name].annotation))
    return cls(**arguments)


def _class_in_hint(hint: Any) -> type:
    """Return the class in a type hint such as `float | Schedule` that is not a built-in."""
    return next(cls for cls in get_args(hint) or (hint,) if isinstance(cls, type) and cls.__module__ != "builtins")


def _concrete_subclasses(cls: type) -> Iterator[type]:
    """Yield a class and all its subclasses, except abstract ones."""
    if not inspect.isabstract(cls):
        yield cls
    subclass: type
    for subclass in cls.__subclasses__():
        yield from _concrete_subclasses(subclass)


def _class_paths(cls: type) -> list[str]:
    """Return the paths of a class: in its module, then in the parent packages that export it."""
    paths = [f"{cls.__module__}.{cls.__qualname__}"]
    package = cls.__module__.rpartition(".")[0]
    while package:
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            paths.append(f"{package}.{cls.__qualname__}")
        package = package.rpartition(".")[0]
    return paths
