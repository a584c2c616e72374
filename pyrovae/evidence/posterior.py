r"""Draws from the posterior p(z|x) of a few data, to look at beside the guide's.

Chains of Hamiltonian Monte Carlo leave the posterior invariant whatever the guide is: it only says
where they start, twice as far from its mean as its own draws, so that chains that agree have
forgotten their starts.

Whether they agree, R-hat says: how much wider all draws together are than those of half a chain.
How many independent draws they are worth is the effective sample size. Both are of ranks, so that
they exist for latents without a variance, and do not depend on the coordinates.

References:
    Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021),
    arXiv:1903.08008
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor
from tqdm import tqdm

from pyrovae import program
from pyrovae.data import as_split
from pyrovae.evidence.sampler import Sampler
from pyrovae.evidence.space import Space
from pyrovae.evidence.target import Target
from pyrovae.evidence.walk import Walk, at_least
from pyrovae.program import Args, PyroFunction

AGREE = 1.01
"""The R-hat up to which chains agree (Vehtari et al., 2021)."""

ENOUGH = 100
"""Effective draws for each chain from which R-hat can be relied on (the same)."""

APART = 1.1
"""The R-hat above which more draws of the same chains hardly help."""

TAILS = (0.05, 0.95)
"""Quantiles whose effective sample size is that of the tails."""

DIAGNOSTICS = ("rhat", "ess", "tail_ess")

Sites = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """Draws from p(z|x) of C chains for each of N data, and whether to believe them.

    Attributes:
        samples: Draws of each site, shape `(C, num_samples, N, *shape)`.
        guide: As many draws from q(z|x), of the same shape.
        rhat: Rank-normalized split R-hat of each latent, shape `(N, *shape)`; NaN for an entry that
            cannot change, such as those above the diagonal of a triangular matrix.
        ess: Effective sample size in the bulk, of the C * num_samples draws, shape `(N, *shape)`.
        tail_ess: The smaller of those of the quantiles at 5 % and 95 %, shape `(N, *shape)`.
        acceptance: Mean probability with which a move of each datum was accepted, shape `(N,)`.
        divergent: Moves of each datum whose energy went off to infinity, shape `(N,)`.
        num_warmup: Moves of each chain before its first draw.
        num_leapfrog: Leapfrog steps of a move, at most.
        seed: Of the noise.
        data: What the data are.
    """

    samples: Sites
    guide: Sites
    rhat: Sites
    ess: Sites
    tail_ess: Sites
    acceptance: Tensor
    divergent: Tensor
    num_warmup: int
    num_leapfrog: int
    seed: int
    data: str = ""

    @property
    def num_chains(self) -> int:
        """C."""
        return len(next(iter(self.samples.values())))

    @property
    def num_samples(self) -> int:
        """Draws of each chain."""
        return next(iter(self.samples.values())).shape[1]

    @property
    def names(self) -> list[str]:
        """What each latent is called, in the order of `vectors`: z[0], z[1] and so on."""
        return [
            f"{name}[{', '.join(map(str, place))}]" if place else name
            for name, value in self.samples.items()
            for place in np.ndindex(value.shape[3:])
        ]

    @property
    def max_rhat(self) -> Tensor:
        """The largest R-hat of each datum, shape `(N,)`."""
        return _worst_rhat(self.rhat).amax(1)

    @property
    def min_ess(self) -> Tensor:
        """The smallest effective sample size of each datum, in bulk or tails, shape `(N,)`."""
        return self._least_ess().amin(1)

    @property
    def converged(self) -> Tensor:
        """For which data R-hat and effective sample size are good enough, shape `(N,)`."""
        return (self.max_rhat <= AGREE) & (self.min_ess >= ENOUGH * self.num_chains)

    def vectors(self, index: int = 0) -> tuple[Tensor, Tensor]:
        """All latents of one datum side by side: draws from the posterior, and from the guide.

        Returns:
            Two tensors of shape `(C * num_samples, D)`, chain after chain.
        """
        count = self.num_chains * self.num_samples
        first, second = (
            torch.cat([v[:, :, index].reshape(count, -1) for v in sites.values()], 1)
            for sites in (self.samples, self.guide)
        )
        return first, second

    def rows(self) -> list[dict[str, Any]]:
        """A row per datum and latent: mean and standard deviation beside the guide's."""
        columns = {
            "mean": _mean(self.samples),
            "std": _std(self.samples),
            "guide_mean": _mean(self.guide),
            "guide_std": _std(self.guide),
            **{kind: _flat(getattr(self, kind)) for kind in DIAGNOSTICS},
        }
        return [
            {"datum": n, "latent": name} | {key: float(of[n, d]) for key, of in columns.items()}
            for n in range(len(self.acceptance))
            for d, name in enumerate(self.names)
        ]

    def arrays(self, index: int = 0) -> dict[str, Tensor]:
        """Draws and diagnostics of one datum, by names for a file: z, guide_z, rhat_z and so on."""
        found = {name: value[:, :, index] for name, value in self.samples.items()}
        found |= {f"guide_{name}": value[:, :, index] for name, value in self.guide.items()}
        for kind in DIAGNOSTICS:
            found |= {f"{kind}_{name}": value[index] for name, value in getattr(self, kind).items()}
        return found

    def __str__(self) -> str:
        """A paragraph to quote."""
        return " ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        count = len(self.acceptance)
        data = ("1 datum" if count == 1 else f"{count:,} data") + f" ({self.data})" * bool(
            self.data
        )
        yield (
            f"{self.num_chains:,} chains of {self.num_samples:,} draws from p(z|x) of {data} by "
            f"Hamiltonian Monte Carlo, up to {self.num_leapfrog:,} leapfrog steps a move "
            f"and {self.num_warmup:,} moves of warm-up (seed {self.seed})."
        )
        rhat, ess = _worst_rhat(self.rhat), self._least_ess()
        yield (
            f"R-hat is at most {float(rhat.max()):.3f} ({self._place(rhat.argmax())}), the "
            f"smallest effective sample size {float(ess.min()):,.0f} "
            f"({self._place(ess.argmin())}); {float(self.acceptance.mean()):.0%} of moves were "
            f"accepted{self._lost()}."
        )
        yield self._verdict()
        yield self._beside()

    def _lost(self) -> str:
        lost = int(self.divergent.sum())
        return f", {lost:,} trajectories diverged" if lost else ""

    def _verdict(self) -> str:
        converged, count = self.converged, len(self.converged)
        if converged.all():
            return "Converged."
        some = f" for {int((~converged).sum()):,} of {count:,} data" if count > 1 else ""
        if (self.max_rhat > APART).any():
            return (
                f"Not converged{some}: the chains are in different places. Take more draws; if "
                "they stay apart, the posterior has modes that no chain travels between, and the "
                "draws do not say how much weight each has."
            )
        return f"Not converged{some}: take more draws."

    def _beside(self) -> str:
        spread = _std(self.samples)
        shift = ((_mean(self.guide) - _mean(self.samples)).abs() / spread).nan_to_num(0.0)
        ratio = (_std(self.guide) / spread).nan_to_num(1.0)
        return (
            f"The guide's means are off by up to {float(shift.max()):.2f} posterior standard "
            f"deviations ({self._place(shift.argmax())}), and its standard deviations are "
            f"{float(ratio.min()):.2f} to {float(ratio.max()):.2f} times the posterior's."
        )

    def _place(self, position: Tensor) -> str:
        datum, latent = divmod(int(position), len(self.names))
        return self.names[latent] + (f" of datum {datum}" if len(self.acceptance) > 1 else "")

    def _least_ess(self) -> Tensor:
        return torch.minimum(_flat(self.ess), _flat(self.tail_ess))


def posterior(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    *,
    num_samples: int = 1000,
    num_chains: int = 4,
    num_warmup: int = 500,
    num_leapfrog: int = 20,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Posterior:
    """Draw from the posterior p(z|x) of each datum by Hamiltonian Monte Carlo.

    For one datum or a few: all their chains move as one batch, and all draws are kept, C *
    num_samples from the posterior and as many from the guide for each latent of each datum. The
    guide need not score anything. Sites marked for enumeration are summed out. Nothing of the
    caller's changes.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        num_samples: Draws of each chain, at least 10.
        num_chains: C, the chains of each datum; R-hat compares at least 2.
        num_warmup: Moves before the first draw, in which step sizes and scales are found, at least
            20.
        num_leapfrog: Leapfrog steps of a move, at most: half as many on average. More go further.
        seed: Of the noise; None takes a new one, recorded in the result.
        dtype: At least float32; `torch.float64` runs on a copy of the modules.
        progress: Show a bar.

    Returns:
        Draws in the model's own space beside the guide's, and diagnostics, on the CPU.

    Raises:
        ValueError: If an argument is out of range, a latent is discrete and not summed out, or the
            model has no density where chains are to start.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # too wide for the posterior, N(x / 2, 1 / 2)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> few = {"num_warmup": 100, "num_leapfrog": 3}
        >>> found = posterior(model, guide, torch.tensor([2.0]), **few, seed=0)
        >>> z = found.samples["z"]
        >>> z.shape, round(float(z.mean()), 1), round(float(z.var()), 1)
        (torch.Size([4, 1000, 1]), 1.0, 0.5)
    """
    num_samples = at_least("num_samples", num_samples, 10)
    num_chains = at_least("num_chains", num_chains, 2)
    num_warmup = at_least("num_warmup", num_warmup, 20)
    num_leapfrog = at_least("num_leapfrog", num_leapfrog, 1)
    split, moves = as_split(x), num_warmup + num_samples
    walk = Walk(model, guide, split, num_chains, seed, dtype, block_size=len(split))
    target = Target(walk, "prior", num_chains * moves * num_leapfrog // 2)

    def sampled(args: Args, index: slice) -> Posterior:
        with tqdm(total=moves, desc="p(z|x)", disable=not progress) as bar:
            sampler = Sampler(target, args, num_chains, num_leapfrog, bar.update)
            sampler.warm_up(num_warmup)
            draws, chances = sampler.run(num_samples)
        samples, drawn = _by_site(target, args, draws)
        return Posterior(
            samples=samples,
            guide=drawn,
            rhat=_each(samples, lambda v: array_stats.rhat(v, 0, 1)),
            ess=_each(samples, lambda v: array_stats.ess(v, 0, 1)),
            tail_ess=_each(samples, lambda v: array_stats.ess(v, 0, 1, method="tail", prob=TAILS)),
            acceptance=chances.mean((0, 1)).cpu(),
            divergent=(chances == 0).sum((0, 1)).cpu(),
            num_warmup=num_warmup,
            num_leapfrog=num_leapfrog,
            seed=walk.seed,
            data=split.description,
        )

    return walk.map(sampled)[0]


def _by_site(target: Target, args: Args, draws: Tensor) -> tuple[Sites, Sites]:
    """Draws `(C, num_samples, N, D)` in the model's own space, and as many from the guide."""
    space, num_samples = target.space, draws.shape[1]
    alike = program.repeat(args, num_samples)
    values = [space.values(chain.flatten(0, 1))[0] for chain in draws]
    guided = [program.ancestral(target.guide, alike) for _ in draws]
    return _joined(space, values, num_samples), _joined(space, guided, num_samples)


def _joined(space: Space, parts: list[Sites], num_samples: int) -> Sites:
    """Values of each chain, draws before data in its rows, as `(C, num_samples, N, *shape)`."""
    by_row = [space.rows_first(part) for part in parts]
    joined = {name: torch.stack([part[name] for part in by_row]) for name in by_row[0]}
    return {name: value.unflatten(1, (num_samples, -1)).cpu() for name, value in joined.items()}


def _each(samples: Sites, diagnostic: Callable[[np.ndarray], np.ndarray]) -> Sites:
    """A diagnostic of each latent's draws."""
    with np.errstate(all="ignore"):  # what never changes has an R-hat of 0 / 0
        return {n: torch.as_tensor(diagnostic(v.double().numpy())) for n, v in samples.items()}


def _mean(sites: Sites) -> Tensor:
    return _flat({name: v.double().mean((0, 1)) for name, v in sites.items()})


def _std(sites: Sites) -> Tensor:
    return _flat({name: v.double().flatten(0, 1).std(0) for name, v in sites.items()})


def _flat(sites: Sites) -> Tensor:
    """A number of each latent, sites side by side: shape `(N, D)`."""
    return torch.cat([v.reshape(len(v), -1) for v in sites.values()], 1)


def _worst_rhat(sites: Sites) -> Tensor:
    """R-hat of each latent, where there is one: shape `(N, D)`."""
    return _flat(sites).nan_to_num(1.0, math.inf)
