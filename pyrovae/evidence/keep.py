"""What is done of a long estimate, in a file: killed and started again, it goes on from there.

The noise of a block is keyed by the seed and the block, so blocks from before a stop and from after
it come to what an undisturbed run comes to, bit for bit on the same machine. The file says what it
is a part of, and is taken up by nothing else. It holds tensors and JSON: reading it runs no code.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae import _processes
from pyrovae.checkpoint import read_tensors, write_tensors
from pyrovae.evidence.result import LogPx

EVERY = 5.0
"""Seconds between two writes, at least."""

Identity = dict[str, Any]


class OtherEstimate(ValueError):
    """A file holds part of an estimate that differs from the one asked for."""


class Kept:
    """The blocks of one estimate that are done, in memory and in a file.

    Several processes write a file each, and read those of all.

    Args:
        path: The file; it need not be there.
        identity: What the estimate is of and made with, by words for it. Numbers that are not
            whole are compared up to rounding.
        shared: Whether processes estimate together; then all must call.

    Attributes:
        found: What was made of each block, by its number.

    Raises:
        OtherEstimate: If the file, or the one of another process, is of another estimate.
    """

    def __init__(self, path: str | Path, identity: Identity, shared: bool = False):
        self.path, self.identity = Path(path), json.loads(json.dumps(identity, default=repr))
        self.found: dict[int, Any] = {}
        try:
            for file in files(path):
                self.found |= self._read(file)
            reason = ""
        except ValueError as error:
            reason = str(error)
        everyones = _processes.gather((reason, self.found)) if shared else [(reason, self.found)]
        if reasons := [reason for reason, _ in everyones if reason]:
            raise OtherEstimate(reasons[0])
        self.found = {n: made for _, theirs in everyones for n, made in theirs.items()}
        self._num_written, self._written = len(self.found), time.monotonic()

    def save(self, at_once: bool = True) -> None:
        """Write the file if there is something new; if not `at_once`, every few seconds."""
        late = time.monotonic() - self._written >= EVERY
        if len(self.found) > self._num_written and (at_once or late):
            self._write()
            self._num_written, self._written = len(self.found), time.monotonic()

    def _write(self) -> None:
        columns: list[list[Tensor]] = []
        for made in self.found.values():
            tensors: list[Tensor] = []
            form = _taken_apart(made, tensors)
            columns = columns or [[] for _ in tensors]
            for column, tensor in zip(columns, tensors, strict=True):
                column.append(tensor)
        stored = {"numbers": torch.tensor(list(self.found))}
        for i, column in enumerate(columns):
            stored[f"{i}.sizes"] = torch.tensor([tensor.shape[0] for tensor in column])
            stored[f"{i}"] = torch.cat(column)
        rank = _processes.rank()
        own = self.path.with_name(f"{self.path.name}.{rank}") if rank else self.path
        metadata = {"estimate": json.dumps(self.identity), "form": json.dumps(form)}
        write_tensors(own, stored, metadata)

    def _read(self, file: Path) -> dict[int, Any]:
        stored, metadata = read_tensors(file)
        if "estimate" not in metadata:
            raise ValueError(f"{file} is no part of an estimate")
        theirs = json.loads(metadata["estimate"])
        names = dict.fromkeys([*self.identity, *theirs])
        differing = [n for n in names if not _alike(self.identity.get(n), theirs.get(n))]
        if differing:
            raise ValueError(f"{file} is part of an estimate with other {', '.join(differing)}")
        form, numbers = json.loads(metadata["form"]), stored.pop("numbers").tolist()
        count = sum(name.endswith(".sizes") for name in stored)
        columns = [stored[f"{i}"].split(stored[f"{i}.sizes"].tolist()) for i in range(count)]
        blocks = zip(*columns, strict=True)
        return {n: _put_together(form, block) for n, block in zip(numbers, blocks, strict=True)}


def files(path: str | Path) -> list[Path]:
    """The file of an estimate and those of the other processes, as far as they are there."""
    path = Path(path)
    others = path.parent.glob(f"{glob.escape(path.name)}.[0-9]*")
    return [file for file in (path, *sorted(others)) if file.exists()]


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The form of a value as JSON; tensors and fractions, which differ by block, go to a list."""
    if isinstance(value, LogPx):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"log_px": {name: _taken_apart(part, tensors) for name, part in parts.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_taken_apart(part, tensors) for part in value]}
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1, "device": value.device.type}
    if isinstance(value, float):
        tensors.append(torch.tensor([value], dtype=torch.float64))
        return {"number": len(tensors) - 1}
    return {"plain": value}


def _put_together(form: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The value of this form: the inverse of `_taken_apart`."""
    if "log_px" in form:
        return LogPx(**{n: _put_together(part, tensors) for n, part in form["log_px"].items()})
    if "tuple" in form:
        return tuple(_put_together(part, tensors) for part in form["tuple"])
    if "tensor" in form:
        return tensors[form["tensor"]].to(form["device"])
    return float(tensors[form["number"]]) if "number" in form else form["plain"]


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether two plain values are the same, a list of fractions up to rounding."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return np.allclose(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    return bool(mine == theirs)
