r"""Bidirectional Monte Carlo: log p(x) between two bounds, on data that the model draws itself.

Data drawn from the model come with a draw from their own posterior: the latents that made them.
From there the estimator runs backwards, and gives 1 / p(x) without bias where it gave p(x): an
upper bound on log p(x) in expectation, beside the lower one. What lies between them is more than
the error of either.

References:
    Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
    arXiv:1511.02543
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import program
from pyrovae._random import ASIDE, key
from pyrovae.evidence import diagnostics
from pyrovae.evidence.annealed import Annealed
from pyrovae.evidence.cost import Forecast, forecast
from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.evidence.estimate import log_px, method_of
from pyrovae.evidence.identity import kept_in
from pyrovae.evidence.method import Estimate, Method
from pyrovae.evidence.result import LogPx
from pyrovae.evidence.space import Space, summing
from pyrovae.evidence.walk import Walk, at_least
from pyrovae.program import Args, PyroFunction

ABOVE = Annealed()
"""What bounds from above where the estimator that is judged cannot."""


class Bidirectional(Annealed):
    """Annealed importance sampling in both directions, on data that the model draws itself.

    Tells how far annealing with these settings is from the truth: see `evidence.validate`.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
        arXiv:1511.02543
    """

    simulates = True

    def estimator(self, walk: Walk, compile: bool | None = None) -> Estimate:
        """Refused."""
        raise ValueError(
            "bidirectional Monte Carlo needs data whose latents are known, drawn from the model: "
            "take evidence.validate for it, and method='annealed' for data of your own"
        )


@dataclass(frozen=True)
class Bracket:
    """Lower and upper bounds on log p(x) of data drawn from the model, nats.

    Attributes:
        lower: The estimate that is judged: a lower bound in expectation.
        upper: Annealing run backwards: an upper bound in expectation, shape `(N,)`.
        how: Which annealing that was.
        upper_std_error: Monte Carlo standard error of each, shape `(N,)`. It lacks a part: all
            chains of a datum come from one draw of its posterior. That of the mean, which
            `summary` gives, is taken from the spread of the gap over the data and lacks nothing.
        x: The data that were drawn, as model and guide take them.
    """

    lower: LogPx
    upper: Tensor
    upper_std_error: Tensor
    how: str
    x: Args

    @property
    def gap(self) -> Tensor:
        """Upper less lower bound of each datum; single ones may be out of order by chance."""
        return self.upper - self.lower.values

    @property
    def gap_std_error(self) -> float:
        """Standard error of the mean gap, over data and noise; NaN for one datum."""
        return error_of_mean(self.gap)

    def summary(self) -> dict[str, Any]:
        """The numbers over all data, ready for JSON."""
        return {
            "lower": self.lower.mean,
            "lower_std_error": self.lower.mean_std_error,
            "upper": float(self.upper.mean()),
            "upper_std_error": self.gap_std_error,
            "gap": float(self.gap.mean()),
            "gap_std_error": self.gap_std_error,
            "gap_largest": float(self.gap.max()),
            "method": self.lower.method,
            "how": self.lower.how,
            "above": self.how,
            "settings": self.lower.settings,
            "num_particles": self.lower.num_particles,
            "seed": self.lower.seed,
            "num_data": len(self.gap),
        }

    def rows(self) -> list[dict[str, float]]:
        """A row for each datum."""
        columns = {
            "lower": self.lower.values,
            "lower_std_error": self.lower.std_error,
            "upper": self.upper,
            "upper_std_error": self.upper_std_error,
            "gap": self.gap,
        }
        return [
            {"index": i, **dict(zip(columns, numbers, strict=True))}
            for i, numbers in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True))
        ]

    def __str__(self) -> str:
        """A paragraph to quote."""
        return " ".join(self._sentences())

    @property
    def _the_same(self) -> str:
        return "the same" if self.how == self.lower.how else self.how

    def _sentences(self) -> Iterator[str]:
        found = self.summary()
        yield (
            f"Between {found['lower']:.2f} and {found['upper']:.2f} nats lies the mean log p(x) of "
            f"{len(self.gap):,} data drawn from the model, bounded in expectation from below by "
            f"{self.lower.how}, and from above by {self._the_same} backwards (seed "
            f"{self.lower.seed})."
        )
        gap, error = found["gap"], self.gap_std_error
        if math.isnan(error):
            yield f"Gap {gap:.3f} nats."
            return
        yield (
            f"Gap {gap:.3f} nats (standard error {error:.3f}): on such data the estimate is, in "
            f"expectation, no more than {max(gap, 0) + 2 * error:.3f} nats below the truth. Data "
            "that the model would not draw can be harder."
        )


def validate(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_particles: int | None = None,
    *,
    method: str | Method = "annealed",
    num_data: int = 100,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    shared: bool = False,
    progress: bool = False,
    keep: str | Path | None = None,
    announce: Callable[[Forecast], None] | None = None,
) -> Bracket:
    """How far an estimator is from the truth, on data that the model draws itself.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data that the drawn ones take shape and conditions from: what the model observes as it is
            is drawn anew, other arguments stay.
        num_particles: K; None takes the method's own.
        method: What to judge: "annealed", which is run backwards for the bound from above, or
            another, to which annealing gives one.
        num_data: How many data to draw.
        seed: Of the noise; None takes a new one.
        dtype: At least float32; `torch.float64` runs on a copy of the modules.
        compile: Compile what runs many times; None does where it pays.
        shared: Divide the data among the processes of torch's process group.
        progress: Show a bar.
        keep: A file that keeps blocks as they are done, as for `log_px`.
        announce: Is told what it will cost, as by `log_px`.

    Raises:
        ValueError: If an argument is out of range, the program cannot be annealed, or the file
            holds part of another estimate.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
        arXiv:1511.02543
    """
    judged = method_of(method)
    above = judged if isinstance(judged, Annealed) else ABOVE
    k = at_least("num_particles", judged.particles if num_particles is None else num_particles, 1)
    at_least("num_data", num_data, 1)
    given = seed
    drawn, exact, seed = _simulated(model, guide, x, num_data, seed, dtype, shared)
    chains = k if above is judged else above.particles
    walk = Walk(model, guide, drawn, chains, seed, dtype, above.block_size(chains))
    begin = above.chains(walk, compile)

    def bounds(args: Args, index: slice) -> tuple[LogPx | None, Tensor, Tensor]:
        here = begin(args)
        lower = above.summary(walk, args, index, here.forward()) if above is judged else None
        inverse = -here.backward(exact[index])
        return lower, -diagnostics.log_mean_exp(inverse), diagnostics.std_error(inverse)

    kept = kept_in(
        keep, walk, given, shared, bounds_by=f"{above.identity} {judged.identity}", compile=compile
    )
    if announce and (
        told := forecast(walk, above, kept, ways=1 + (above is judged), shared=shared)
    ):
        announce(told)
    found = walk.map(bounds, "bounds", progress, shared=shared, kept=kept)
    parts, upper, errors = zip(*found, strict=True)
    if above is judged:
        lower = LogPx.join(parts)
    else:
        how: dict[str, Any] = {"dtype": dtype, "compile": compile, "progress": progress}
        lower = log_px(model, guide, drawn, k, method=judged, seed=seed, shared=shared, **how)
    return Bracket(lower, torch.cat(upper), torch.cat(errors), above.describe(chains), drawn)


def _simulated(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_data: int,
    seed: int | None,
    dtype: torch.dtype | None,
    shared: bool,
) -> tuple[Args, Tensor, int]:
    """Data drawn from the model, the unconstrained latents that made them, and the seed."""
    walk = Walk(model, guide, x, 1, seed, dtype, block_size=num_data, blocks=[0])
    here = walk.programs
    space = walk.on_few(lambda args: Space(here.model, here.guide, args))

    def simulate(args: Args, _: slice) -> tuple[Args, Tensor]:
        torch.manual_seed(key(walk.seed, ASIDE))  # the estimate has the noise of the blocks
        rows = tuple(arg[torch.arange(num_data, device=arg.device) % len(arg)] for arg in args)
        drawn, latents = program.simulate(summing(here.model, space.summed), rows)
        kept = {name: value for name, value in latents.items() if name in space.names}
        return drawn, space.flatten(kept)

    ((drawn, exact),) = walk.map(simulate, shared=shared)
    return drawn, exact, walk.seed
