"""Guides that are normal distributions."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyrovae._distributions import diagonal_normal
from pyrovae.guides.base import Guide


class Normal(Guide):
    """Normal with diagonal covariance: q(z|x) = N(z; mu(x), diag(sigma(x)^2)).

    The usual choice: one pass of the encoder, quick to sample and to score. It cannot follow a
    posterior whose latents depend on each other.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """

    num_params = 2

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean and, through softplus, this scale."""
        loc, raw_scale = self.split(params)
        return diagonal_normal(loc, raw_scale, 1)
