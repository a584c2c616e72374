"""Likelihoods of values in [0, 1]: binary, and grey on a continuous scale."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae._distributions import ContinuousBernoulli as _ContinuousBernoulli
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

    def link(self, mean: Tensor) -> Tensor:
        """Logits of a mean kept a thousandth away from 0 and 1."""
        return mean.clamp(0.001, 0.999).logit()

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Bernoulli with these logits."""
        return self._independent(dist.Bernoulli(logits=params))


class ContinuousBernoulli(Likelihood):
    """Grey values in [0, 1], with the normalising constant that a Bernoulli lacks for them.

    Use it for grey images that are not binarized; the log density is that of grey values scaled to
    [0, 1] and dequantized, brought back to the original levels.

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (Loaiza-Ganem & Cunningham, 2019), arXiv:1907.06845
    """

    kind = "grey"
    support = constraints.unit_interval

    def link(self, mean: Tensor) -> Tensor:
        """Logits from which the mean is found again to within a few hundredths of its range."""
        # The mean is 1/2 + lambda/12 near lambda = 0 and 1 - 1/lambda far out (mirrored below 1/2).
        tail = 1 / (0.5 - (mean - 0.5).abs()).clamp(min=0.02)
        near = 12 * (mean - 0.5)
        return torch.where(near.abs() < 3, near, tail.copysign(near))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Continuous Bernoulli with these logits."""
        return self._independent(_ContinuousBernoulli(logits=params))
