"""The modules that Pyro functions belong to or run, and leaving them as they were."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn

PyroFunction = Callable[..., Any]


def owners(*functions: PyroFunction) -> list[nn.Module]:
    """The modules that Pyro functions belong to; none for plain functions."""
    return _unique(m for fn in functions for m in _owners(fn))


def modules(*functions: PyroFunction) -> list[nn.Module]:
    """The modules that Pyro functions run: their owners, and those a plain function refers to."""
    return _unique([*owners(*functions), *(m for fn in functions for m in _referred(fn))])


@contextmanager
def in_mode(training: bool, *functions: PyroFunction) -> Iterator[None]:
    """Training or evaluation mode (dropout, batch statistics); each module's own comes back."""
    all_modules = _unique(m for module in modules(*functions) for m in module.modules())
    modes = [module.training for module in all_modules]
    try:
        for module in all_modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(all_modules, modes, strict=True):
            module.training = mode


@contextmanager
def undisturbed(*functions: PyroFunction, buffers: bool = True) -> Iterator[None]:
    """Put back the random state and, if `buffers`, the modules' buffers afterwards."""
    kept = [b for module in modules(*functions) for b in module.buffers()] if buffers else []
    saved = [b.clone() for b in kept]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(kept, saved, strict=True):
                    if not torch.equal(buffer, value):  # a write voids graphs that hold the buffer
                        buffer.copy_(value)


@contextmanager
def store_kept() -> Iterator[None]:
    """Take what was added to Pyro's parameter store out of it afterwards."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - before:
            del store[name]


@contextmanager
def validation(on: bool) -> Iterator[None]:
    """Pyro's and torch's validation on or off; each comes back as it was."""
    of_torch = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(on):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(of_torch)


def _owners(fn: PyroFunction) -> list[nn.Module]:
    """The modules a function belongs to: itself, what its method is bound to, what it wraps."""
    if isinstance(fn, nn.Module):
        return [fn]
    if inspect.ismethod(fn):
        return [fn.__self__] if isinstance(fn.__self__, nn.Module) else []
    if isinstance(fn, functools.partial):
        inner = [fn.func, *fn.args, *(fn.keywords or {}).values()]
        return [m for item in inner if callable(item) for m in _owners(item)]
    return []


LIBRARIES = ("builtins", "functools", "numpy", "pyro", "pyrovae", "torch")
"""What their functions refer to is none of a program's modules."""

MANY = 1000
"""A container of more items holds data, not modules."""


def _referred(fn: PyroFunction) -> Iterator[nn.Module]:
    """Modules reached from a plain function: by closure, globals, defaults, what it is bound to."""
    seen: dict[int, Any] = {}
    ahead: list[Any] = [fn]
    while ahead:
        item = ahead.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            yield item
        else:
            ahead.extend(_references(item))


def _references(item: Any) -> Iterable[Any]:
    if inspect.ismethod(item):
        return [item.__self__, item.__func__]
    if inspect.isfunction(item):
        return _variables(item)
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, dict):
        return list(item.values()) if len(item) <= MANY else []
    if isinstance(item, (list, tuple, set)):
        return item if len(item) <= MANY else []
    if isinstance(item, (type, types.ModuleType)) or _is_library(type(item)):
        return []
    call = getattr(type(item), "__call__", None)  # noqa: B004 (the function itself is wanted)
    return [*getattr(item, "__dict__", {}).values(), *([call] if inspect.isfunction(call) else [])]


def _variables(fn: types.FunctionType) -> list[Any]:
    """Values that a function's code, and the code of functions inside it, may use."""
    if _is_library(fn):
        return []
    cells = []
    for cell in fn.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    names = _names(fn.__code__)
    used = [value for name, value in fn.__globals__.items() if name in names]
    return [*cells, *used, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_library(item: Any) -> bool:
    return (getattr(item, "__module__", None) or "").partition(".")[0] in LIBRARIES


def _unique(items: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(item): item for item in items}.values())
