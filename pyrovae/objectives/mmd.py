"""Information-maximising variational autoencoders, by maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.objectives.elbo import ELBO
from pyrovae.program import Args, Draw, PyroFunction, Refused

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Widths of the kernel, in mean squared distances between draws of the prior."""


class MMD(ELBO):
    r"""InfoVAE: the guide's draws over all data are held to the prior, each datum's less or not.

    .. math:: E_{q(z|x)}[\log p(x|z)] - (1 - \alpha) KL(q(z|x) \| p(z))
        - (\alpha + \lambda - 1) \, MMD(q(z), p(z))

    For codes that keep information about x where the ELBO would let them fade. With alpha = 1 there
    is no KL: a deterministic guide makes it a Wasserstein autoencoder, and a learned prior stands
    still. The MMD is estimated within the batch, without bias for a given kernel, and is worth as
    much as the batch is large; the loss of a batch counts it once per datum. The kernel is that of
    Wasserstein autoencoders and not the paper's Gaussian: a mean of inverse multiquadrics, from a
    tenth to ten times the spread of the prior. All latents of a datum are taken together. Draws of
    the prior go through the decoder too, and count in its running statistics if it has any.

    Args:
        alpha: How much of the KL is left out, up to 1.
        penalty: Lambda: with alpha it weighs the MMD, which lies between 0 and 2 (its estimate can
            be slightly negative).
        num_particles: Draws of z per datum.
        analytic_kl: Take the KL in closed form where that is possible.

    References:
        InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao et al., 2019),
        arXiv:1706.02262; kernel, and alpha = 1: Wasserstein Auto-Encoders (Tolstikhin et al.,
        2018), arXiv:1711.01558
    """

    def __init__(
        self,
        alpha: float = 0.5,
        penalty: float = 100.0,
        num_particles: int = 1,
        analytic_kl: bool = False,
    ):
        if not alpha <= 1:
            raise ValueError(f"alpha must be at most 1, got {alpha}")
        if not alpha + penalty >= 1:
            raise ValueError(f"penalty must be at least 1 - alpha = {1 - alpha:g}, got {penalty}")
        super().__init__(num_particles, analytic_kl, beta=1 - alpha)
        self.weight = alpha + penalty - 1
        self.scaled = False

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, the terms of the ELBO, and "mmd": that of the batch, once per datum."""
        if len(args[0]) < 2:
            raise Refused("the MMD compares data of a batch: take a batch_size of at least 2")
        drawn = self.draw(guide, args, self.num_particles)
        program.refuse_enumerated(drawn)
        loss, terms = self._bound(model, args, drawn, kl_weight)
        discrepancy = len(args[0]) * mmd(*_codes(model, args, drawn)).mean()
        return loss + self.weight * discrepancy, terms | {"mmd": discrepancy.detach()}


def mmd(z: Tensor, prior: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between two samples, without bias for a given kernel.

    Args:
        z: Draws, `(*, N, D)`.
        prior: Draws of the prior, `(N, D)`, whose mean squared distance scales the kernel.

    Returns:
        Shape `(*)`.
    """
    among_prior = _squared_distances(prior, prior)
    spread = _mean_off_diagonal(among_prior)
    within = _mean_off_diagonal(_kernel(_squared_distances(z, z), spread))
    between = _kernel(_squared_distances(z, prior), spread).mean((-2, -1))
    return within + _mean_off_diagonal(_kernel(among_prior, spread)) - 2 * between


def _kernel(squared: Tensor, spread: Tensor) -> Tensor:
    """Mean of inverse multiquadrics: 1 at distance 0."""
    return torch.stack([s * spread / (s * spread + squared) for s in SCALES]).mean(0)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def _mean_off_diagonal(matrix: Tensor) -> Tensor:
    n = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (matrix.sum((-2, -1)) - diagonal) / (n * (n - 1))


def _codes(model: PyroFunction, args: Args, drawn: Draw) -> tuple[Tensor, Tensor]:
    """All latents of each datum in a row: the guide's, `(K, N, D)`, and the model's, `(N, D)`."""
    _, dreamt = program.simulate(model, args)
    dims = {name: score.fn.event_dim for name, score in drawn.scores.items()}
    z = torch.cat([_flat(drawn.values[name], dim) for name, dim in dims.items()], -1)
    prior = torch.cat([_flat(dreamt[name], dim) for name, dim in dims.items()], -1)
    return z.unflatten(0, (drawn.num_particles, -1)), prior


def _flat(value: Tensor, event_dim: int) -> Tensor:
    """Rows first, and all that a row holds behind: `(rows, D)`."""
    rows = value.movedim(value.dim() - event_dim - 1, 0)
    return rows.reshape(len(rows), -1)
