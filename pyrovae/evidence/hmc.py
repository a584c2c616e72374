r"""Hamiltonian Monte Carlo, for many rows at once.

A row's latents get a random momentum, follow the gradient of its density for a few leapfrog steps,
and stay where they end with the probability that makes the density invariant.

References:
    MCMC Using Hamiltonian Dynamics (Neal, 2011), arXiv:1206.1901
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.evidence.target import Evaluate, Point

JITTER = 0.2
"""A trajectory's steps are longer or shorter by up to this fraction, so that none returns home."""


class Moves(NamedTuple):
    """How far rows are moved.

    Attributes:
        step: Step size of each row, shape `(rows,)`.
        scale: By how much each latent is stretched, shape `(rows, D)`: steps are in units of it.
        num_steps: Leapfrog steps of a trajectory.
    """

    step: Tensor
    scale: Tensor
    num_steps: int


def move(evaluate: Evaluate, start: Point, beta: Tensor, how: Moves) -> tuple[Point, Tensor]:
    """One trajectory of each row, which leaves the path's density at `beta` invariant.

    Args:
        evaluate: Densities and gradients at latents.
        start: Where the rows are.
        beta: Of each row, shape `(rows,)`, float64.
        how: Step sizes.

    Returns:
        Where the rows are now, and the probability with which each was to move.
    """
    momentum = torch.randn_like(start.u)
    jitter = 1 + JITTER * (2 * torch.rand_like(how.step) - 1)
    stride = (how.step * jitter)[:, None] * how.scale
    before = start.log_density(beta) - _kinetic(momentum)
    momentum = momentum + stride / 2 * start.grad(beta)
    point = start
    for last in [False] * (how.num_steps - 1) + [True]:
        point = evaluate(point.u + stride * momentum)
        momentum = momentum + (stride / 2 if last else stride) * point.grad(beta)
    log_ratio = point.log_density(beta) - _kinetic(momentum) - before
    chance = log_ratio.exp().clamp(max=1).nan_to_num(0.0)  # a trajectory off to infinity stays
    accepted = torch.rand_like(chance) < chance
    kept = (_where(accepted, new, old) for new, old in zip(point, start, strict=True))
    return Point(*kept), chance


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(1) / 2


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (new.dim() - 1)), new, old)
