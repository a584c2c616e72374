"""Chains of Hamiltonian Monte Carlo that tune themselves, stop doing so, and are then kept.

Step sizes are found by stochastic approximation (Robbins & Monro, 1951), one for each datum; each
latent is stretched by the spread that it was seen to have. Trajectories differ in length: those of
one length can come back to where they began, again and again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.evidence.hmc import Moves, move
from pyrovae.evidence.target import Point, Target
from pyrovae.program import Args

WIDER = 2.0
"""How much further than the guide's own draws from their mean chains start."""

DRAWS = 64
"""Draws from the guide by which that mean, and the first scale, are known."""

ACCEPTANCE = 0.8
"""Share of moves that step sizes are tuned for."""

ENDS = (1 / 8, 1 / 4, 1 / 2, 7 / 8, 1)
"""Where windows of the warm-up end: after each but the last the latents are scaled anew."""

HELD = 5
"""Draws that the scale before counts for when a new one is made."""


class Sampler:
    """C chains for each of N data: row `c * N + n` is chain c of datum n.

    Args:
        target: Whose joint density is sampled.
        args: Data.
        num_chains: C.
        num_leapfrog: Leapfrog steps of a move, at most: any number from 1 is as likely.
        tick: Called after each move.

    Raises:
        ValueError: If a chain has nowhere to start from.
    """

    def __init__(
        self,
        target: Target,
        args: Args,
        num_chains: int,
        num_leapfrog: int,
        tick: Callable[[], object],
    ):
        self.num_chains, self.num_leapfrog, self.tick = num_chains, num_leapfrog, tick
        self.space, self.guide = target.space, target.guide
        rows = program.repeat(args, num_chains)
        self._evaluate = target.at(rows)
        seen = self.space.flatten(program.ancestral(self.guide, program.repeat(args, DRAWS)))
        seen = seen.reshape(DRAWS, len(args[0]), -1)
        spread = seen.std(0)
        self.scale = torch.where(spread > 0, spread, 1.0)
        self.log_step = torch.full_like(spread[:, 0], 0.5).log()
        self._point = self._start(seen.mean(0), rows)
        self._beta = torch.ones_like(self._point.gap)

    def warm_up(self, num_moves: int) -> None:
        """Find step sizes and scales in so many moves."""
        ends = [round(num_moves * share) for share in ENDS]
        *windows, last = [end - start for start, end in itertools.pairwise([0, *ends])]
        for count in windows:
            self._rescale(self._tune(count))
        self._tune(last)

    def run(self, num_moves: int) -> tuple[Tensor, Tensor]:
        """Move, step sizes and scales as they are.

        Returns:
            Where the chains were, unconstrained, shape `(C, num_moves, N, D)`, and the probability
            with which each move was accepted, shape `(C, num_moves, N)`.
        """
        visited = [self._move() for _ in range(num_moves)]
        found = (torch.stack(parts) for parts in zip(*visited, strict=True))
        draws, chances = (v.unflatten(1, (self.num_chains, -1)).transpose(0, 1) for v in found)
        return draws, chances

    def _start(self, center: Tensor, rows: Args) -> Point:
        """Draws from the guide, pulled away from its mean wherever that leaves a density."""
        own = self.space.flatten(program.ancestral(self.guide, rows))
        center = center.repeat(self.num_chains, 1)
        wide = center + WIDER * (own - center)
        usable = _is_finite(self._evaluate(wide))[:, None]
        point = self._evaluate(torch.where(usable, wide, own))
        if not _is_finite(point).all():
            raise program.Refused(
                "log p(x, z) or its gradient is not a finite number at draws from the guide: "
                "chains have nowhere to start from. Check the weights and the data"
            )
        return point

    def _tune(self, num_moves: int) -> Tensor:
        """Move while finding a step size for each datum; where the chains were."""
        visited, tried = [], []
        for i in range(num_moves):
            u, chance = self._move()
            excess = chance.reshape(self.num_chains, -1).mean(0) - ACCEPTANCE
            self.log_step = self.log_step + excess.to(u) / math.sqrt(i + 1)
            visited.append(u)
            tried.append(self.log_step)
        self.log_step = torch.stack(tried[len(tried) // 2 :]).mean(0)
        return torch.stack(visited)

    def _rescale(self, draws: Tensor) -> None:
        """Stretch each latent by the spread of its draws `(num_moves, C * N, D)`."""
        pooled = draws.reshape(-1, *self.scale.shape)
        held = HELD / (HELD + len(pooled))
        self.scale = torch.lerp(pooled.var(0), self.scale.square(), held).sqrt()

    def _move(self) -> tuple[Tensor, Tensor]:
        chains = self.num_chains
        step, scale = self.log_step.exp().repeat(chains), self.scale.repeat(chains, 1)
        length = int(torch.randint(self.num_leapfrog, ())) + 1
        how = Moves(step, scale, length)
        self._point, chance = move(self._evaluate, self._point, self._beta, how)
        self.tick()
        return self._point.u, chance


def _is_finite(point: Point) -> Tensor:
    """Which rows have a density and a gradient."""
    return point.log_joint.isfinite() & point.grad_joint.isfinite().all(1)
