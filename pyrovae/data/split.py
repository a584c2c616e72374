"""Part of a data set, held in memory and indexed by rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.arrays import from_torch_dataset, to_tensor
from pyrovae.data.order import Order
from pyrovae.data.preprocess import Preprocess

__all__ = ["Split", "as_split"]

Data = Tensor | tuple[Tensor, ...]
Index = Tensor | slice | Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """Data as stored, and as the model sees them.

    `split[index]` is `split.transform(split.data[index])`. What is drawn afresh at each access is
    drawn by `transform`; what is drawn once is already in `data`.

    Attributes:
        x: Data as stored, with shape `(N, *shape)`, or a tuple of tensors.
        y: Labels, int64 with shape `(N,)`, or None.
        name: "train", "valid", "test", or the name of a file.
        data: What is indexed.
        transform: Rows of `data` to what the model sees.
        log_det: Nats to add to the model's log density for original units, with shape `(N,)`.
        source: Where the data come from, in words.
        treatment: What is done to them, in words.
    """

    x: Data
    y: Tensor | None
    name: str
    data: Data
    transform: Callable[[Any], Any]
    log_det: Tensor
    source: str
    treatment: str

    def __len__(self) -> int:
        return len(self.log_det)

    def __getitem__(self, index: Index) -> Any:
        """What the model sees of some rows, batch dimension kept.

        Args:
            index: Integer tensor or array, slice, or sequence of integers.

        Returns:
            float32, with shape `(len(index), *shape)`; a tuple of tensors where `data` is one.
        """
        return self.transform(_rows(self.data, index))

    @property
    def description(self) -> str:
        """One line: origin, number of data, what is done to them."""
        return f"{self.source}, {len(self):,} {self._noun}, {self.treatment}"

    def subset(self, index: Index) -> Split:
        """Some of the rows, with the values they have here."""
        source = self.source if self.source.startswith("subset") else f"subset of {self.source}"
        return replace(self._map(lambda t: _rows(t, index)), source=source)

    def to(self, device: torch.device | str) -> Split:
        """The same split on a device."""
        moved = self._map(lambda t: _each(t, lambda part: part.to(device)))
        if not isinstance(self.transform, (Preprocess, Labelled)):
            return moved
        return replace(moved, transform=self.transform.to(device))

    def with_labels(self) -> Split:
        """The same data, with their labels as the model's second argument.

        Raises:
            ValueError: If there are none, or they are there already.
        """
        if isinstance(self.data, tuple):
            raise ValueError(f"{self.source} has several tensors already: labels stand beside one")
        if self.y is None:
            raise ValueError(f"{self.source} has no labels: give them as y, one for each datum")
        return replace(self, data=(self.data, self.y), transform=Labelled(self.transform))

    @property
    def parts(self) -> tuple[Split, ...]:
        """The data in parts that the model sees in one way: here all of them."""
        return (self,)

    def order(self, batch_size: int) -> Order:
        """Batches for an epoch of training."""
        return Order(torch.arange(len(self)), min(batch_size, len(self)))

    @property
    def _noun(self) -> str:
        return "images" if isinstance(self.x, Tensor) and self.x.ndim == 4 else "rows"

    def _map(self, function: Callable[[Any], Any]) -> Split:
        x = function(self.x)
        data = x if self.data is self.x else function(self.data)
        y = None if self.y is None else function(self.y)
        return replace(self, x=x, y=y, data=data, log_det=function(self.log_det))


@dataclass(frozen=True)
class Labelled:
    """A transform of data that lets the labels beside them pass.

    Attributes:
        transform: Of the data.
    """

    transform: Callable[[Any], Any]

    def __call__(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the model sees of data and labels."""
        return self.transform(data[0]), data[1]

    def to(self, device: torch.device | str) -> Labelled:
        """The same on a device."""
        inner = self.transform
        return Labelled(inner.to(device)) if isinstance(inner, Preprocess) else self


def as_split(x: Split | Tensor | np.ndarray | tuple | torch.utils.data.Dataset) -> Split:
    """Data of any form as a split that the model sees as they are.

    Args:
        x: A split, returned as it is; a tensor or array with shape `(N, *shape)`; a tuple of them
            with the same N; or a torch data set, whose items are stacked once, labels kept in `y`.
            Integers become float32 when indexed, except int64 labels, by which we mean what
            follows the first tensor of a tuple. Floats keep their type.

    Raises:
        TypeError: If x is none of these.
        ValueError: If x is empty, or the lengths differ.
    """
    if isinstance(x, Split):
        return x
    if isinstance(x, tuple):
        return _plain(_same_length(tuple(to_tensor(part, f"x[{i}]") for i, part in enumerate(x))))
    if isinstance(x, torch.utils.data.Dataset):
        return _plain(*from_torch_dataset(x))
    if isinstance(x, (Tensor, np.ndarray)):
        return _plain(to_tensor(x, "x"))
    raise TypeError(
        "x: expected a Split, a tensor, an array, a tuple of tensors or a torch Dataset, got "
        f"{type(x).__name__}; read files with data.load"
    )


def dynamic_split(
    x: Tensor, y: Tensor | None, name: str, preprocess: Preprocess, source: str
) -> Split:
    """A split whose noise is drawn afresh at each access."""
    log_det = preprocess.log_det(x)
    return Split(x, y, name, x, preprocess, log_det, source, preprocess.describe("train"))


def fixed_split(
    x: Tensor, y: Tensor | None, name: str, preprocess: Preprocess, source: str, stream: str
) -> Split:
    """A split whose noise is drawn once, by the seed and the name of a stream."""
    has_nan = preprocess.missing and x.is_floating_point()
    compact = preprocess.kind == "binary" and not has_nan
    seed = zlib.crc32(f"{stream} {preprocess.seed}".encode())
    data = preprocess.fix(x, seed, torch.uint8 if compact else torch.float32)
    treatment = preprocess.describe("fixed")
    return Split(x, y, name, data, to_float32, preprocess.log_det(x), source, treatment)


def to_float32(x: Tensor) -> Tensor:
    """The same values as float32."""
    return x.to(torch.float32)


def _plain(x: Data, y: Tensor | None = None) -> Split:
    first = x[0] if isinstance(x, tuple) else x
    transform: Callable[[Any], Any] = _floats_and_labels if isinstance(x, tuple) else _floats
    if isinstance(x, tuple) and len(x) == 2 and x[1].dtype == torch.int64:
        transform = Labelled(_floats)
    log_det = torch.zeros(len(first), device=first.device)
    return Split(x, y, "data", x, transform, log_det, "data given", "as they are")


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else to_float32(x)


def _floats_and_labels(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _floats(x[0]), *(t if t.dtype == torch.int64 else _floats(t) for t in x[1:])


def _same_length(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ValueError(f"x: expected tensors with the same first dimension, got {lengths}")
    return parts


def _rows(data: Data, index: Index) -> Data:
    # As a tensor, since a tensor takes a tuple for one index per dimension.
    if isinstance(index, (Sequence, np.ndarray)):
        index = torch.as_tensor(index, dtype=None if len(index) else torch.int64)
    return _each(data, lambda part: part[index])


def _each(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, data)) if isinstance(data, tuple) else function(data)
