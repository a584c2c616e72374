"""Likelihoods p(x|z): `likelihood(z)` has the leading shape of z, and events like one datum."""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae._distributions import ContinuousBernoulli as _ContinuousBernoulli
from pyrovae._part import Conditional, data_shape, latent_shape
from pyrovae.nets import Net

__all__ = ["Bernoulli", "ContinuousBernoulli", "Likelihood", "Normal", "Poisson"]


class Likelihood(Conditional):
    """Base of likelihoods.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
    """

    kind: str | None = None
    """The kind of data (binary, grey, real, counts) for which this is the first choice."""

    support: constraints.Constraint = constraints.real

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None):
        super().__init__(latent_shape(latent_dim), data_shape(shape), net)
        self.shape, self.latent_dim = self.event_shape, latent_dim

    def link(self, mean: Tensor) -> Tensor:
        """The first parameter of the distribution whose mean this is."""
        return mean

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network's output at the mean of data `x`, `(n, *shape)`, NaN left out."""
        if self._is_new():
            bias: Any = self.net.bias
            self.split(bias)[0].copy_(self.link(x.nanmean(0).nan_to_num()))

    def _is_new(self) -> bool:
        """Whether the network has an output bias, still where it was built: at zero."""
        bias = getattr(self.net, "bias", None)
        return isinstance(bias, Tensor) and not bias.any()

    def _independent(self, base: dist.TorchDistribution) -> dist.TorchDistribution:
        return base.to_event(len(self.shape))


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


class Normal(Likelihood):
    r"""Real data with Gaussian noise: x_d ~ N(f_d(z), sigma_d^2).

    Use it for measurements of any range. Noise that is learned settles by itself the balance
    between reconstruction and KL; a fixed scale is a choice of that balance.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
        scale: The noise: a number (fixed), "learned" (one for all entries) or "per-pixel" (one
            learned for each entry).

    References:
        Simple and Effective VAE Training with Calibrated Decoders (Rybkin et al., 2021),
        arXiv:2006.13202
    """

    kind = "real"

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        scale: float | Literal["learned", "per-pixel"] = "learned",
    ):
        super().__init__(shape, latent_dim, net)
        if isinstance(scale, str) and scale not in ("learned", "per-pixel"):
            raise ValueError(f"scale must be a number, 'learned' or 'per-pixel', got {scale!r}")
        if not isinstance(scale, str) and not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        raw = torch.zeros(self.shape if scale == "per-pixel" else ())
        self.raw_scale = nn.Parameter(raw) if isinstance(scale, str) else None
        self.fixed_scale = None if isinstance(scale, str) else float(scale)

    @property
    def scale(self) -> Tensor | float:
        """Standard deviation of the noise: a number, or shape `()` or `shape`."""
        if self.raw_scale is None:
            return self.fixed_scale  # type: ignore[return-value]
        return softplus(self.raw_scale) + 1e-3

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network at the data's mean, and learned noise at the data's spread."""
        new = self._is_new()
        super().initialize(x)
        if new and self.raw_scale is not None:
            variance = (x - x.nanmean(0)).square().nanmean(0)
            variance = variance if self.raw_scale.dim() else variance.nanmean()
            spread = variance.nan_to_num(1.0).sqrt().clamp(min=0.01)
            self.raw_scale.copy_(spread + (-torch.expm1(-spread)).log())  # softplus inverted

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean."""
        return self._independent(dist.Normal(params, self.scale))


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
