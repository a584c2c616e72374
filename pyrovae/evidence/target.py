r"""The densities that annealing and Hamiltonian Monte Carlo move between, with their gradients.

A path leads from a base that can be drawn from and has all its constants, the guide or the prior,
to the joint p(x, z), whose missing constant is p(x):

.. math:: \pi_\beta(z) \propto q(z)^{1 - \beta} \, p(x, z)^\beta.

Both are traced once to a graph of tensor operations. What does not depend on the latents (an
encoder, the parameters of a mixture prior) is cut off it and run once for a block of data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae import compiled, program
from pyrovae.evidence.space import Space, summing
from pyrovae.evidence.walk import Walk
from pyrovae.program import Args

STARTS = ("guide", "prior")

COMPILE_ROWS = 3_000_000
"""A run of at least so many gradients, over all data, is compiled: it saves 4 s in a million."""


class Point(NamedTuple):
    """Rows of latents with their densities, nats, and gradients.

    Attributes:
        u: Unconstrained latents, shape `(rows, D)`.
        log_base: Log density of the base in u, shape `(rows,)`.
        log_joint: Log p(x, z) in u, shape `(rows,)`.
        grad_base: Gradient of `log_base`, shape `(rows, D)`.
        grad_joint: Gradient of `log_joint`, shape `(rows, D)`.
    """

    u: Tensor
    log_base: Tensor
    log_joint: Tensor
    grad_base: Tensor
    grad_joint: Tensor

    @property
    def gap(self) -> Tensor:
        """Log p(x, z) less the base's log density: what a change of beta weighs, float64."""
        return self.log_joint.double() - self.log_base.double()

    def log_density(self, beta: Tensor) -> Tensor:
        """Log density of the path at `beta` but for its constant, float64."""
        return self.log_base.double() + beta * self.gap

    def grad(self, beta: Tensor) -> Tensor:
        """Its gradient, shape `(rows, D)`."""
        weight = beta.to(self.u)[:, None]
        return torch.lerp(self.grad_base, self.grad_joint, weight)


Evaluate = Callable[[Tensor], Point]


class Target:
    """The path from a base to the joint density of a walk's data.

    Args:
        walk: Data and programs.
        start: One of `STARTS`.
        num_gradients: Of each datum, by which compiling pays or does not.
        compile: None compiles where it pays.

    Raises:
        ValueError: If the program cannot be moved along a path.
    """

    def __init__(
        self, walk: Walk, start: str = "guide", num_gradients: int = 0, compile: bool | None = None
    ):
        assert start in STARTS
        self.start = start
        self.model, self.guide = walk.programs.model, walk.programs.guide
        self.space = walk.on_few(lambda args: Space(self.model, self.guide, args))
        self.joint = summing(self.model, self.space.summed)
        if start == "guide":
            walk.on_few(self._check_scorable)
        if compile is None:
            compile = len(walk.split) * num_gradients >= COMPILE_ROWS
        self._compile = compile
        self._graphs: dict[int, compiled.Halves | None] = {}

    def draw(self, args: Args) -> Tensor:
        """A draw from the base for each row, shape `(rows, D)`."""
        fn = self.guide if self.start == "guide" else self.joint
        with torch.no_grad():
            return self.space.flatten(program.ancestral(fn, args))

    def densities(self, args: Args, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of base and joint in u, nats, each of shape `(rows,)`."""
        values, log_det = self.space.values(u)
        scores = program.score_sites(self.joint, args, values)
        if self.start == "guide":
            base = program.log_joint(self.guide, args, values)
        else:
            hidden = {name: score for name, score in scores.items() if not score.observed}
            base = program.sum_out(program.total(hidden))
        return base + log_det, program.sum_out(program.total(scores)) + log_det

    def at(self, args: Args) -> Evaluate:
        """Densities and gradients as a function of the latents alone, at these rows of data."""
        rows = len(args[0])
        if rows not in self._graphs:
            kept = partial(program.undisturbed, self.model, self.guide)
            with kept():  # the first block's noise is not to differ from what it is after others
                u, other = self.draw(args), self.draw(args)
            trial = (*(arg.flip(0) for arg in args), other)
            self._graphs[rows] = compiled.compile_halves(
                self._evaluate, (*args, u), trial, len(args), kept, self._compile, "annealing"
            )
        halves = self._graphs[rows]
        if halves is None:
            return lambda u: Point(u, *self._evaluate(*args, u))
        fixed = halves.first(*args)
        return lambda u: Point(u, *halves.rest(*fixed, u))

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *args, u = inputs
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            parts = self.densities(tuple(args), leaf)
            grads = [_gradient(part, leaf) for part in parts]
        return (*(part.detach() for part in parts), *grads)

    def _check_scorable(self, args: Args) -> None:
        """The guide's density at a draw of its own, as a tensor that it has not seen."""
        values, _ = self.space.values(self.draw(args))
        try:
            program.log_joint(self.guide, args, values)
        except (program.Refused, NotImplementedError) as error:
            raise program.Refused(f"{error}; or anneal from the prior, start='prior'") from error


def _gradient(log_density: Tensor, u: Tensor) -> Tensor:
    """Gradient of each row's density for that row; zero where it does not depend on it."""
    total = log_density.sum()
    found = torch.autograd.grad(
        total, u, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found[0]
