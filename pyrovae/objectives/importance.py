"""Importance-weighted bounds."""

from __future__ import annotations

import math

from torch import Tensor

from pyrovae.objectives.base import Densities, Objective
from pyrovae.program import Args, PyroFunction


class IWAE(Objective):
    r"""Importance-weighted bound, by the reparameterization trick.

    .. math:: E \log \tfrac1K \sum_k w_k, \quad w_k = \frac{p(x, z_k)}{q(z_k|x)}

    A tighter bound than the ELBO, for a better model: it forgives a guide that misses part of the
    posterior. The guide itself learns less from it as K grows.

    Args:
        num_particles: K, the draws of z per datum.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
    """

    density, scaled = True, False

    def __init__(self, num_particles: int = 5):
        super().__init__(num_particles)
        self.num_bounds = 1

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative bound, and "elbo" and "bound" to report."""
        k, m = self.num_particles, self.num_bounds
        drawn = self.draw(guide, args, m * k)
        sites = self.score(model, args, drawn.values, drawn)
        densities = Densities.of(sites, drawn.scores, m * k)
        loss = -self._bound(densities.log_w(kl_weight))
        return loss, densities.terms() | {"bound": self._bound(densities.log_w()).detach()}

    def _bound(self, log_w: Tensor) -> Tensor:
        """The mean over bounds, summed over data, of `(bounds * K, N)`."""
        log_w = log_w.unflatten(0, (self.num_bounds, self.num_particles))
        return (log_w.logsumexp(1) - math.log(self.num_particles)).mean(0).sum()


class MIWAE(IWAE):
    r"""Mean of several importance-weighted bounds.

    .. math:: E \tfrac1M \sum_m \log \tfrac1K \sum_k w_{mk}

    Between the ELBO (K = 1) and one bound of all M K draws (M = 1): the bound is tight with K, and
    what the guide learns from it is less noisy with M.

    Args:
        num_particles: K, the draws of z in a bound.
        num_bounds: M.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        arXiv:1802.04537
    """

    def __init__(self, num_particles: int = 8, num_bounds: int = 8):
        super().__init__(num_particles)
        if not isinstance(num_bounds, int) or num_bounds < 1:
            raise ValueError(f"num_bounds must be at least 1, got {num_bounds}")
        self.num_bounds = num_bounds
