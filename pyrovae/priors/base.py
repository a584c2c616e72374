"""Base of priors p(z)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import nn

from pyrovae._config import Configurable
from pyrovae._part import latent_shape


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
