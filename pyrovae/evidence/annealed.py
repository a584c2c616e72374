r"""Annealed importance sampling: chains that walk from the guide to the posterior.

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})
    \bigl[\log p(x, z_{t-1}) - \log q(z_{t-1} \mid x)\bigr]

where z_0 is drawn from q and z_t comes from z_{t-1} by Hamiltonian Monte Carlo, which leaves
:math:`\pi_t \propto q^{1 - \beta_t} p^{\beta_t}` invariant. The mean of w is p(x) without bias,
as that of importance weights is (T = 1), but w varies far less: each step asks only that
neighbouring distributions be close.

The moves must not depend on the chains that they move. So step sizes, and a schedule that is made
for the datum, come from a pilot run under other noise, and are frozen before the weights begin.

References:
    Annealed Importance Sampling (Neal, 2001), arXiv:physics/9803008;
    On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
    arXiv:1611.04273
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.evidence.hmc import Moves, move
from pyrovae.evidence.method import Estimate, Method
from pyrovae.evidence.target import STARTS, Evaluate, Point, Target
from pyrovae.evidence.walk import ROWS, Walk, at_least
from pyrovae.program import Args

SCHEDULES = ("sigmoid", "linear", "adapted")

STEEPNESS = 4.0
"""Of the sigmoid schedule: it is slow at both ends (Wu et al., 2017)."""

PILOT = 20
"""Distributions of the pilot run, at most."""

SETTLING = 10
"""Moves in which the pilot finds the first step size; one at each later distribution."""

DRAWS = 64
"""Draws from the base by which latents are scaled."""

LEAST = 0.1
"""Of the mean spread along a path, what every part of an adapted schedule is taken to have."""


class Plan(NamedTuple):
    """What a block's chains do, decided before they start.

    Attributes:
        betas: From 0 to 1, for each datum, shape `(T + 1, N)`, float64.
        steps: Step sizes at each, shape `(T + 1, N)`.
    """

    betas: Tensor
    steps: Tensor


class Annealed(Method):
    """Annealed importance sampling by Hamiltonian Monte Carlo, with K chains for each datum.

    The one to quote: where importance sampling is off by nats, it is not, and the weights' mean
    is p(x) without bias all the same.

    Args:
        num_distributions: Steps from the start to the posterior.
        start: Where chains start: guide, or prior where the guide cannot score or misses modes.
        schedule: Of the steps: sigmoid, linear, or adapted to each datum on the pilot run.
        num_leapfrog: Gradients in a step: few, for a long trajectory comes back to where it began.
        acceptance: Share of moves that step sizes are tuned for.

    References:
        Annealed Importance Sampling (Neal, 2001), arXiv:physics/9803008; On the Quantitative
        Analysis of Decoder-Based Generative Models (Wu et al., 2017), arXiv:1611.04273
    """

    particles = 16
    unit = "gradients"

    def __init__(
        self,
        num_distributions: int = 100,
        start: str = "guide",
        schedule: str = "sigmoid",
        num_leapfrog: int = 2,
        acceptance: float = 0.65,
    ):
        self.num_distributions = at_least("num_distributions", num_distributions, 1)
        self.num_leapfrog = at_least("num_leapfrog", num_leapfrog, 1)
        for name, value, known in (("start", start, STARTS), ("schedule", schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 < acceptance < 1:
            raise ValueError(f"acceptance must be between 0 and 1, got {acceptance}")
        self.start, self.schedule, self.acceptance = start, schedule, acceptance

    def describe(self, num_particles: int) -> str:
        """Chains, distributions and gradients."""
        return (
            f"annealed importance sampling from the {self.start} with K = {num_particles:,} chains "
            f"of {self.num_distributions:,} distributions and {self.num_leapfrog} leapfrog steps"
        )

    def block_size(self, num_particles: int) -> int:
        """As many data as make the rows that a processor's cache holds."""
        return max(1, ROWS // num_particles)

    def work(self, num_particles: int, ways: int = 1) -> int:
        """Gradients of the pilot's moves and of those that follow it."""
        pilot = SETTLING + min(PILOT, self.num_distributions)
        return num_particles * self.num_leapfrog * (pilot + ways * (self.num_distributions - 1))

    def trial(self, walk: Walk) -> Callable[[Args], Callable[[], int]]:
        """One trajectory of each chain, which goes nowhere."""
        target = self.target(walk, compile=False)

        def begin(args: Args) -> Callable[[], int]:
            rows = program.repeat(args, walk.num_particles)
            evaluate, u = target.at(rows), target.draw(rows)
            still = Moves(torch.zeros_like(u[:, 0]), torch.ones_like(u), self.num_leapfrog)
            point, beta = evaluate(u), torch.ones_like(u[:, 0], dtype=torch.float64)

            def piece() -> int:
                move(evaluate, point, beta, still)
                return len(u) * self.num_leapfrog

            return piece

        return begin

    def estimator(self, walk: Walk, compile: bool | None = None) -> Estimate:
        """Mean weights of chains, a block at a time."""
        chains = self.chains(walk, compile)
        return lambda args, index: self.summary(walk, args, index, chains(args).forward())

    def chains(self, walk: Walk, compile: bool | None = None) -> Callable[[Args], Chains]:
        """A function from a block's data to their chains, planned and not yet begun."""
        target = self.target(walk, compile)
        return lambda args: Chains(self, walk, target, args)

    def target(self, walk: Walk, compile: bool | None = None) -> Target:
        """The path, with its gradients."""
        return Target(walk, self.start, self.work(walk.num_particles), compile)


class Chains:
    """K chains for each datum of a block.

    Args:
        method: Its settings.
        walk: Where K and the size of blocks come from.
        target: The path.
        args: The block's data.
    """

    def __init__(self, method: Annealed, walk: Walk, target: Target, args: Args):
        self.method, self.num_chains, self.num_data = method, walk.num_particles, len(args[0])
        size = min(walk.size, len(walk.split))  # a last block is filled up: one graph serves all
        filled = tuple(arg[torch.arange(size, device=arg.device) % len(arg)] for arg in args)
        self.rows = program.repeat(filled, self.num_chains)
        self.draw = lambda: target.draw(self.rows)
        self.evaluate: Evaluate = target.at(self.rows)
        draws = target.draw(program.repeat(filled, DRAWS)).reshape(DRAWS, size, -1)
        self.scale = draws.std(0).repeat(self.num_chains, 1)
        self.plan = self._plan()

    def forward(self) -> Tensor:
        """Log weights whose mean weight is p(x) without bias: nats, shape `(K, N)`."""
        point = self.evaluate(self.draw())
        betas = self._by_row(self.plan.betas)
        log_w = torch.zeros_like(betas[0])
        for t in range(1, len(betas)):
            log_w = log_w + (betas[t] - betas[t - 1]) * point.gap
            if t < len(betas) - 1:
                point, _ = self._move(point, self.plan, t)
        return self._by_chain(log_w)[:, : self.num_data]

    def backward(self, exact: Tensor) -> Tensor:
        """Log weights whose mean inverse weight is 1 / p(x) without bias: nats, shape `(K, N)`.

        Args:
            exact: A draw from the posterior of each datum, unconstrained, shape `(N, D)`.
        """
        missing = len(self.rows[0]) // self.num_chains - len(exact)
        filled = torch.cat([exact, exact[torch.arange(missing) % len(exact)]])
        point = self.evaluate(filled.repeat(self.num_chains, 1))
        betas = self._by_row(self.plan.betas)
        log_w = torch.zeros_like(betas[0])
        for t in range(len(betas) - 1, 0, -1):
            if t < len(betas) - 1:
                point, _ = self._move(point, self.plan, t)
            log_w = log_w + (betas[t] - betas[t - 1]) * point.gap
        return self._by_chain(log_w)[:, : self.num_data]

    def _plan(self) -> Plan:
        """Tune step sizes, and the schedule if it is to be, on chains of their own."""
        method = self.method
        places = torch.linspace(0, 1, min(PILOT, method.num_distributions) + 1, dtype=torch.float64)
        shape = "sigmoid" if method.schedule == "adapted" else method.schedule
        log_step = self._by_chain(torch.full_like(self.scale[:, 0], 0.5).log())[0]
        betas = _schedule(shape, places)[:, None].expand(-1, len(log_step)).to(log_step.device)
        plan = Plan(betas, torch.zeros_like(betas))
        point, found, spread = self.evaluate(self.draw()), [], []
        for t in range(len(betas)):
            for _ in range(1 if t else SETTLING):
                plan.steps[t] = log_step.exp()
                point, chance = self._move(point, plan, t)
                log_step = log_step + self._by_chain(chance).mean(0) - method.acceptance
            found.append(log_step)
            spread.append(self._by_chain(point.gap).std(0, correction=0))
        wanted = torch.linspace(0, 1, method.num_distributions + 1, dtype=torch.float64)
        if method.schedule == "adapted":
            betas = _adapted(betas, torch.stack(spread), method.num_distributions)
        else:
            betas = _schedule(shape, wanted)[:, None].expand(-1, len(log_step)).to(log_step.device)
        steps = _interpolated(plan.betas, torch.stack(found), betas).exp()
        return Plan(betas, steps.to(self.scale))

    def _move(self, point: Point, plan: Plan, t: int) -> tuple[Point, Tensor]:
        step = self._by_row(plan.steps[t].to(point.u))
        how = Moves(step, self.scale, self.method.num_leapfrog)
        return move(self.evaluate, point, self._by_row(plan.betas[t]), how)

    def _by_row(self, per_datum: Tensor) -> Tensor:
        """A number of each datum, for each of its chains."""
        return per_datum.repeat(*[1] * (per_datum.dim() - 1), self.num_chains)

    def _by_chain(self, per_row: Tensor) -> Tensor:
        """A number of each row, shape `(K, N)`."""
        return per_row.reshape(self.num_chains, -1)


def _schedule(name: str, places: Tensor) -> Tensor:
    """Beta at places from 0 to 1 along a schedule."""
    if name == "linear":
        return places
    ends = torch.tensor([-STEEPNESS, STEEPNESS], dtype=places.dtype).sigmoid()
    return ((STEEPNESS * (2 * places - 1)).sigmoid() - ends[0]) / (ends[1] - ends[0])


def _adapted(betas: Tensor, spread: Tensor, count: int) -> Tensor:
    """Betas between which a datum's weights vary alike, from their spread along a pilot run.

    Args:
        betas: Of the pilot, shape `(P + 1, N)`.
        spread: Standard deviation of `gap` over the chains there, shape `(P + 1, N)`.
        count: How many steps to take.
    """
    spread = spread + LEAST * spread.mean(0) + 1e-6
    lengths = (spread[1:] + spread[:-1]) / 2 * betas.diff(dim=0)
    reached = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)])
    wanted = torch.linspace(0, 1, count + 1, dtype=betas.dtype, device=betas.device)
    found = _interpolated(reached / reached[-1], betas, wanted[:, None].expand(-1, len(betas[0])))
    found[0], found[-1] = 0.0, 1.0
    return found


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Straight lines through points `(P, N)`, read at places `(T, N)` in their range."""
    rows_x, rows_y = x.T.contiguous(), y.T.to(x)
    right = torch.searchsorted(rows_x, at.T.contiguous()).clamp(1, len(x) - 1)
    x0, x1 = rows_x.gather(1, right - 1), rows_x.gather(1, right)
    y0, y1 = rows_y.gather(1, right - 1), rows_y.gather(1, right)
    return (y0 + (y1 - y0) * (at.T - x0) / (x1 - x0)).T
