"""Likelihoods of values in [0, 1]: binary, and grey on a continuous scale."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae._distributions import Beta as _Beta
from pyrovae._distributions import ContinuousBernoulli as _ContinuousBernoulli
from pyrovae._distributions import OpenInterval, softplus_inverse
from pyrovae.likelihoods.base import Likelihood


class Bernoulli(Likelihood):
    """Binary data, each entry on its own: x_d ~ Bernoulli(sigmoid(f_d(z))).

    Use it for zeros and ones, and only for them: for grey values it is not a density. Its mean
    starts at the training mean, as in Burda et al. (2016).

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """

    kind = "binary"
    support = constraints.boolean

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logits of a mean kept a thousandth away from 0 and 1."""
        return (mean.clamp(0.001, 0.999).logit(),)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Bernoulli with these logits."""
        return self._independent(dist.Bernoulli(logits=params))


class ContinuousBernoulli(Likelihood):
    """Grey values in [0, 1], with the normalising constant that a Bernoulli lacks for them.

    Use it for grey images that are not binarized, scaled to [0, 1] and dequantized; what is
    reported of 8-bit data is brought back to their levels.

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (Loaiza-Ganem & Cunningham, 2019), arXiv:1907.06845
    """

    kind = "grey"
    support = constraints.unit_interval

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logits from which the mean is found again to within a few hundredths of its range."""
        # The mean is 1/2 + lambda/12 near lambda = 0 and 1 - 1/lambda far out (mirrored below 1/2).
        tail = 1 / (0.5 - (mean - 0.5).abs()).clamp(min=0.02)
        near = 12 * (mean - 0.5)
        return (torch.where(near.abs() < 3, near, tail.copysign(near)),)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Continuous Bernoulli with these logits."""
        return self._independent(_ContinuousBernoulli(logits=params))


class Beta(Likelihood):
    r"""Grey values strictly between 0 and 1: x_d ~ Beta(m_d nu_d, (1 - m_d) nu_d).

    Use it for dequantized grey images, or for fractions, whose spread should be learned along with
    their mean. Mean m and concentration nu are both functions of z; for nu below one the density
    rises to both ends, as black and white pixels want.

    References:
        Beta Regression for Modelling Rates and Proportions (Ferrari & Cribari-Neto, 2004),
        doi:10.1080/0266476042000214501
    """

    kind = "grey"
    support = OpenInterval()
    num_params = 2

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logits of the mean, and the concentration before softplus, both kept from extremes."""
        mean = mean.clamp(0.001, 0.999)
        spread = mean * (1 - mean)
        concentration = (spread / variance.clamp(min=1e-6) - 1).clamp(0.1, 1000)
        logits = ((mean - _EDGE) / (1 - 2 * _EDGE)).logit()
        return logits, softplus_inverse(concentration - _EDGE) - 2

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Beta with these logits of the mean and this raw concentration."""
        logits, raw = self.split(params)
        inside, concentration = 1 - 2 * _EDGE, softplus(raw + 2) + _EDGE  # near uniform at 0
        up = concentration * (_EDGE + inside * logits.sigmoid())
        down = concentration * (_EDGE + inside * (-logits).sigmoid())
        return self._independent(_Beta(up, down))


_EDGE = 1e-4
"""How near its mean comes to 0 and 1, and its concentration to 0."""
