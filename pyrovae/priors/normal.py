"""Priors that are normal distributions, and mixtures of them."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae._config import shape_of
from pyrovae._distributions import diagonal_normal, positive_inverse
from pyrovae._mixture import Mixture
from pyrovae.priors.base import Prior


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


class Normal(Prior):
    """Normal with a learned mean and scale for each latent, p(z) = N(z; mu, diag(sigma^2)).

    It starts as N(0, I). A decoder can shift and stretch z by itself, so expect it to change how
    soon a model is trained rather than how good it gets; the KL keeps its closed form.

    Args:
        latent_dim: Number of latents.
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(positive_inverse(torch.ones(latent_dim)))

    def forward(self) -> dist.TorchDistribution:
        """N(mu, diag(sigma^2))."""
        return diagonal_normal(self.loc, self.raw_scale, 1)


class GaussianMixture(Prior):
    """Mixture of learned normals, p(z) = sum_c w_c N(z; mu_c, diag(sigma_c^2)).

    For data that come in kinds: each component can take one, and the responsibilities of the
    components for z cluster the data. It starts as components drawn apart at random, with mean
    about zero and variance about one as a whole.

    Args:
        latent_dim: Number of latents.
        num_components: Number of components.

    References:
        Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders (Dilokthanakul
        et al., 2016), arXiv:1611.02648; Variational Deep Embedding (Jiang et al., 2017),
        arXiv:1611.05148
    """

    def __init__(self, latent_dim: int, num_components: int = 10):
        super().__init__(latent_dim)
        (num,) = shape_of(num_components, "num_components")
        spread = 0.5
        self.loc = nn.Parameter(spread * torch.randn(num, latent_dim))
        start = torch.full((num, latent_dim), math.sqrt(1 - spread**2))
        self.raw_scale = nn.Parameter(positive_inverse(start))
        self.log_weights = nn.Parameter(torch.zeros(num))

    def forward(self) -> dist.TorchDistribution:
        """The mixture."""
        return Mixture(self.log_weights, torch.cat([self.loc, self.raw_scale], -1), _normal)


def _normal(params: Tensor) -> dist.TorchDistribution:
    loc, raw = params.chunk(2, -1)
    return diagonal_normal(loc, raw, 1)
