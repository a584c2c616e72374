"""In which order training takes the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """Batches for an epoch: each datum once, what does not fill a last batch waits for another.

    Where some data have labels, an epoch takes each of the others once, and beside them in every
    batch as many labelled ones, over and over. Where nearly all have, it is the others that come
    over and over.

    Attributes:
        others: Rows of the data, or of those without labels, shape `(N,)`.
        batch_size: Data in a batch.
        labelled: Rows of the data with labels; none where all are alike.
        given: How many of a batch, the first, are of those.
    """

    others: Tensor
    batch_size: int
    labelled: Tensor | None = None
    given: int = 0

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        steps = len(self.others) // (self.batch_size - self.given)
        return steps if self.labelled is None else max(steps, len(self.labelled) // self.batch_size)

    @property
    def share(self) -> float:
        """Of all data, those with labels."""
        known = 0 if self.labelled is None else len(self.labelled)
        return known / (known + len(self.others))

    def epoch(self) -> Tensor:
        """A new order, by torch's random state: rows, shape `(steps, batch_size)`."""
        others = _shuffled(self.others, self.steps * (self.batch_size - self.given))
        batches = others.reshape(self.steps, -1)
        if self.labelled is None:
            return batches
        labelled = _shuffled(self.labelled, self.steps * self.given)
        return torch.cat([labelled.reshape(self.steps, -1), batches], 1)


def _shuffled(rows: Tensor, count: int) -> Tensor:
    """So many of the rows in a new order, over and over if there are fewer."""
    rounds = -(-count // len(rows))
    return torch.cat([rows[torch.randperm(len(rows))] for _ in range(rounds)])[:count]
