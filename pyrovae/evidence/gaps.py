r"""Where the nats go between log p(x) and a guide's ELBO.

.. math:: \log p(x) - ELBO(q) = \underbrace{\log p(x) - ELBO(q^*)}_{approximation}
    + \underbrace{ELBO(q^*) - ELBO(q)}_{amortization}, \qquad
    q^*_n = \arg\max_{q} ELBO_n(q)

The sum, KL(q(z|x) || p(z|x)), is the inference gap. Its first part is the price of the guide's
family, to be had back by a richer one; its second that of one network for all data, to be had back
by a larger one, or longer training.

q and q* are drawn with the same noise, so that the error of the amortization gap is that of the
difference of two log weights at one draw, and small where q* is near q.

References:
    Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018), arXiv:1801.03558
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import program
from pyrovae._random import key
from pyrovae.evidence.estimate import log_px, method_of
from pyrovae.evidence.method import Method
from pyrovae.evidence.refine import refine, unrefined
from pyrovae.evidence.result import CLAIMS, RELIABLE, LogPx, OverData
from pyrovae.evidence.walk import ROWS, Walk, at_least
from pyrovae.program import Args, PyroFunction


@dataclass(frozen=True)
class Nats(OverData):
    """A number of each datum, with its error.

    Attributes:
        values: Nats, shape `(N,)`.
        std_error: Monte Carlo standard error of each, shape `(N,)`.
    """

    values: Tensor
    std_error: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> Nats:
        """The mean of draws, shape `(K, N)`."""
        return cls(draws.mean(0), draws.std(0) / math.sqrt(len(draws)))

    @classmethod
    def join(cls, parts: Sequence[Nats]) -> Nats:
        """Those of consecutive blocks of data together."""
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in ("values", "std_error")))

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean: other noise, same data."""
        return float(self.std_error.square().sum().sqrt()) / len(self.values)

    def __str__(self) -> str:
        """Mean, and in brackets its errors from Monte Carlo and from the choice of data."""
        known = [f"{e:.{d}f}" for e, d in self._errors() if not math.isnan(e)]
        return f"{self.mean:.2f}" + (f" ({', '.join(known)})" if known else "")

    def _errors(self) -> list[tuple[float, int]]:
        return [(self.mean_std_error, 3), (self.test_std_error, 2)]


@dataclass(frozen=True)
class Gaps:
    """What a guide loses of log p(x), and where.

    Attributes:
        log_px: Log p(x), with what is needed to judge it.
        elbo: ELBO of the guide.
        refined_elbo: ELBO of the guide refined for each datum.
        amortization: The second less the first: lost by predicting q(z|x) for all data at once.
        elbo_particles: Draws per datum that the ELBOs are means of.
        steps: In which the guide was refined.
        data: What the data are.
    """

    log_px: LogPx
    elbo: Nats
    refined_elbo: Nats
    amortization: Nats
    elbo_particles: int
    steps: int
    data: str = ""

    @property
    def approximation(self) -> Nats:
        """Log p(x) less the refined guide's ELBO: lost by the family. At least, if a bound."""
        return self._below_log_px(self.refined_elbo)

    @property
    def inference(self) -> Nats:
        """Log p(x) less the guide's ELBO: all that is lost. At least, if a bound."""
        return self._below_log_px(self.elbo)

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self.log_px.seed

    def rows(self) -> list[dict[str, Any]]:
        """A row per datum."""
        columns: dict[str, Tensor] = {}
        for name, found in self._columns().items():
            columns |= {name: found.values, f"{name}_std_error": found.std_error}
        numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"index": i} | dict(zip(columns, row, strict=True)) for i, row in enumerate(numbers)
        ]

    def summary(self) -> dict[str, Any]:
        """The numbers over all data, ready for JSON."""
        means: dict[str, Any] = {}
        for name, found in self._columns().items():
            means[name] = found.mean
            means[f"{name}_mean_std_error"] = found.mean_std_error
            means[f"{name}_test_std_error"] = found.test_std_error
        return means | {
            "num_data": len(self.elbo.values),
            "elbo_particles": self.elbo_particles,
            "steps": self.steps,
            "seed": self.seed,
            "data": self.data,
            "estimate": self.log_px.summary(),
        }

    def __str__(self) -> str:
        """A paragraph to quote."""
        n, claim = len(self.elbo.values), self.log_px.claim
        sentences = [
            f"log p(x) {CLAIMS[claim]} {self.log_px.mean:.2f} nats per datum, ELBO "
            f"{self.elbo.mean:.2f}: the inference gap is {self.inference}.",
            f"Approximation gap {self.approximation}, which the best member of the guide's family "
            f"for each datum leaves; amortization gap {self.amortization}, which one network for "
            "all data adds.",
            "Standard errors from Monte Carlo and from the choice of data in brackets; mean over "
            f"{n:,} data" + (f" ({self.data})." if self.data else "."),
            f"The guide was refined in {self.steps:,} steps, the ELBOs are means of "
            f"{self.elbo_particles:,} draws, and log p(x) is {claim} by {self.log_px.how}, as "
            f"refined (seed {self.seed}).",
            *self._caution(),
        ]
        return " ".join(sentences)

    def _caution(self) -> list[str]:
        if self.log_px.claim != "a lower bound":
            return []
        words = ["The inference and the approximation gap are lower bounds, as log p(x) is."]
        if self.log_px.num_unreliable:
            words.append(
                f"k-hat is above {RELIABLE} for {self.log_px.num_unreliable:,} of "
                f"{len(self.elbo.values):,} data: there they may be larger by an unknown amount."
            )
        return words

    def _columns(self) -> dict[str, Nats]:
        return {
            "log_px": Nats(self.log_px.values, self.log_px.std_error),
            "elbo": self.elbo,
            "refined_elbo": self.refined_elbo,
            "approximation_gap": self.approximation,
            "amortization_gap": self.amortization,
            "inference_gap": self.inference,
        }

    def _below_log_px(self, bound: Nats) -> Nats:
        """Log p(x) less a bound, under noise of its own."""
        std_error = torch.hypot(self.log_px.std_error, bound.std_error)
        return Nats(self.log_px.values - bound.values, std_error)


def gaps(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    *,
    method: str | Method = "annealed",
    num_particles: int | None = None,
    elbo_particles: int = 1000,
    steps: int = 200,
    seed: int | None = None,
    progress: bool = False,
) -> Gaps:
    """Split log p(x) less the guide's ELBO into approximation and amortization gap, per datum.

    The best of the family is what `refine` finds in `steps` steps: more of them can only raise the
    amortization gap and lower the approximation gap. Log p(x) is estimated from the refined guide.
    Nothing of the caller's changes.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x, whose sites can be differentiated through.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        method: Of estimating log p(x), as in `log_px`. Where it is a lower bound, so are the
            approximation and the inference gap.
        num_particles: K of that estimate; None takes the method's own.
        elbo_particles: Draws per datum that the ELBOs are means of.
        steps: In which the guide is refined.
        seed: Of the noise; None takes a new one.
        progress: Show bars.

    Raises:
        ValueError: If an argument is out of range, or the program cannot be refined or scored.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior N(x / 2, 1 / 2) is of this family
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.5**0.5))
        >>> found = gaps(model, guide, torch.tensor([0.0, 1.0]), method="importance", seed=0)
        >>> found.approximation.values.abs().max() < 1e-3  # KL(q || p(z|x)) is 0.09
        tensor(True)
        >>> round(found.amortization.mean, 2)
        0.1

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018), arXiv:1801.03558
    """
    method, draws = method_of(method), at_least("elbo_particles", elbo_particles, 2)
    given = Walk(model, guide, x, draws, seed)
    here = given.seed
    refined = refine(model, guide, given.split, steps=steps, seed=key(here, 0), progress=progress)
    walk = Walk(*refined, draws, key(here, 1))
    blocks = walk.map(lambda args, _: _bounds(walk, args), "gaps", progress)
    before, after, gain = map(Nats.join, zip(*blocks, strict=True))
    log_det = walk.split.log_det.to(before.values)
    return Gaps(
        log_px=log_px(*refined, num_particles, method=method, seed=here, progress=progress),
        elbo=replace(before, values=before.values + log_det),
        refined_elbo=replace(after, values=after.values + log_det),
        amortization=gain,
        elbo_particles=draws,
        steps=steps,
        data=given.split.description,
    )


def _bounds(walk: Walk, args: Args) -> tuple[Nats, Nats, Nats]:
    """ELBO of the guide as it was and as it is refined, and what that gained."""
    refined, noise, found = walk.programs.guide, int(torch.randint(2**31, ())), []
    for guide in (unrefined(refined), refined):
        torch.manual_seed(noise)
        log_w = program.log_weights(walk.programs.model, guide, args, walk.num_particles, ROWS)
        found.append(log_w.double())
    before, after = found
    return Nats.of(before), Nats.of(after), Nats.of(after - before)
