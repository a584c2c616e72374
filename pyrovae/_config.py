"""Objects that remember how they were made, so that a saved model is rebuilt without pickle.

A configuration is `{"class_path": "module.Class", "init_args": {...}}`, nested and plain JSON: the
form in which the command line takes parts.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

Config = dict[str, Any]


class Configurable:
    """Base of everything that a configuration names: it keeps the arguments it was made with."""

    _init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the object and note the arguments of its constructor."""
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        object.__setattr__(self, "_init_args", given)
        return self


def to_config(value: Any) -> Any:
    """The configuration of an object, or a plain value as JSON has it.

    Raises:
        TypeError: If the object, or one it was made with, cannot be written as JSON.
    """
    if isinstance(value, Configurable):
        kind = type(value)
        args = {name: to_config(arg) for name, arg in value._init_args.items()}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": args}
    if isinstance(value, (list, tuple)):
        return [to_config(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be rebuilt from a configuration")


def from_config(config: Any) -> Any:
    """The object that a configuration describes: the inverse of `to_config`.

    Raises:
        ValueError: If a class is not found, is not `Configurable`, or refuses its arguments.
    """
    if isinstance(config, list):
        return tuple(from_config(item) for item in config)
    if not isinstance(config, dict):
        return config
    path, init_args = config.get("class_path", ""), config.get("init_args", {})
    args = {name: from_config(arg) for name, arg in init_args.items()}
    try:
        return _find(path)(**args)
    except TypeError as error:
        raise ValueError(f"{path} does not take the arguments saved with it: {error}") from error


def _find(class_path: str) -> type[Configurable]:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the class {class_path!r} of a saved model is not found ({error}): put its module on "
            "the Python path, or rebuild the model yourself and call load(path, vae)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Configurable)):
        raise ValueError(f"{class_path!r} is not a part of a pyrovae model")
    return found


def shape_of(shape: Iterable[int] | int, argument: str) -> tuple[int, ...]:
    """A shape as a tuple of positive integers.

    Raises:
        ValueError: If a size is less than one.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{argument} must be positive integers, got {shape}")
    return sizes
