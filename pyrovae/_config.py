"""Objects that remember how they were made, so that a saved model is rebuilt without pickle.

A configuration is `{"class_path": "module.Class", "init_args": {...}}`, nested and plain JSON: the
form in which a run's settings hold parts, too.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

Config = dict[str, Any]


class Configurable:
    """Base of everything that a configuration names: it keeps the arguments it was made with."""

    _init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the object and note the arguments of its constructor."""
        self = super().__new__(cls)
        object.__setattr__(self, "_init_args", _by_name(cls, args, kwargs))
        return self


def to_config(value: Any) -> Any:
    """The configuration of an object, or a plain value as JSON has it.

    Raises:
        TypeError: If the object, or one it was made with, cannot be written as JSON or is not found
            under the name of its class, or a part was replaced after the object was made.
    """
    if isinstance(value, Configurable):
        kind = type(value)
        path = class_path(kind)
        if "." in kind.__qualname__ or not _is_found(path, kind):
            raise TypeError(f"{path} is not at the top of a module: nobody can find it again")
        if isinstance(value, nn.Module):
            _check_unchanged(value)
        args = {name: to_config(arg) for name, arg in value._init_args.items()}
        return {"class_path": path, "init_args": args}
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
    path, init_args = config.get("class_path"), config.get("init_args", {})
    if not isinstance(path, str) or not isinstance(init_args, dict):
        raise ValueError(f"expected class_path and init_args in a configuration, got {config}")
    part = find_class(path)
    args = {name: from_config(arg) for name, arg in init_args.items()}
    try:
        return part(**args)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} does not take the arguments saved with it: {error}") from error


def parameters(part: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class by name; `*args` and `**kwargs` stand for those of the next base."""
    found: dict[str, inspect.Parameter] = {}
    for base in _constructors(part):
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        variable = [p for p in own if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found |= {p.name: p for p in own if p not in variable and p.name not in found}
        if not variable:
            break
    return found


def _by_name(part: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and named arguments, all by name, also where a subclass passes `*args` on."""
    given: dict[str, Any] = {}
    for base in _constructors(part):
        signature = inspect.signature(base.__init__)
        bound = signature.bind_partial(None, *args, **kwargs).arguments
        kinds = {p.kind: name for name, p in signature.parameters.items()}
        args = bound.pop(kinds.get(inspect.Parameter.VAR_POSITIONAL, ""), ())
        kwargs = bound.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {})
        given |= dict(list(bound.items())[1:])
        if not args and not kwargs:
            break
    return given


def _constructors(part: type) -> list[Any]:
    """Classes that define a constructor, in the order in which `super().__init__` calls them."""
    return [base for base in part.__mro__ if "__init__" in vars(base) and base is not object]


def _check_unchanged(module: nn.Module) -> None:
    within = set(module.modules())
    for name, arg in getattr(module, "_init_args", {}).items():
        parts = arg if isinstance(arg, (list, tuple)) else [arg]
        if any(isinstance(part, nn.Module) and part not in within for part in parts):
            raise TypeError(f"{name} was replaced after {type(module).__name__} was made")


def _is_found(path: str, kind: type) -> bool:
    try:
        return find_class(path) is kind
    except ValueError:
        return False


def class_path(kind: type) -> str:
    """The name under which users know a class: `pyrovae.guides.Normal`, wherever it is written."""
    module = kind.__module__
    while (parent := module.rpartition(".")[0]) in sys.modules:
        if getattr(sys.modules[parent], kind.__qualname__, None) is not kind:
            break
        module = parent
    return f"{module}.{kind.__qualname__}"


def find_class(path: str) -> type[Configurable]:
    """The class of a configuration.

    Raises:
        ValueError: If it is not found, or no `Configurable`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(
            f"the class {path!r} of a saved model is not found ({error}): put its module on "
            "the Python path, or rebuild the model yourself and call load(path, vae)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Configurable)):
        raise ValueError(f"{path!r} is not a part of a pyrovae model")
    return found


def shape_of(shape: Iterable[int] | int, argument: str) -> tuple[int, ...]:
    """A shape as a tuple of positive integers.

    Raises:
        ValueError: If a size is less than one.
    """
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{argument} must be positive integers, got {shape}")
    return sizes
