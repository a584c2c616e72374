"""Priors p(z): `prior()` has batch shape `()` and event shape `(latent_dim,)`."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae._config import Configurable
from pyrovae._part import latent_shape

__all__ = ["Prior", "StandardNormal"]


class Prior(Configurable, nn.Module):
    """Base of priors.

    Args:
        latent_dim: Number of latents.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        (self.latent_dim,) = latent_shape(latent_dim)

    def connect(self, guide: nn.Module) -> None:
        """Take note of the guide, whose parameters stay its own, if the prior is made of it."""

    def forward(self) -> dist.TorchDistribution:
        """p(z), with batch shape `()` and event shape `(latent_dim,)`."""
        raise NotImplementedError


class StandardNormal(Prior):
    """Standard normal, p(z) = N(z; 0, I): nothing to learn.

    The usual choice, and the one to compare others with.

    Args:
        latent_dim: Number of latents.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """

    loc: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """N(0, I)."""
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


DEFAULT = StandardNormal
"""What is taken where none is named."""
