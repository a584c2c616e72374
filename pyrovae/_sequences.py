r"""Sequences in which each step follows those before it.

.. math:: p(x_1, ..., x_T) = \prod_t p(x_t | x_1, ..., x_{t-1})
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrovae.nets import from_steps, to_steps

NUM_FIXED = 64
"""Draws behind a mean."""


class Decoder(Protocol):
    """What writes a sequence, given a context of shape `(*, size)`."""

    shape: tuple[int, ...]
    support: constraints.Constraint

    def score(self, context: Tensor, steps: Tensor) -> Tensor:
        """Log density of sequences `(*, steps, features)`: shape `(*)`."""

    def write(self, context: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draws made of uniform noise, and the mean of each step given those before."""


class Sequences(TorchDistribution):
    """Sequences that a decoder scores and writes.

    The mean is an average over 64 draws, in pairs of opposite noise that is always the same, of
    each step's mean given the steps before: exact for the first step, and off by an eighth of a
    standard deviation at most as a rule.

    Args:
        decoder: Scores and writes sequences.
        context: What it knows of each, shape `(*, size)`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, decoder: Decoder, context: Tensor, validate_args: bool | None = None):
        self.decoder, self.context = decoder, context
        batch, event = context.shape[:-1], torch.Size(decoder.shape)
        super().__init__(batch, event, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Sequences:
        """The same with a larger batch shape."""
        return Sequences(self.decoder, self._wide(batch_shape), self._validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of every entry."""
        return constraints.independent(self.decoder.support, self.event_dim)

    @property
    def mean(self) -> Tensor:
        """Average over fixed draws."""
        sizes = to_steps(torch.empty(self.event_shape), self.event_shape).shape
        # From numpy: a traced graph keeps it, and would draw anew what torch draws.
        half = torch.from_numpy(np.random.default_rng(0).random((NUM_FIXED // 2, *sizes)))
        noise = torch.cat([half, 1 - half]).to(self.context)
        noise = noise.reshape(-1, *[1] * len(self.batch_shape), *sizes)
        _, means = self.decoder.write(self._wide((NUM_FIXED, *self.batch_shape)), noise)
        return from_steps(means.mean(0), self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of whole sequences."""
        if self._validate_args:
            self._validate_sample(value)
        lead = value.shape[: value.dim() - self.event_dim]
        batch = torch.broadcast_shapes(lead, self.batch_shape)
        steps = to_steps(value.expand(*batch, *self.event_shape), self.event_shape)
        return self.decoder.score(self._wide(batch), steps)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, step after step."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.context.dtype, device=self.context.device)
        context = self._wide(shape[: len(shape) - self.event_dim])
        steps, _ = self.decoder.write(context, to_steps(uniform, self.event_shape))
        return from_steps(steps, self.event_shape)

    def _wide(self, batch_shape: Any) -> Tensor:
        return self.context.expand(*batch_shape, -1)
