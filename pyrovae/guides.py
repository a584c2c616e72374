"""Guides q(z|x): `guide(x)` has the leading shape of x and event shape `(latent_dim,)`."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae._part import Conditional, data_shape, latent_shape
from pyrovae.nets import Net

__all__ = ["Guide", "Normal"]


class Guide(Conditional):
    """Base of guides.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the encoder; `MLP()` if None.
    """

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None):
        super().__init__(data_shape(shape), latent_shape(latent_dim), net)
        self.shape, (self.latent_dim,) = data_shape(shape), self.event_shape


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
        return dist.Normal(loc, softplus(raw_scale) + 1e-4).to_event(1)
