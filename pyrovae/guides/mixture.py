r"""Mixtures of normals whose draws can be differentiated through.

A draw z, whichever component it came from, is held where its distribution function puts it: with

.. math:: F_d(z; \theta) = P(Z_d \le z_d \mid z_1, \dots, z_{d-1})

constant, :math:`dz/d\theta = -(\partial F / \partial z)^{-1} \partial F / \partial\theta`. The
matrix is triangular: one solve gives the exact gradient of every entry.

References:
    Implicit Reparameterization Gradients (Figurnov, Mohamed & Mnih, 2018), arXiv:1805.08498
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from pyrovae._config import shape_of
from pyrovae._distributions import diagonal_normal
from pyrovae.guides.base import Guide
from pyrovae.nets import Net


class NormalMixture(Guide):
    """Mixture of diagonal normals: q(z|x) = sum_k pi_k(x) N(z; mu_k(x), diag(sigma_k(x)^2)).

    For posteriors with several modes. Draws are differentiated by implicit reparameterization, the
    choice of the component included; KL(q || p) is sampled.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out D means and D scales before
            softplus that the K components share, and for each of them a logit and by how much it
            differs in each, times the root of D: `2 * D + K * (1 + 2 * D)` numbers.
        num_components: K, the number of components.

    References:
        Implicit Reparameterization Gradients (Figurnov, Mohamed & Mnih, 2018), arXiv:1805.08498
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        num_components: int = 4,
    ):
        (self.num_components,) = shape_of(num_components, "num_components")
        super().__init__(shape, latent_dim, net)

    def param_shape(self) -> tuple[int]:
        """What components share, their logits, and how each differs."""
        shared = 2 * self.event_shape[0]
        return (shared + self.num_components * (1 + shared),)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Mixture of normals that differ from a shared one."""
        (dim,), k = self.event_shape, self.num_components
        shared, logits, own = params.split([2 * dim, k, 2 * dim * k], dim=-1)
        # Divided, or components that a new network scatters over many latents would be noise.
        each = shared.unsqueeze(-2) + own.unflatten(-1, (k, -1)) / dim**0.5
        loc, raw_scale = each.chunk(2, dim=-1)
        return ReparameterizedMixture(
            dist.Categorical(logits=logits), diagonal_normal(loc, raw_scale, 1)
        )


class ReparameterizedMixture(dist.MixtureSameFamily):
    """Mixture of diagonal normals with pathwise gradients.

    Args:
        mixture_distribution: Categorical over K components, batch shape `(*)`.
        component_distribution: Diagonal normals, batch shape `(*, K)`.
    """

    has_rsample = True
    support = constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw; the gradient of a draw is exact, its second derivatives are not."""
        z = self.sample(torch.Size(sample_shape))
        normal = self.component_distribution.base_dist
        at = z.unsqueeze(-2)
        log_p = normal.log_prob(at)
        before = pad(log_p.cumsum(-1)[..., :-1], (1, 0))
        logits = self.mixture_distribution.logits.unsqueeze(-1)
        weight = torch.softmax(logits + before, dim=-2)
        below = normal.cdf(at)
        cdf = (weight * below).sum(-2)
        with torch.no_grad():
            density = (weight * log_p.exp()).sum(-2)
            slope = (normal.loc - at) / normal.scale.square()
            relative = weight * (below - cdf.unsqueeze(-2)) / density.unsqueeze(-2)
            jacobian = relative.mT @ slope
        change = ((cdf - cdf.detach()) / density).unsqueeze(-1)
        return z - torch.linalg.solve_triangular(
            jacobian, change, upper=False, unitriangular=True
        ).squeeze(-1)
