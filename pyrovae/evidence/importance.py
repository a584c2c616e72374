r"""Importance-weighted bounds on log p(x).

.. math:: L_K = \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

is a lower bound of log p(x) in expectation for every K, is the ELBO for K = 1, and rises to
log p(x) with K. The data are walked in blocks of a few: a block's log weights are kept whole, so
every statistic is one expression, and memory depends neither on the number of data nor much on K.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence import diagnostics
from pyrovae.evidence.method import Estimate, Method
from pyrovae.evidence.noise import COPIES
from pyrovae.evidence.proposals import Proposal, from_guide, from_mixture, from_noise, strata
from pyrovae.evidence.result import PER_DATUM, RELIABLE, LogPx
from pyrovae.evidence.walk import ROWS, Walk, at_least
from pyrovae.program import Args

AT_MOST = 100
"""Times K that a datum gets where a target is set and no limit."""


class Importance(Method):
    """Importance sampling from the guide: a mean of K weights p(x, z) / q(z|x).

    Cheap, and right where the guide is near the posterior, which k-hat tells. Only draws from the
    guide as it is are compiled.

    Args:
        widen: How many times as wide the normal noise of the guide is drawn, for guides that are
            narrower than the posterior. A normal guide comes out with so many times its standard
            deviation, which is q(z|x) tempered by the power 1 / widen^2. Normal distributions and
            flows of all kinds have such noise; a low-rank normal has more of it than latents, and
            more varied weights for that, without bias all the same.
        defensive: Share of draws that come from the prior and not from the guide, each weighed by
            the mixture of both: no weight is above p(x|z) / defensive. For guides that score any z.
        sobol: Make the guide's noise of scrambled Sobol points, whose means are less noisy, most of
            all with few latents and smooth densities. The error is that of 32 independent
            randomizations; rare large weights, which it misses, make it too small from a k-hat of
            about 0.4 on. Best with K 32 times a power of two; 4,096 where none is given.
        smooth: Put quantiles of a fitted Pareto distribution in the place of the largest weights:
            less noise, for a bias. The result is then an estimate and no lower bound.
        target_std_error: Nats. Data with a larger standard error after K draws, or none to be
            believed (k-hat above 0.7, or too few draws for it), get twice as many, and again. To
            stop by the error favours draws without rare large weights: a small bias downward, the
            smaller the larger K.
        max_particles: Draws of a datum at most, a multiple of K or rounded down to one; None takes
            100 times K. Only with `target_std_error`.

    Raises:
        ValueError: If an argument is out of range, or two do not go together.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519;
        Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995);
        Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach & Guibas, 1995);
        Scrambled Net Variance for Integrals of Smooth Functions (Owen, 1997);
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646
    """

    particles = 5000

    def __init__(
        self,
        widen: float = 1.0,
        defensive: float = 0.0,
        sobol: bool = False,
        smooth: bool = False,
        target_std_error: float | None = None,
        max_particles: int | None = None,
    ):
        if not 0 < widen < math.inf:
            raise ValueError(f"widen must be positive, got {widen}")
        if not 0 <= defensive < 1:
            raise ValueError(f"defensive must be at least 0 and less than 1, got {defensive}")
        if defensive and (widen != 1 or sobol):
            raise ValueError(
                "defensive does not go with widen or sobol: of a widened guide only the density of "
                "its own draws is known, and of Sobol points only the error without a mixture"
            )
        if target_std_error is not None and not target_std_error > 0:
            raise ValueError(f"target_std_error must be positive, got {target_std_error}")
        if max_particles is not None:
            if target_std_error is None:
                raise ValueError(
                    "max_particles limits what target_std_error asks for: give both, or set the "
                    "number of draws by num_particles"
                )
            max_particles = at_least("max_particles", max_particles, 1)
        self.widen, self.defensive, self.sobol, self.smooth = widen, defensive, sobol, smooth
        self.target_std_error, self.max_particles = target_std_error, max_particles
        if sobol:
            self.particles = 4096
        if target_std_error is not None:
            self.unit = "particles at most"

    def describe(self, num_particles: int) -> str:
        """Particles, and where they come from."""
        how = "importance sampling from the guide"
        if self.widen != 1:
            how += f" {self.widen:g} times as wide"
        if self.defensive:
            how += f" and, for {self.defensive:.3g} of the draws, the prior"
        k = f"{num_particles:,}"
        if self.target_std_error is not None:
            k += f" to {self._most(num_particles):,}"
        where = " at scrambled Sobol points" if self.sobol else ""
        return f"{'Pareto-smoothed ' if self.smooth else ''}{how} with K = {k} particles{where}"

    def work(self, num_particles: int, ways: int = 1) -> int:
        """Particles, at most."""
        return ways * self._most(num_particles)

    def trial(self, walk: Walk) -> Callable[[Args], Callable[[], int]]:
        """As many particles as run at once."""
        proposal = self._proposal(walk, compile=False)

        def begin(args: Args) -> Callable[[], int]:
            more, data = proposal(args), torch.arange(len(args[0]))
            count = min(walk.num_particles, max(1, ROWS // len(data)))
            return lambda: more(data, 0, count).numel()

        return begin

    def estimator(self, walk: Walk, compile: bool | None = None) -> Estimate:
        """Mean weights with their diagnostics, a block at a time."""
        k, most = walk.num_particles, self._most(walk.num_particles)
        proposal = self._proposal(walk, compile)

        def estimate(args: Args, index: slice) -> LogPx:
            more, data, parts = proposal(args), torch.arange(len(args[0])), []
            order, log_w = data[:0], more(data, 0, k)
            while True:
                found = self._found(walk, args, index.start + data, log_w)
                again = self._is_open(found) & (len(log_w) < most)
                parts.append(_of(found, ~again))
                order = torch.cat([order, data[~again]])
                if not again.any():
                    return _of(_joined(parts), order.argsort())
                data, drawn = data[again], len(log_w)
                further = more(data, drawn, min(drawn, most - drawn))
                log_w = torch.cat([log_w[:, again], further])

        return estimate

    def _proposal(self, walk: Walk, compile: bool | None) -> Proposal:
        if self.defensive:
            return from_mixture(walk, strata(self.defensive, walk.num_particles))
        if self.widen != 1 or self.sobol:
            return from_noise(walk, self.widen, self._copies(walk.num_particles))
        return from_guide(walk, compile)

    def _found(self, walk: Walk, args: Args, index: Tensor, log_w: Tensor) -> LogPx:
        """The mean weights of some of a block's data."""
        log_w = log_w.double()
        error = self._std_error(walk.num_particles, log_w)
        found = self.summary(walk, args, index, log_w, std_error=error)
        if not self.smooth:
            return found
        smoothed = diagnostics.smoothed(log_w, found.khat)
        change = diagnostics.log_mean_exp(smoothed) - diagnostics.log_mean_exp(log_w)
        return dataclasses.replace(
            found,
            values=found.values + change.nan_to_num(0.0),  # both may be -inf
            std_error=self._std_error(walk.num_particles, smoothed),
            claim="an estimate",
        )

    def _std_error(self, num_particles: int, log_w: Tensor) -> Tensor:
        if self.sobol:
            return diagnostics.std_error_of_copies(log_w, self._copies(num_particles))
        if self.defensive:
            of_prior = strata(self.defensive, num_particles).to(log_w.device)
            return diagnostics.std_error_of_strata(
                log_w, of_prior.repeat(len(log_w) // num_particles)
            )
        return diagnostics.std_error(log_w)

    def _is_open(self, found: LogPx) -> Tensor:
        """Which data's errors are too large, or not known."""
        target = math.inf if self.target_std_error is None else self.target_std_error
        return ~((found.khat <= RELIABLE) & (found.std_error <= target)).cpu()

    def _copies(self, num_particles: int) -> int:
        """Randomizations of the Sobol points."""
        return min(COPIES, num_particles) if self.sobol else 0

    def _most(self, num_particles: int) -> int:
        """Draws of a datum at most: K, or a multiple of it."""
        if self.target_std_error is None:
            return num_particles
        limit = self.max_particles or AT_MOST * num_particles
        if limit < num_particles:
            raise ValueError(
                f"max_particles must be at least num_particles, {num_particles:,}, got {limit:,}"
            )
        return limit - limit % num_particles


def _joined(parts: list[LogPx]) -> LogPx:
    """The estimates of data of one block, side by side."""
    joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in PER_DATUM}
    return dataclasses.replace(parts[0], **joined)


def _of(found: LogPx, data: Tensor) -> LogPx:
    """The estimates of some data."""
    some: dict[str, Any] = {name: getattr(found, name)[data] for name in PER_DATUM}
    return dataclasses.replace(found, **some)
