r"""Path derivatives: gradients for the guide through its draws alone.

A bound depends on the guide's parameters through the draws z and through log q(z|x) itself. The
second part has another form in expectation, or none at all, and leaving it out takes noise away.
Model and guide are scored at leaves l, copies of the draws, and

.. math:: g = \frac{\partial}{\partial l} (\log p(x, l) - \log q(l|x))

goes on through the draws: :math:`\sum_k a_k \log p(x, l_k) + b_k g_k \cdot z_k`, with a, b and g as
constants. So several latents may depend on each other, and model and guide may share parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.objectives.base import Densities, Objective, log_mean_exp, with_value
from pyrovae.program import Args, PyroFunction


class _PathDerivative(Objective):
    """Base: a subclass weighs the particles, and says what the bound is."""

    density, scaled, enumerated = True, False, False

    def weigh(self, log_w: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Weights a and b of the particles, which come first."""
        raise NotImplementedError

    def bound(self, log_w: Tensor) -> Tensor:
        """The bound on log p(x), `(N,)`."""
        raise NotImplementedError

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative bound with the path derivative, and "elbo" and "bound" to report."""
        k = self.num_particles
        drawn = self.draw(guide, args, k)
        leaves = {name: z.detach().requires_grad_() for name, z in drawn.values.items()}
        scores = program.rescore(guide, args, drawn, leaves)
        densities = Densities.of(self.score(model, args, leaves, drawn), scores, k)
        log_w = densities.log_w(kl_weight)
        loss = -self.bound(log_w).sum().detach()
        if torch.is_grad_enabled():
            a, b = self.weigh(log_w.detach(), kl_weight)
            slopes = torch.autograd.grad(
                log_w.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            surrogate = (a * densities.log_p(kl_weight)).sum()
            for (name, score), slope in zip(scores.items(), slopes, strict=True):
                weights = b.reshape(-1, *[1] * score.fn.event_dim)
                surrogate = surrogate + (weights * slope * drawn.values[name]).sum()
            loss = with_value(loss, -surrogate)
        bound = self.bound(densities.log_w().detach()).sum()
        return loss, densities.terms() | {"bound": bound}


class StickingTheLanding(_PathDerivative):
    r"""Evidence lower bound, without the noise of log q's own parameters.

    .. math:: E_{q(z|x)}[\log p(x, z) - \log q(z|x)]

    The ELBO with another gradient: its noise goes to zero as the guide comes close to the
    posterior, where that of the ELBO does not. Needs a guide that scores any z.

    Args:
        num_particles: Draws of z per datum.

    References:
        Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194
    """

    def weigh(self, log_w: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """All alike."""
        equal = torch.full_like(log_w, 1 / len(log_w))
        return equal, equal

    def bound(self, log_w: Tensor) -> Tensor:
        """The ELBO."""
        return log_w.mean(0)


class DReG(_PathDerivative):
    r"""Importance-weighted bound, with the doubly reparameterized gradient.

    .. math:: E \log \tfrac1K \sum_k w_k, \quad w_k = \frac{p(x, z_k)}{q(z_k|x)}

    The bound of the importance-weighted autoencoder, from which the guide learns more and not less
    as K grows. Needs a guide that scores any z.

    Args:
        num_particles: K, the draws of z per datum.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019),
        arXiv:1810.04152
    """

    def __init__(self, num_particles: int = 5):
        super().__init__(num_particles)

    def weigh(self, log_w: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Normalised, and squared as far as the weight of log q goes."""
        w = log_w.softmax(0)
        return w, (1 - weight) * w + weight * w.square()

    def bound(self, log_w: Tensor) -> Tensor:
        """The importance-weighted bound."""
        return log_mean_exp(log_w)
