r"""log p(x) without chance, where there is a way.

.. math:: p(x) = \sum_y \int p(x, y, z) \, dz

Discrete latents y of few values are summed. The integral over the continuous ones is closed where
log p(x, z) is quadratic in them (a linear decoder with normal noise, in any dimension), and a sum
over a grid where they are three numbers or less. Beyond that no grid is fine enough: each further
dimension multiplies its nodes by twenty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.evidence.joint import ROWS, Joint, LogDensity
from pyrovae.evidence.lattice import Follower
from pyrovae.evidence.method import Estimate, Method
from pyrovae.evidence.quadrature import Integral, gauss_hermite
from pyrovae.evidence.result import LogPx
from pyrovae.evidence.walk import Walk, at_least
from pyrovae.program import Args

RULES = {"adaptive": "an adaptive grid", "gauss-hermite": "adaptive Gauss-Hermite quadrature"}

MAX_DIM = 3
"""Continuous latents that a grid is spread over, at most."""

BLOCK = 32
"""Data in a block: their grids are refined together."""

DRAWS = 64
"""Draws from guide and prior that say where to look first."""

RADII = (1.0, 10.0, 100.0, 1000.0)
"""Standard deviations from the mode at which a log density is tried for being quadratic."""

TRIES = 8
"""Directions at each of them."""

SAME = 1e-9
"""By how much of its size a log density may miss the quadratic: rounding, and no more."""

ROUNDING = 1e-13
"""Of a value's size, what rounding may do to it."""

Road = Callable[[Args], Integral]


class Exact(Method):
    """The value itself, up to a known error: a closed form, a sum, or quadrature.

    For programs whose log p(x) can be computed: linear and normal ones, those with discrete latents
    of few values, those with one to three continuous latents. It finds out which by itself.

    Args:
        rule: Of quadrature: adaptive, a grid that follows the mass wherever it is, or
            gauss-hermite, nodes about the one mode that it comes to from the guide.
        tolerance: Of quadrature: the error at which refining stops, nats.
        max_evaluations: Of quadrature: densities of a datum evaluated at most.
    """

    particles = 1
    dtype = torch.float64

    def __init__(
        self,
        rule: str = "adaptive",
        tolerance: float = 1e-6,
        max_evaluations: int = 200_000,
    ):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if not 1e-12 <= tolerance <= 0.1:
            raise ValueError(f"tolerance must be between 1e-12 and 0.1 nats, got {tolerance}")
        self.rule, self.tolerance = rule, tolerance
        self.max_evaluations = at_least("max_evaluations", max_evaluations, 10_000)

    def describe(self, num_particles: int) -> str:
        """What it may come to; a result says what it did."""
        return "closed form, sum or quadrature"

    def block_size(self, num_particles: int) -> int:
        """As many data as keep grids small and runs of the model long."""
        return BLOCK

    def estimator(self, walk: Walk, compile: bool | None = None) -> Estimate:
        """Integrals of the densities of a block of data.

        Raises:
            Refused: If the program has no way, with the reason.
        """
        if walk.num_particles != 1:
            raise ValueError(
                f"num_particles must be left out for the exact value, got {walk.num_particles}: it "
                "draws none"
            )
        model, guide = walk.programs.model, walk.programs.guide
        joint = walk.on_few(lambda few: Joint(model, guide, few))
        road, how = walk.on_few(lambda few: self._road(joint, few))

        def estimate(args: Args, index: slice) -> LogPx:
            torch.manual_seed(0)  # draws only say where to look: the same places for every seed
            found = road(args)
            if not found.log_z.isfinite().all():
                raise ValueError(
                    f"the integral over the latents of data {index.start} to "
                    f"{index.start + len(found.log_z) - 1} is not a number: check the weights and "
                    "the data"
                )
            unknown = torch.full_like(found.log_z, math.nan)
            result = self.summary(
                walk,
                args,
                index,
                found.log_z[None],
                std_error=found.error,
                ess=unknown,
                khat=unknown,
                gain_per_doubling=unknown,
                spent=found.spent,
                claim="the value",
            )
            return dataclasses.replace(result, how=how)

        return estimate

    def _road(self, joint: Joint, few: Args) -> tuple[Road, str]:
        """The way that this program allows, and its name."""
        torch.manual_seed(0)
        dim, values = joint.space.dim, joint.num_values
        over = f" over {values:,} values of its discrete latents" if values > 1 else ""
        if dim == 0:
            return lambda args: _sum(joint, args), f"a sum{over}"

        def closed(args: Args) -> Integral:
            found = closed_form(joint.at(args), joint.draws(args, 1)[0][0])
            if not found.error.isfinite().all():
                raise program.Refused(
                    "log p(x, z) is quadratic in the latents for the first of the data and not for "
                    "others: take method='annealed'"
                )
            return found

        try:
            closed(few)
        except program.Refused:
            pass
        else:
            return closed, "the closed form of a linear-Gaussian program"
        if dim > MAX_DIM:
            raise program.Refused(
                f"the exact value is out of reach: the program has {dim} continuous latents and is "
                f"not linear-Gaussian, and quadrature takes at most {MAX_DIM}; take "
                "method='annealed'"
            )
        return (
            lambda args: self._integral(joint, args),
            f"{RULES[self.rule]} in {dim} dimension{'s' * (dim > 1)}"
            + (f", with a sum{over}" if over else ""),
        )

    def _integral(self, joint: Joint, args: Args) -> Integral:
        guide, prior = joint.draws(args, DRAWS)
        limits = self.tolerance, self.max_evaluations
        if self.rule == "adaptive":
            found = Follower(joint.at(args), torch.cat([guide, prior]), *limits).integrate()
        else:
            found = gauss_hermite(joint.at(args), guide, *limits)
        return found._replace(spent=found.spent * joint.num_values)


def _sum(joint: Joint, args: Args) -> Integral:
    """The sum over all latents, of which none is continuous."""
    everyone = torch.arange(len(args[0]), device=args[0].device)
    log_z = joint.at(args)(everyone, torch.zeros(len(everyone), 0, device=everyone.device))
    error = ROUNDING * (1 + log_z.abs())
    return Integral(log_z, error, torch.full_like(everyone, joint.num_values))


def closed_form(log_f: LogDensity, start: Tensor) -> Integral:
    r"""Integrate each datum's density if its logarithm is quadratic and has a maximum.

    .. math:: \log \int e^{f(u)} du
        = \max f + \tfrac D2 \log 2\pi - \tfrac12 \log \det(-\nabla\nabla f)

    Gradients at D + 1 places give the second derivatives without error; taken once anywhere and
    once at the maximum, in its own units, they are exact in floating point too.

    Args:
        log_f: Log densities.
        start: Latents to start from, shape `(N, D)`.

    Returns:
        The integrals, and how far the quadratic is off about a standard deviation from the
        maximum. Where it is off by more than rounding, there or further out, that is infinite.
    """
    num_data, dim = start.shape
    same = torch.eye(dim).to(start)
    mode, axes = start, same.expand(num_data, -1, -1)
    quadratic = torch.ones_like(start[:, 0], dtype=torch.bool)
    everyone = torch.arange(num_data, device=start.device)
    for _ in range(2):
        places = torch.cat([mode[None], mode + axes.movedim(2, 0)])
        grads = _gradients(log_f, everyone.repeat(dim + 1), places.flatten(0, 1))
        grads = torch.einsum("nde,gnd->nge", axes, grads.unflatten(0, (dim + 1, -1)))
        precision = grads[:, :1] - grads[:, 1:]
        factor, failed = torch.linalg.cholesky_ex((precision + precision.mT) / 2)
        good = (failed == 0) & factor.isfinite().all((1, 2)) & grads.isfinite().all((1, 2))
        quadratic = quadratic & good
        factor = torch.where(good[:, None, None], factor, same)
        grad = torch.where(good[:, None], grads[:, 0], 0.0)
        mode = mode + (axes @ torch.cholesky_solve(grad[:, :, None], factor))[:, :, 0]
        axes = axes @ torch.linalg.inv(factor).mT
    top, missed, allowed = _missed(log_f, mode, axes)
    quadratic = quadratic & (missed <= allowed).all(0)  # NaN is none
    log_z = top + dim / 2 * math.log(2 * math.pi) + torch.linalg.slogdet(axes).logabsdet
    spent = torch.full_like(everyone, 2 * (dim + 1) + 1 + len(missed))
    error = missed[:TRIES].amax(0) + ROUNDING * (1 + log_z.abs())
    return Integral(log_z, torch.where(quadratic, error, math.inf), spent)


def _missed(log_f: LogDensity, mode: Tensor, axes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum, and how far the quadratic is off and may be around it, shape `(T, N)`."""
    radii = torch.tensor(RADII).to(mode).repeat_interleave(TRIES)
    away = torch.randn(len(radii), *mode.shape, dtype=torch.float64).to(mode)
    away = away / away.norm(dim=2, keepdim=True) * radii[:, None, None]
    away = torch.cat([torch.zeros_like(away[:1]), away])
    places = mode + torch.einsum("nde,tne->tnd", axes, away)
    everyone = torch.arange(len(mode), device=mode.device)
    found = log_f(everyone.repeat(len(away)), places.flatten(0, 1)).unflatten(0, (len(away), -1))
    top, fall = found[0], away.square().sum(2) / 2
    missed = (found - top + fall).abs()
    return top, missed[1:], SAME * (1 + top.abs() + fall[1:])


def _gradients(log_f: LogDensity, owner: Tensor, u: Tensor) -> Tensor:
    """Gradients of log densities, shape `(M, D)`; zero where there are none."""
    grads = []
    for whose, part in zip(owner.split(ROWS), u.split(ROWS), strict=True):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            total = log_f(whose, leaf).sum() + 0 * leaf.sum()
            grads += torch.autograd.grad(total, leaf)
    return torch.cat(grads)
