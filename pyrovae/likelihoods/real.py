"""Likelihoods of real values."""

from __future__ import annotations

import math
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.likelihoods.base import Likelihood
from pyrovae.nets import Net


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
