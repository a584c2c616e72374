"""Likelihoods of whole numbers from zero on, without an upper bound."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae._distributions import NegativeBinomial as _NegativeBinomial
from pyrovae._distributions import Poisson as _Poisson
from pyrovae._distributions import ZeroInflated
from pyrovae.likelihoods.base import Likelihood, moments
from pyrovae.nets import Net


class OfCounts(Likelihood):
    """Base of likelihoods of counts: the first parameter is the logarithm of a mean."""

    kind = "counts"
    support = constraints.nonnegative_integer

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logarithm of a mean kept above a thousandth."""
        return (mean.clamp(min=0.001).log(),)


class Poisson(OfCounts):
    """Counts: x_d ~ Poisson(exp(f_d(z))).

    Use it for whole numbers from zero on, such as words in a text or reads of a gene, whose
    variance given z is their mean.
    """

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Poisson with this logarithm of the rate."""
        return self._independent(_Poisson(params.clamp(-60, 60).exp()))  # lest float32 overflow


class NegativeBinomial(OfCounts):
    r"""Counts that vary more than Poisson's: x_d has mean mu_d = exp(f_d(z)).

    .. math:: \text{Var}\, x_d = \mu_d + \mu_d^2 / \theta_d

    Use it for counts from many sources, such as reads of a gene in single cells. Each entry learns
    its own theta; a Poisson is the limit of a large one.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics (Lopez et al., 2018),
        doi:10.1038/s41592-018-0229-2
    """

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None):
        super().__init__(shape, latent_dim, net)
        self.log_theta = nn.Parameter(torch.zeros(self.shape))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network at the data's mean, and theta at the data's spread."""
        if self._is_new():
            mean, variance = moments(x)
            excess = (variance - mean).clamp(min=1e-6)
            self.log_theta.copy_((mean.square() / excess).clamp(0.1, 100).log())
        super().initialize(x)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Negative binomial with this logarithm of the mean."""
        return self._independent(self._counts(params))

    def _counts(self, log_mean: Tensor) -> dist.TorchDistribution:
        return _NegativeBinomial(self.log_theta.exp(), logits=log_mean - self.log_theta)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    r"""Counts with more zeros still: 0 with probability g_d(z), else negative binomial.

    Use it for counts that are lost at times, such as reads of a gene that is there but not caught.
    The gate g is a function of z, as the mean is.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics (Lopez et al., 2018),
        doi:10.1038/s41592-018-0229-2
    """

    num_params = 2

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logarithm of the mean behind the gate, and logits of a gate that is shut once in ten."""
        (log_mean,) = super().link(mean, variance)
        return log_mean - math.log(0.9), torch.full_like(mean, math.log(0.1 / 0.9))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Zero-inflated negative binomial with this log mean and these logits of the gate."""
        log_mean, gate = self.split(params)
        counts = self._counts(log_mean)
        return self._independent(ZeroInflated(counts, gate_logits=gate))
