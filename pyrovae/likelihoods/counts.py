"""Likelihoods of whole numbers from zero on, without an upper bound."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pyrovae.likelihoods.base import Likelihood


class Poisson(Likelihood):
    """Counts: x_d ~ Poisson(exp(f_d(z))).

    Use it for whole numbers from zero on, such as words in a text or reads of a gene, whose
    variance given z is their mean.
    """

    kind = "counts"
    support = constraints.nonnegative_integer

    def link(self, mean: Tensor) -> Tensor:
        """Logarithm of a mean kept above a thousandth."""
        return mean.clamp(min=0.001).log()

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Poisson with this logarithm of the rate."""
        return self._independent(dist.Poisson(params.exp()))
