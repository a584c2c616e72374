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
    """The kind of data that it reads: binary, grey, real or counts; None for any."""

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
