"""Mixtures of distributions of one family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Mixture(TorchDistribution):
    r"""Mixture :math:`\sum_c w_c \, p_c(z)`, the same in the whole batch.

    Torch's `MixtureSameFamily` draws from all components to keep one, and scores them in arrays of
    size batch x components x latents. Here a draw is one of the chosen component, and normal
    components are scored by matrix products.

    Args:
        log_weights: Logarithms of the weights up to a constant, shape `(components,)`.
        given: What each component is made of, shape `(components, *)`.
        family: A function from `(*lead, *)`, some of these, to distributions of batch shape `lead`.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (as torch has it)

    def __init__(
        self,
        log_weights: Tensor,
        given: Tensor,
        family: Callable[[Tensor], dist.TorchDistribution],
        validate_args: bool | None = None,
    ):
        self.log_weights = log_weights.log_softmax(-1)
        self.given, self.family, self.components = given, family, family(given)
        shape = self.components.event_shape
        super().__init__(event_shape=shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of every component."""
        return self.components.support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Mixture:
        """The same with a larger batch shape."""
        new = self._get_checked_instance(Mixture, _instance)
        new.log_weights, new.given, new.family = self.log_weights, self.given, self.family
        new.components = self.components
        super(Mixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The components' means, weighed."""
        return self._average(self.components.mean).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """The mean of the components' variances and the variance of their means."""
        spread = self.components.mean - self._average(self.components.mean)
        total = self._average(self.components.variance + spread.square())
        return total.expand(self._extended_shape())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        if self._validate_args:
            self._validate_sample(value)
        log_p = (self.log_weights + self._component_log_probs(value)).logsumexp(-1)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, each from a component drawn before."""
        lead = torch.Size(sample_shape) + self.batch_shape
        chosen = dist.Categorical(logits=self.log_weights).sample(lead)
        return self.family(self.given[chosen]).sample()

    def _average(self, values: Tensor) -> Tensor:
        return torch.tensordot(self.log_weights.exp(), values, dims=1)

    def _component_log_probs(self, z: Tensor) -> Tensor:
        """Log p_c(z), shape `(*, components)`."""
        diagonal = _diagonal_normal(self.components)
        if diagonal:
            return _normal_log_probs(z, *diagonal)
        return self.components.log_prob(z.unsqueeze(-1 - len(self.event_shape)))


def _diagonal_normal(components: dist.TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Mean and scale, shape `(components, dims)`, if these are diagonal normals of vectors."""
    base = getattr(components, "base_dist", None)
    if isinstance(base, dist.Normal) and len(components.event_shape) == 1:
        return base.loc, base.scale
    return None


def _normal_log_probs(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc_c, diag(scale_c^2)) by matrix products.

    In float64, where expanding the square costs no digits that count: in float32, with a scale of
    0.01, it would cost nats.
    """
    z64, loc, scale = z.double(), loc.double(), scale.double()
    precision = scale.square().reciprocal()
    constant = (loc.square() * precision / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
    return (z64 @ (loc * precision).T - z64.square() @ precision.T / 2 - constant).to(z)
