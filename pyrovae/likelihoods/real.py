"""Likelihoods of real values."""

from __future__ import annotations

import math
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae._distributions import OptimalNormal, diagonal_normal, positive, positive_inverse
from pyrovae._distributions import StudentT as _StudentT
from pyrovae.likelihoods.base import Likelihood, moments
from pyrovae.nets import Net


class Normal(Likelihood):
    r"""Real data with Gaussian noise: x_d ~ N(f_d(z), sigma_d^2).

    Use it for measurements of any range. Noise that is learned settles by itself the balance
    between reconstruction and KL; a fixed scale is a choice of that balance.

    Optimal noise is not learned but solved for: in training every batch is scored at the scale that
    suits it best, the root of its mean squared error, and the loss of the ELBO is D/2 log MSE for
    each datum up to a constant; in evaluation the scale is one number for all data, a moving
    average kept with the weights.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
        scale: The noise: a number (fixed), "learned" (one for all entries), "per-pixel" (one
            learned for each entry), "amortized" (a function of z, as the mean is) or "optimal"
            (one for all entries, solved for).

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
        scale: float | Literal["learned", "per-pixel", "amortized", "optimal"] = "learned",
    ):
        named = ("learned", "per-pixel", "amortized", "optimal")
        if isinstance(scale, bool) or (isinstance(scale, str) and scale not in named):
            raise ValueError(f"scale must be a number or one of {', '.join(named)}, got {scale!r}")
        if not isinstance(scale, str) and not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.num_params = 2 if scale == "amortized" else 1
        super().__init__(shape, latent_dim, net)
        raw = {"learned": torch.zeros(()), "per-pixel": torch.zeros(self.shape)}.get(str(scale))
        self.raw_scale = None if raw is None else nn.Parameter(raw)
        self.register_buffer("variance", torch.ones(()) if scale == "optimal" else None)
        self.fixed_scale = None if isinstance(scale, str) else float(scale)

    variance: Tensor | None
    """Moving average of the mean squared error, where noise is optimal; shape `()`."""

    @property
    def scale(self) -> Tensor | float | None:
        """Standard deviation of the noise, a number or shape `()` or `shape`; None if amortized."""
        if self.variance is not None:
            return self.variance.sqrt()
        return self.fixed_scale if self.raw_scale is None else positive(self.raw_scale)

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The mean, and the scale before softplus."""
        return mean, positive_inverse(variance.sqrt().clamp(min=0.01))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network at the data's mean, and noise that moves at the data's spread."""
        new = self._is_new()
        super().initialize(x)
        if new and (self.raw_scale is not None or self.variance is not None):
            _, variance = moments(x)
            per_pixel = self.raw_scale is not None and self.raw_scale.dim()
            variance = (variance if per_pixel else variance.mean()).clamp(min=1e-4)
            if self.raw_scale is not None:
                self.raw_scale.copy_(positive_inverse(variance.sqrt()))
            if self.variance is not None:
                self.variance.copy_(variance)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean, and this raw scale where the net gives one."""
        if self.num_params == 2:
            loc, raw = self.split(params)
            return diagonal_normal(loc, raw, len(self.shape))
        if self.variance is not None and self.training:
            return self._independent(OptimalNormal(params, self.variance))
        return self._independent(dist.Normal(params, self.scale))


class Laplace(Likelihood):
    r"""Real data with heavier tails than normal: x_d ~ Laplace(f_d(z), b_d(z)).

    Use it where errors are small but for a few, such as edges in images: a median is fitted rather
    than a mean. Location and scale are both functions of z.

    References:
        What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision? (Kendall & Gal,
        2017), arXiv:1703.04977
    """

    kind = "real"
    num_params = 2

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The location, and the scale before softplus."""
        return mean, positive_inverse((variance / 2).sqrt().clamp(min=0.01))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Laplace with this location and raw scale."""
        loc, raw = self.split(params)
        return self._independent(dist.Laplace(loc, positive(raw)))


class StudentT(Likelihood):
    r"""Real data with outliers: x_d ~ f_d(z) + s_d(z) t, with t from Student's t of df degrees.

    Use it where a few entries may be far off. Location and scale are both functions of z; how heavy
    the tails are is one number for all entries, and not a third function of z as in the paper.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
        df: Degrees of freedom: a number above 1, where the mean exists (fixed), or "learned" (above
            2, where the variance does).

    References:
        Student-t Variational Autoencoder for Robust Density Estimation (Takahashi et al., 2018),
        doi:10.24963/ijcai.2018/374
    """

    kind = "real"
    num_params = 2

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        df: float | Literal["learned"] = "learned",
    ):
        super().__init__(shape, latent_dim, net)
        if isinstance(df, str) and df != "learned":
            raise ValueError(f"df must be a number or 'learned', got {df!r}")
        if not isinstance(df, str) and not 1 < df < math.inf:
            raise ValueError(f"df must be above 1 and finite, got {df}")
        self.raw_df = nn.Parameter(torch.tensor(3.0)) if isinstance(df, str) else None
        self.fixed_df = None if isinstance(df, str) else float(df)

    @property
    def df(self) -> Tensor | float:
        """Degrees of freedom: a number, or shape `()`."""
        if self.raw_df is None:
            return self.fixed_df  # type: ignore[return-value]
        return 2 + softplus(self.raw_df)

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The location, and the scale before softplus, by the variance where it exists."""
        df = max(float(self.df), 2.5)
        return mean, positive_inverse((variance * (1 - 2 / df)).sqrt().clamp(min=0.01))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Student's t with this location and raw scale."""
        loc, raw = self.split(params)
        return self._independent(_StudentT(self.df, loc, positive(raw)))
