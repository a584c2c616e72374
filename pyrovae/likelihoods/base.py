"""Base of likelihoods p(x|z): a net of z and a family of distributions over x."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae._part import Conditional, data_shape, latent_shape
from pyrovae.nets import Net


class Likelihood(Conditional):
    """Base of likelihoods.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
    """

    kind: str | None = None
    """The kind of data that it reads: binary, grey, levels, real or counts; None for any."""

    support: constraints.Constraint = constraints.real

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None):
        super().__init__(latent_shape(latent_dim), data_shape(shape), net)
        self.shape, self.latent_dim = self.event_shape, latent_dim

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The first parameters, or all, of the distribution with this mean and variance.

        Args:
            mean: Of each entry, with shape `shape`.
            variance: Of each entry, with shape `shape`; a family without a scale has no use for it.

        Returns:
            Parameters in the order of `split`, each with shape `shape`.
        """
        return (mean,)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network's output at the moments of data `x`, `(n, *shape)`, NaN left out."""
        if self._is_new():
            bias: Any = self.net.bias
            for part, start in zip(self.split(bias), self.link(*moments(x)), strict=False):
                part.copy_(start)

    def _is_new(self) -> bool:
        """Whether the network has an output bias, still where it was built: at zero."""
        bias = getattr(self.net, "bias", None)
        return isinstance(bias, Tensor) and not bias.any()

    def _independent(self, base: dist.TorchDistribution) -> dist.TorchDistribution:
        return base.to_event(len(self.shape))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each entry of data `(n, *shape)`, NaN left out; 0 and 1 if all are."""
    mean = x.nanmean(0).nan_to_num()
    return mean, (x - mean).square().nanmean(0).nan_to_num(1.0)
