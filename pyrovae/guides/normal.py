"""Guides that are one normal distribution, with more or less of its covariance."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal
from torch.distributions.kl import register_kl

from pyrovae._config import shape_of
from pyrovae._distributions import diagonal_normal, positive
from pyrovae._part import latent_shape
from pyrovae.guides.base import Guide
from pyrovae.nets import Net


class Normal(Guide):
    """Normal with diagonal covariance: q(z|x) = N(z; mu(x), diag(sigma(x)^2)).

    The usual choice: one pass of the encoder, quick to sample and to score. It cannot follow a
    posterior whose latents depend on each other.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """

    num_params = 2
    is_diagonal_normal = True

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean and, through softplus, this scale."""
        loc, raw_scale = self.split(params)
        return diagonal_normal(loc, raw_scale, 1)


class LowRankNormal(Guide):
    """Normal whose covariance is diagonal plus low rank: N(mu(x), W(x) W(x)' + diag(sigma(x)^2)).

    For many latents of which a few directions depend on each other. With all of them dependent and
    few latents, take `FullRankNormal`.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the encoder; `MLP()` if None. It puts out mu, the scale sigma before
            softplus, and W before it is divided by the root of its size:
            `(2 + rank) * latent_dim` numbers.
        rank: Columns of W, at most `latent_dim`; if None 8, or `latent_dim` where that is less.

    References:
        Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott & Smith,
        2018), arXiv:1701.03208
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        rank: int | None = None,
    ):
        (dim,) = latent_shape(latent_dim)
        (self.rank,) = shape_of(min(8, dim) if rank is None else rank, "rank")
        if self.rank > dim:
            raise ValueError(f"rank must be at most {dim} (latent_dim), got {rank}")
        super().__init__(shape, latent_dim, net)

    def param_shape(self) -> tuple[int]:
        """Mean, scale and the columns of W."""
        return ((2 + self.rank) * self.event_shape[0],)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean, scale and factor."""
        loc, raw_scale, *columns = params.chunk(2 + self.rank, dim=-1)
        variance = positive(raw_scale).square()
        factor = torch.stack(columns, -1) / (self.event_shape[0] * self.rank) ** 0.5
        return dist.LowRankMultivariateNormal(loc, factor, variance)


class FullRankNormal(Guide):
    """Normal with full covariance: q(z|x) = N(z; mu(x), L(x) L(x)'), L lower triangular.

    For posteriors whose latents depend on each other linearly, and up to some dozens of latents:
    the encoder's last layer grows with their square.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out mu and the D (D + 1) / 2 entries of
            L row by row, the diagonal before softplus, the others before division by D, which
            keeps their noise in training from drowning the latents.

    References:
        An Introduction to Variational Autoencoders, section 2.5.1 (Kingma & Welling, 2019),
        arXiv:1906.02691
    """

    def param_shape(self) -> tuple[int]:
        """Mean and triangle."""
        (dim,) = self.event_shape
        return (dim + dim * (dim + 1) // 2,)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean and Cholesky factor."""
        (dim,) = self.event_shape
        loc, entries = params.split([dim, params.shape[-1] - dim], dim=-1)
        raw = lower_triangular(entries, dim)
        scale = positive(raw.diagonal(dim1=-2, dim2=-1))
        return dist.MultivariateNormal(loc, scale_tril=raw.tril(-1) / dim + scale.diag_embed())


def lower_triangular(entries: Tensor, dim: int) -> Tensor:
    """Matrices `(*, dim, dim)` with these entries `(*, dim * (dim + 1) / 2)`, row by row."""
    row, column = torch.tril_indices(dim, dim, device=entries.device)
    matrix = entries.new_zeros(*entries.shape[:-1], dim, dim)
    matrix[..., row, column] = entries
    return matrix


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_from_a_diagonal_normal(
    q: MultivariateNormal | LowRankMultivariateNormal, p: Independent
) -> Tensor:
    """KL from a normal with any covariance to one with a diagonal covariance."""
    if not isinstance(p.base_dist, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    loc, scale = p.base_dist.loc, p.base_dist.scale
    distance = (q.variance + (q.mean - loc).square()) / scale.square()
    cross = 0.5 * distance + scale.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return cross.sum(-1) - q.entropy()
