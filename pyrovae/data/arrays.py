"""Arrays of any origin as tensors, and what kind of values they hold.

Here are the checks that data pass once, on their way in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.preprocess import KINDS, one_of

__all__ = ["Arrays"]

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Arrays:
    """A whole data set before it is split.

    Attributes:
        name: Of the set or file.
        x: Data, with shape `(N, *shape)`.
        y: Labels, int64 with shape `(N,)`, or None.
        rows: Rows of each split, or None where the set does not say.
        kind: How the values are read, where the set says.
        max_value: Largest grey value or level, where the set says.
        binarize: The set's default.
    """

    name: str
    x: Tensor
    y: Tensor | None = None
    rows: dict[str, Tensor] | None = None
    kind: str | None = None
    max_value: float | None = None
    binarize: str = "none"

    def take(self, rows: Tensor) -> Arrays:
        """The data and labels of some rows, without splits."""
        return replace(self, x=self.x[rows], y=None if self.y is None else self.y[rows], rows=None)


def to_tensor(x: Any, name: str) -> Tensor:
    """Numbers as a tensor with a batch dimension: bool becomes uint8, odd integers int64.

    Raises:
        ValueError: If x is complex, not numeric, a single number, or empty.
    """
    tensor = x.detach() if isinstance(x, Tensor) else _from_numpy(np.asarray(x), name)
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers, got dtype {tensor.dtype}; pass two parts")
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(
            f"{name}: expected data of shape (N, ...), got shape {tuple(tensor.shape)}; "
            "give at least one datum with at least one entry"
        )
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    odd = not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.int64)
    return tensor.to(torch.int64) if odd else tensor


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise ValueError(
            f"{name}: expected numbers, got dtype {array.dtype}; convert it to numbers first"
        )
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # A copy in native byte order: torch warns about read-only memory and refuses negative strides.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def to_labels(y: Any, count: int, name: str) -> Tensor:
    """Labels as int64 with shape `(count,)`.

    Raises:
        ValueError: If y has another shape or is not made of whole numbers.
    """
    labels = to_tensor(y, name)
    if labels.shape != (count,):
        raise ValueError(
            f"{name}: expected labels of shape ({count},), one per datum, "
            f"got {tuple(labels.shape)}; give class indices"
        )
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise ValueError(f"{name}: expected whole numbers, got {labels.dtype}; give class indices")
    return labels.to(torch.int64)


def from_torch_dataset(dataset: torch.utils.data.Dataset) -> tuple[Tensor, Tensor | None]:
    """The items of a torch data set, stacked: tensors, arrays, or pairs of one with a label.

    Raises:
        ValueError: If there are no items, or their forms differ.
    """
    items = [_pair(item) for item in _items(dataset)]
    if not items:
        raise ValueError("dataset: expected items, got none; check its files or its filter")
    xs, ys = zip(*items, strict=True)
    for i, x in enumerate(xs):
        if x.shape != xs[0].shape:
            raise ValueError(
                f"dataset: expected items of one shape, got {tuple(xs[0].shape)} at 0 and "
                f"{tuple(x.shape)} at {i}; resize or crop them"
            )
    if all(y is None for y in ys):
        return to_tensor(torch.stack(xs), "dataset"), None
    return to_tensor(torch.stack(xs), "dataset"), to_labels(np.array(ys), len(xs), "labels")


def _items(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset
    return (dataset[i] for i in range(len(dataset)))


def _pair(item: Any) -> tuple[Tensor, Any]:
    parts = item if isinstance(item, (tuple, list)) else (item,)
    if isinstance(item, dict) or len(parts) not in (1, 2):
        raise ValueError(
            f"dataset: expected items x or (x, y), got {type(item).__name__}; wrap the data set"
        )
    x = to_tensor(parts[0][None] if isinstance(parts[0], Tensor) else [parts[0]], "item")[0]
    y = parts[1] if len(parts) == 2 else None
    return x, y.item() if isinstance(y, Tensor) and y.ndim == 0 else y


def detect_kind(x: Tensor) -> str:
    """How values are read when nobody says.

    Only zeros and ones are binary; uint8, and floats in [0, 1] with two or more dimensions per
    datum, are grey; other integers from zero on are counts; everything else is real.
    """
    values = _observed(x)
    if bool(((values == 0) | (values == 1)).all()):
        return "binary"
    low, high = values.min(), values.max()
    if x.dtype == torch.uint8 or (x.is_floating_point() and x.ndim > 2 and low >= 0 and high <= 1):
        return "grey"
    return "counts" if not x.is_floating_point() and low >= 0 else "real"


def detect_max_value(x: Tensor, kind: str) -> float:
    """Largest grey value: 255 or 65535 for levels, 1.0 for floats in [0, 1] and other kinds."""
    if kind not in ("grey", "levels"):
        return 1.0
    high = _observed(x).max()
    if high <= 1 and (x.is_floating_point() or kind == "levels"):
        return 1.0
    return 255.0 if high <= 255 else 65535.0


def check_values(x: Tensor, kind: str, max_value: float, name: str) -> None:
    """Raise a `ValueError` unless all values, known to be finite, are what the kind allows."""
    one_of("kind", kind, KINDS)
    values = _observed(x)
    low, high = values.min().item(), values.max().item()
    levels = max_value > 1 and low >= 0 and high <= max_value
    whole = not x.is_floating_point() or bool((values == values.round()).all())
    expected, valid = {
        "binary": ("0 and 1", whole and low >= 0 and high <= 1),
        "grey": _grey(max_value, whole, low, high),
        "levels": (f"whole levels from 0 to {max(max_value, 255):g}", whole and levels),
        "counts": ("whole numbers from 0 on", whole and low >= 0),
        "real": ("numbers", True),
    }[kind]
    if not valid:
        raise ValueError(
            f"{name}: expected {kind} data, {expected}, got {'whole' if whole else 'fractional'} "
            f"values from {low:g} to {high:g}; convert them, or read them as another kind"
        )


def check_finite(x: Tensor, missing: bool, name: str) -> None:
    """Raise a `ValueError` for infinite values, for NaN unless missing, and for nothing but NaN."""
    if not x.is_floating_point():
        return
    if bool(x.isinf().any()):
        count = int(x.isinf().sum())
        raise ValueError(f"{name}: expected finite values, got {count:,} infinite; remove them")
    nan = x.isnan()
    if not missing and bool(nan.any()):
        rows = int(nan.reshape(len(x), -1).any(1).sum())
        raise ValueError(
            f"{name}: expected no NaN, got {int(nan.sum()):,} in {rows:,} of {len(x):,} data; "
            "pass missing=True (--missing) if NaN marks a missing entry"
        )
    if bool(nan.all()):
        raise ValueError(f"{name}: expected values, got nothing but NaN; check how it was written")


def _grey(max_value: float, whole: bool, low: float, high: float) -> tuple[str, bool]:
    within = low >= 0 and high <= max_value
    if max_value == 1:
        return "values in [0, 1]", within
    return f"whole levels from 0 to {max_value:g}", within and whole


def to_layout(x: Tensor, kind: str) -> Tensor:
    """Scalars as `(N, 1)`, images as `(N, C, H, W)`.

    Binary images, grey ones and levels come with channels last or first; channels are last when the
    last dimension is 1, 3 or 4 and the first one is not.
    """
    if x.ndim == 1 or x.ndim == 3:
        return x.unsqueeze(1)
    pixels = x.ndim == 4 and kind in ("binary", "grey", "levels")
    if pixels and x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS:
        return x.movedim(-1, 1).contiguous()
    return x


def _observed(x: Tensor) -> Tensor:
    return x[~x.isnan()] if x.is_floating_point() else x.flatten()
