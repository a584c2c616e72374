"""Data with labels for some."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.order import Order
from pyrovae.data.split import Data, Labelled, Split

UNKNOWN = -1
"""Stands for a label that is not given."""

SHARE = 0.25
"""Of a batch, at least, that has labels."""


@dataclass(frozen=True, eq=False)
class PartlyLabelled(Split):
    """Data `(x, y)` with y at -1 where there is no label.

    `split[index]` holds -1 too: a model sees the `parts` apart.
    """

    @property
    def known(self) -> Tensor:
        """Whether each datum has a label, shape `(N,)`."""
        return self.data[1] != UNKNOWN

    @property
    def parts(self) -> tuple[Split, ...]:
        """The data with labels, as `(x, y)`, and those without, as `x`."""
        known, plain = self.known, _as(Split, self)
        others = plain.subset((~known).nonzero().flatten())
        assert isinstance(others.data, tuple)
        assert isinstance(others.transform, Labelled)
        inner: Any = others.transform.transform
        x = others.x[0] if isinstance(others.x, tuple) else others.x
        return (
            plain.subset(known.nonzero().flatten()),
            replace(others, x=x, y=None, data=others.data[0], transform=inner),
        )

    def order(self, batch_size: int) -> Order:
        """Batches with a quarter of labelled data, or their share of all if that is more.

        A batch has at least one datum with a label and one without.
        """
        known = self.known.cpu()
        labelled, others = known.nonzero().flatten(), (~known).nonzero().flatten()
        size = max(min(batch_size, len(self)), 2)
        given = round(size * max(SHARE, len(labelled) / len(self)))
        given = min(max(given, 1), size - 1)
        return Order(others, given + min(size - given, len(others)), labelled, given)


def hide_labels(split: Split, num_labels: int, seed: int = 0) -> Split:
    """Data of which a few keep their labels: as many of each class, chosen by a seed.

    What does not divide evenly goes to the first classes.

    Args:
        split: Data with labels 0, 1, ... in `split.y`.
        num_labels: How many labels stay.
        seed: Of the choice.

    Returns:
        Data `(x, y)` with y at -1 where the label is hidden.

    Raises:
        ValueError: If there are no labels, or fewer than are asked for, of all or of a class.
    """
    whole = split.with_labels()
    assert split.y is not None
    y = split.y.cpu()
    classes = torch.arange(int(y.max()) + 1)
    least = len(classes)
    if not least <= num_labels <= len(y):
        raise ValueError(
            f"num_labels must be from {least}, one for each class, to {len(y):,}, the data of "
            f"{split.source}; got {num_labels:,}"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(y), generator=generator)
    kept = torch.full_like(y, UNKNOWN)
    for label in classes.tolist():
        wanted = num_labels // least + (label < num_labels % least)
        found = shuffled[y[shuffled] == label][:wanted]
        if len(found) < wanted:
            remedy = "ask for fewer" if len(found) else "number the classes without gaps"
            raise ValueError(
                f"num_labels {num_labels:,} takes {wanted:,} of class {label}, of which "
                f"{split.source} has {len(found):,}: {remedy}"
            )
        kept[found] = label
    return _partly(whole, kept.to(split.y.device), f"{num_labels:,} with labels, by seed {seed}")


def known_or_not(split: Split) -> Split:
    """A split of `(x, y)`, as one with labels for some if any label is not given.

    Raises:
        ValueError: If none is given, or one is below -1.
    """
    data = split.data
    if not (isinstance(data, tuple) and len(data) == 2):
        return split
    y = data[1]
    if y.dtype != torch.int64 or y.dim() != 1:
        return split
    if bool((y < UNKNOWN).any()):
        raise ValueError(f"labels must be 0, 1, ..., or -1 where not given; got {int(y.min())}")
    if bool((y == UNKNOWN).all()):
        raise ValueError("no datum has a label: give some, or train a VAE, which needs none")
    if isinstance(split, PartlyLabelled) == bool((y == UNKNOWN).any()):
        return split
    return _partly(split, y, f"{int((y >= 0).sum()):,} with labels")


def _partly(split: Split, y: Tensor, treatment: str) -> Split:
    assert isinstance(split.data, tuple)
    assert isinstance(split.transform, Labelled)
    data: Data = (split.data[0], y)
    kind = PartlyLabelled if bool((y == UNKNOWN).any()) else Split
    return _as(kind, split, data=data, y=y, treatment=f"{split.treatment}, {treatment}")


def _as(kind: type[Split], split: Split, **changed: Any) -> Split:
    return kind(**{f.name: getattr(split, f.name) for f in fields(split)} | changed)
