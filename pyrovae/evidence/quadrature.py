r"""Gauss-Hermite quadrature of p(x) = \int p(x, z) dz, centred and scaled for each datum.

With nodes t_i and weights w_i of the standard normal, z = m + L t turns the integral into

.. math:: p(x) \approx |L| \sum_i w_i \frac{p(x, m + L t_i)}{N(t_i; 0, I)},

which is exact for a normal posterior of mean m and covariance L L^T, and for one times a
polynomial of degree 2n - 1 in each direction. So m and L are the posterior's own moments as the
rule finds them, again and again until they settle, and then the order is doubled.

References:
    Applications of a Method for the Efficient Computation of Posterior Distributions (Naylor &
    Smith, 1982), doi:10.2307/2347995; Approximations to the Log-Likelihood Function in the
    Nonlinear Mixed-Effects Model (Pinheiro & Bates, 1995), doi:10.1080/10618600.1995.10474663
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from pyrovae.evidence.joint import LogDensity

FIRST, LAST = 8, 128
"""Orders in each direction."""

SETTLING = 50
"""Times that nodes are moved, at most."""

FLOOR = 0.02
"""Least variance in a move, of that before: nodes must see where to go next."""


class Integral(NamedTuple):
    """Integrals of a density of each datum.

    Attributes:
        log_z: Their logarithms, nats, shape `(N,)`.
        error: Of each, nats, shape `(N,)`; infinite where it is not known.
        spent: Evaluations of each density, shape `(N,)`.
    """

    log_z: Tensor
    error: Tensor
    spent: Tensor


def gauss_hermite(
    log_f: LogDensity, draws: Tensor, tolerance: float, max_evaluations: int
) -> Integral:
    """Integrate each datum's density by Gauss-Hermite rules of rising order.

    Args:
        log_f: Log densities.
        draws: From about where the mass is, shape `(S, N, D)`.
        tolerance: Of the result, nats: twice what the last doubling of the order changed.
        max_evaluations: Of each datum's density, at most.
    """
    rule = _settled(_Rule(log_f, draws), max_evaluations)
    log_z = torch.full_like(rule.centre[:, 0], math.nan)
    error = torch.full_like(log_z, math.inf)
    left = torch.arange(len(log_z), device=log_z.device)
    order, dim = FIRST, draws.shape[-1]
    while order <= LAST:
        left = left[rule.spent[left] + order**dim <= max_evaluations]
        if not len(left):
            break
        found = rule.log_terms(left, *_nodes(order, dim, draws)).logsumexp(0)
        change = (found - log_z[left]).abs().nan_to_num(math.inf, posinf=math.inf)
        log_z[left], error[left] = found, 2 * change
        left, order = left[2 * change > tolerance], 2 * order
    return Integral(log_z, error, rule.spent)


class _Rule:
    """Where the nodes of each datum are.

    Attributes:
        centre: m of each, shape `(N, D)`.
        axes: L of each, shape `(N, D, D)`.
        spent: Evaluations so far, shape `(N,)`.
    """

    def __init__(self, log_f: LogDensity, draws: Tensor):
        self.log_f = log_f
        self.centre = draws.mean(0)
        away = draws - self.centre
        cov = torch.einsum("snd,sne->nde", away, away) / len(draws)
        self.axes = torch.linalg.cholesky(cov + 1e-12 * _identity_like(cov) * _trace(cov))
        self.spent = torch.zeros_like(self.centre[:, 0], dtype=torch.long)

    def log_terms(self, which: Tensor, nodes: Tensor, log_w: Tensor) -> Tensor:
        """Logarithms of what the rule sums, shape `(nodes, data)`."""
        centre, axes = self.centre[which], self.axes[which]
        u = centre + torch.einsum("nde,ge->gnd", axes, nodes)
        log_f = self.log_f(which.repeat(len(nodes)), u.flatten(0, 1)).reshape(u.shape[:2])
        self.spent[which] += len(nodes)
        log_normal = -nodes.square().sum(1) / 2 - nodes.shape[1] / 2 * math.log(2 * math.pi)
        volume = torch.linalg.slogdet(axes).logabsdet
        return (
            log_f.nan_to_num(-math.inf, neginf=-math.inf) + (log_w - log_normal)[:, None] + volume
        )


def _settled(rule: _Rule, max_evaluations: int) -> _Rule:
    """Nodes moved to the posterior's moments until these are the ones that they have."""
    nodes, log_w = _nodes(FIRST, rule.centre.shape[1], rule.centre)
    left = torch.arange(len(rule.centre), device=rule.centre.device)
    for _ in range(SETTLING):
        left = left[rule.spent[left] + len(nodes) <= max_evaluations // 4]
        if not len(left):
            break
        mass = rule.log_terms(left, nodes, log_w).softmax(0)
        mean = mass.T @ nodes
        away = nodes[:, None] - mean
        cov = torch.einsum("gn,gnd,gne->nde", mass, away, away)
        # Far from the posterior one node has all the mass: its distance says how far to look.
        cov = cov + torch.einsum("nd,ne->nde", mean, mean) / 2 + FLOOR * _identity_like(cov)
        values, vectors = torch.linalg.eigh(cov)
        stretch = vectors @ (values.sqrt()[:, :, None] * vectors.mT)
        rule.centre[left] += torch.einsum("nde,ne->nd", rule.axes[left], mean)
        rule.axes[left] = rule.axes[left] @ stretch
        moved = mean.abs().amax(1) > 0.01
        left = left[moved | ((values - 1).abs().amax(1) > 0.1)]
    return rule


def _nodes(order: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes `(order^D, D)` and log weights of the standard normal."""
    nodes, weights = (torch.as_tensor(part).to(like) for part in hermegauss(order))
    log_w = weights.log() - math.log(2 * math.pi) / 2
    grid = torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim)
    return grid, torch.cartesian_prod(*[log_w] * dim).reshape(-1, dim).sum(1)


def _identity_like(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1]).to(matrices)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
