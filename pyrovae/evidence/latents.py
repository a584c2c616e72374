r"""What the latents carry: rate and distortion, latent by latent, and mutual information.

The ELBO splits into what it costs to say z and what is lost of x, and its rate once more (Hoffman
& Johnson) into what z tells of x and how far all codes together, :math:`q(z) = \tfrac1N \sum_n
q(z|x_n)`, are from the prior:

.. math:: -ELBO = \underbrace{E\, KL(q(z|x) \| p(z))}_{rate}
    + \underbrace{E_q[-\log p(x|z)]}_{distortion}, \qquad
    rate = \underbrace{I_q(x; z)}_{\le \log N} + \underbrace{KL(q(z) \| p(z))}_{marginal\ KL}

References:
    Fixing a Broken ELBO (Alemi et al., 2018), arXiv:1711.00464;
    ELBO Surgery (Hoffman & Johnson, 2016);
    active units: Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from pyrovae import program
from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.evidence.walk import ROWS, Walk
from pyrovae.program import Args, Draw, PyroFunction, Score

ACTIVE = 0.01
"""A latent is active if the variance of its posterior mean over the data is above this."""

NOTHING = 0.01
"""Nats: a latent that is not active and costs less has collapsed to the prior."""

PAIRED = 1000
"""Data, at most, whose codes are scored under each other's posterior."""

WORK = 6.25e6
"""Numbers, about, that scoring the pairs may take where latents depend on each other."""

NUMBERS = 40_000
"""Latents, about, scored at once: a spline makes hundreds of numbers of each."""

NEAR = 1.0
"""So many nats below its ceiling mutual information is no longer to be told from it."""


@dataclass(frozen=True)
class Layer:
    """The latents of one site.

    Attributes:
        kl: E log q(z|x) - log p(z) of this site, for each datum: nats, shape `(N,)`.
        kl_per_latent: Its mean over the data for each latent, shape `(D,)`; NaN where guide or
            prior do not factorise over them.
        variance: Variance over the data of each latent's posterior mean, shape `(D,)`.
    """

    kl: Tensor
    kl_per_latent: Tensor
    variance: Tensor

    @property
    def active(self) -> Tensor:
        """Which latents are active, shape `(D,)`."""
        return self.variance > ACTIVE

    @property
    def collapsed(self) -> Tensor:
        """Which latents are not active and cost nothing, or not to anyone's knowledge: `(D,)`."""
        return ~self.active & ~(self.kl_per_latent >= NOTHING)


@dataclass(frozen=True)
class Latents:
    """What the latents carry. Nats; NaN is what cannot be known, and `unknown` says why.

    Attributes:
        rate: E log q(z|x) - log p(z), for each datum, shape `(N,)`.
        distortion: E -log p(x|z), for each datum, shape `(N,)`.
        layers: The latents by site.
        mutual_information: I(x; z) under the guide, of `num_paired` data.
        marginal_kl: KL of their aggregate q(z) from p(z).
        information_std_error: Standard error of the first, over those data.
        marginal_std_error: Standard error of the second, over those data.
        num_paired: How many data that was.
        num_particles: Draws per datum, for all but mutual information and marginal KL.
        seed: Of the noise.
        data: What the data are.
        unknown: Why something is NaN; empty if nothing is.
    """

    rate: Tensor
    distortion: Tensor
    layers: dict[str, Layer]
    mutual_information: float
    marginal_kl: float
    information_std_error: float
    marginal_std_error: float
    num_paired: int
    num_particles: int
    seed: int
    data: str = ""
    unknown: str = ""

    @property
    def elbo(self) -> float:
        """Mean over the data: -(rate + distortion)."""
        return -float((self.rate + self.distortion).mean())

    @property
    def num_latents(self) -> int:
        """In all layers."""
        return sum(len(layer.variance) for layer in self.layers.values())

    @property
    def active_units(self) -> int:
        """How many of them are active."""
        return sum(int(layer.active.sum()) for layer in self.layers.values())

    @property
    def collapsed_units(self) -> int:
        """How many of them have collapsed: not active, and less than 0.01 nats of KL each."""
        return sum(int(layer.collapsed.sum()) for layer in self.layers.values())

    @property
    def collapse(self) -> str:
        """Posterior collapse in words: a sentence or two to quote."""
        gone, of = self.collapsed_units, f"{self.num_latents:,} latents"
        if len(self.rate) < 2:
            return "One datum does not tell whether latents have collapsed."
        if not gone:
            return f"Not collapsed: each of the {of} carries something.{self._idle()}"
        told = f"Collapsed: {gone:,} of {of} carry nothing ({self._measure()})"
        if len(self.layers) > 1:
            layers = (
                f"{int(layer.collapsed.sum()):,} of {len(layer.variance):,} in {name}"
                for name, layer in self.layers.items()
            )
            told += f": {', '.join(layers)}"
        if gone == self.num_latents:
            return f"{told}. The guide is the prior, and x is modelled without latents."
        return f"{told}.{self._carried()}{self._idle()}"

    @property
    def ceiling(self) -> float:
        """Log of the number of paired data, which mutual information cannot exceed."""
        return math.log(self.num_paired)

    @property
    def saturated(self) -> bool:
        """Whether mutual information is so near its ceiling that it is a lower bound."""
        return self.mutual_information > self.ceiling - NEAR

    def rows(self) -> list[dict[str, Any]]:
        """A row per latent."""
        return [
            {"site": name, "index": i, "kl": kl, "variance": variance}
            | {"active": int(active), "collapsed": int(collapsed)}
            for name, layer in self.layers.items()
            for i, (kl, variance, active, collapsed) in enumerate(
                zip(
                    layer.kl_per_latent.tolist(),
                    layer.variance.tolist(),
                    layer.active.tolist(),
                    layer.collapsed.tolist(),
                    strict=True,
                )
            )
        ]

    def summary(self) -> dict[str, Any]:
        """The numbers over all data and latents, ready for JSON."""
        return {
            "rate": float(self.rate.mean()),
            "rate_std_error": error_of_mean(self.rate),
            "distortion": float(self.distortion.mean()),
            "distortion_std_error": error_of_mean(self.distortion),
            "elbo": self.elbo,
            "active_units": self.active_units,
            "collapsed_units": self.collapsed_units,
            "num_latents": self.num_latents,
            "mutual_information": self.mutual_information,
            "marginal_kl": self.marginal_kl,
            "information_std_error": self.information_std_error,
            "marginal_std_error": self.marginal_std_error,
            "ceiling": self.ceiling,
            "num_paired": self.num_paired,
            "layers": {
                name: {
                    "kl": float(layer.kl.mean()),
                    "kl_std_error": error_of_mean(layer.kl),
                    "active_units": int(layer.active.sum()),
                    "collapsed_units": int(layer.collapsed.sum()),
                    "num_latents": len(layer.variance),
                }
                for name, layer in self.layers.items()
            },
            "num_data": len(self.rate),
            "num_particles": self.num_particles,
            "seed": self.seed,
            "data": self.data,
            "unknown": self.unknown,
        }

    def __str__(self) -> str:
        """A paragraph to quote."""
        rate, distortion = (
            _nats(float(part.mean()), error_of_mean(part)) for part in (self.rate, self.distortion)
        )
        active = f"{self.active_units:,} of {self.num_latents:,} latents active"
        sentences = [
            f"Rate {rate} and distortion {distortion} nats per datum, standard errors in brackets; "
            f"{active}.",
            *self._by_layer(),
            self._information(),
        ]
        return " ".join(sentence for sentence in sentences if sentence)

    def _measure(self) -> str:
        spread = f"posterior means that vary by less than {ACTIVE:g}"
        return spread if self._each.isnan().all() else f"less than {NOTHING:g} nats each, {spread}"

    def _carried(self) -> str:
        """What the latents that have not collapsed cost together, and each on average."""
        left = self.num_latents - self.collapsed_units
        total = float(self._each[~self._all("collapsed")].sum())
        if math.isnan(total):  # not known latent by latent
            total = float(self.rate.mean())
        if math.isnan(total):
            return ""
        return f" The other {left:,} carry {total:.2f} nats, {total / left:.2f} each."

    def _idle(self) -> str:
        """Latents that tell nothing of x, and cost something all the same."""
        idle = ~self._all("active") & ~self._all("collapsed")
        if not idle.any():
            return ""
        nats = float(self._each[idle].sum())
        return f" {int(idle.sum()):,} are not active, but cost {nats:.2f} nats."

    @property
    def _each(self) -> Tensor:
        return self._all("kl_per_latent")

    def _all(self, name: str) -> Tensor:
        return torch.cat([getattr(layer, name) for layer in self.layers.values()])

    def _by_layer(self) -> Iterator[str]:
        if len(self.layers) > 1:
            told = (
                f"{name} {_nats(float(layer.kl.mean()))} nats with {int(layer.active.sum()):,} of "
                f"{len(layer.variance):,} active"
                for name, layer in self.layers.items()
            )
            yield f"By layer: {', '.join(told)}."

    def _information(self) -> str:
        if math.isnan(self.mutual_information):
            return f"The mutual information of x and z is unknown: {self.unknown}."
        shared = _nats(self.mutual_information, self.information_std_error)
        rest = _nats(self.marginal_kl, self.marginal_std_error)
        if self.saturated:
            return (
                f"Mutual information of x and z is at least {shared} nats, near the ceiling "
                f"log N = {self.ceiling:.2f} of the {self.num_paired:,} data it was taken from, "
                f"and KL(q(z) || p(z)) at most {rest}."
            )
        return (
            f"Mutual information of x and z {shared} nats, KL(q(z) || p(z)) {rest}, from "
            f"{self.num_paired:,} data."
        )


def latents(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    *,
    num_particles: int = 16,
    seed: int | None = None,
    progress: bool = False,
) -> Latents:
    """Rate, distortion, KL per latent, active units, mutual information and marginal KL.

    All are averages over draws from the guide: `num_particles` per datum, but for mutual
    information and marginal KL. Those take one draw for each of up to 1,000 of the data, fewer
    where scoring one code under another's posterior is dear; a guide that cannot do that, or a
    single datum, leaves them unknown, and a guide without a density the rate too.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        num_particles: Draws per datum, for all but mutual information and marginal KL.
        seed: Of the noise; None takes a new one.
        progress: Show a bar.

    Raises:
        ValueError: If the program cannot be scored per datum, or sums a latent out.

    References:
        Fixing a Broken ELBO (Alemi et al., 2018), arXiv:1711.00464;
        ELBO Surgery (Hoffman & Johnson, 2016);
        active units: Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
    """
    walk = Walk(model, guide, x, num_particles, seed)
    density = walk.has_density()
    blocks = walk.map(lambda args, _: _Block.of(walk, args), "latents", progress, density)
    rate = torch.cat([block.rate for block in blocks])
    log_det = walk.split.log_det.to(rate)
    distortion = torch.cat([block.distortion for block in blocks]) - log_det
    layers = {name: _layer([block.sites[name] for block in blocks]) for name in blocks[0].sites}
    count = _num_paired(len(rate), layers)
    index = torch.arange(count) * len(rate) // count
    few = Walk(model, guide, walk.split.subset(index), 1, walk.seed, block_size=count)
    try:
        if not density:
            raise program.Refused("the guide has no density")
        if count < 2:
            raise program.Refused("it takes two data or more")
        (parts,) = few.map(lambda args, _: _split(few, args), density=False)
        unknown = ""
    except (program.Refused, NotImplementedError) as obstacle:
        parts, unknown = torch.full((2, 1), math.nan), str(obstacle)
    shared, rest = parts
    return Latents(
        rate=rate,
        distortion=distortion,
        layers=layers,
        mutual_information=float(shared.mean()),
        marginal_kl=float(rest.mean()),
        information_std_error=error_of_mean(shared),
        marginal_std_error=error_of_mean(rest),
        num_paired=count,
        num_particles=walk.num_particles,
        seed=walk.seed,
        data=walk.split.description,
        unknown=unknown,
    )


def count_active(guide: PyroFunction, args: Args, num_particles: int = 16) -> int | None:
    """How many latents are active on some data, by one run of the guide if that is enough.

    Args:
        guide: q(z|x), a Pyro function of `args`.
        args: Some hundreds of data.
        num_particles: Draws per datum where the posterior mean has no formula.

    Returns:
        Their number; None where latents are summed out.
    """
    drawn = program.draw(guide, args)
    if drawn.summed:
        return None
    if len(drawn.scores) > 1 or not all(_has_mean(s.fn) for s in drawn.scores.values()):
        drawn = program.draw(guide, args, num_particles, by_rows=True)
    means = [_means(score, drawn.num_particles) for score in drawn.scores.values()]
    return sum(int((_variance(mean) > ACTIVE).sum()) for mean in means)


@dataclass(frozen=True)
class _Site:
    """A block at one site: KL `(n,)`, KL per latent `(n, D)` and posterior means `(K, n, D)`."""

    kl: Tensor
    kl_per_latent: Tensor
    means: Tensor


@dataclass(frozen=True)
class _Block:
    """What is known of a block: rate and distortion `(n,)`, and its sites."""

    rate: Tensor
    distortion: Tensor
    sites: dict[str, _Site]

    @classmethod
    def of(cls, walk: Walk, args: Args) -> _Block:
        """Draw from the guide, and score."""
        model, guide, k = walk.programs.model, walk.programs.guide, walk.num_particles
        drawn = program.draw(guide, args, k, by_rows=True)
        program.refuse_enumerated(drawn)
        scores = program.score_sites(model, program.repeat(args, k), drawn.values)
        log_pz = _log_prior(scores, drawn)
        rest = program.total({n: s for n, s in scores.items() if n not in drawn.scores})
        points = program.points(drawn)
        sites = {
            name: _site(q, scores[name], k, name in points) for name, q in drawn.scores.items()
        }
        log_ratio = drawn.log_q - log_pz.reshape(k, -1)
        if points:
            log_ratio = torch.full_like(log_ratio, math.nan)
        distortion = -program.sum_out(rest).reshape(k, -1)
        return cls(log_ratio.mean(0).double(), distortion.mean(0).double(), sites)


def _log_prior(scores: dict[str, Score], drawn: Draw) -> Tensor:
    """Log p(z) of each row."""
    log_pz = program.total({name: scores[name] for name in drawn.scores})
    if log_pz.dim() > 1:
        raise program.Refused(
            "a latent depends on a site that the model sums out: rate and distortion cannot be "
            "told apart"
        )
    return log_pz


def _site(q: Score, p: Score, num_particles: int, pointlike: bool) -> _Site:
    kl = (q.log_prob - p.log_prob).reshape(num_particles, -1).mean(0)
    means = _means(q, num_particles)
    q_entry, p_entry = program.entries(q), program.entries(p)
    if pointlike or q_entry is None or p_entry is None:
        each = torch.full_like(means[0], math.nan)
    else:
        log_ratio = q_entry.log_prob(q.value) - p_entry.log_prob(q.value)
        each = _flat(log_ratio, q, num_particles).mean(0)
    return _Site((kl * math.nan if pointlike else kl).double(), each.double(), means)


def _layer(blocks: list[_Site]) -> Layer:
    """A site's blocks put together."""
    each = torch.cat([block.kl_per_latent for block in blocks]).mean(0)
    variance = _variance(torch.cat([block.means for block in blocks], dim=1))
    return Layer(torch.cat([block.kl for block in blocks]), each, variance)


def _means(score: Score, num_particles: int) -> Tensor:
    """Posterior means, or draws in their place, which may be whole numbers: `(K, N, D)`."""
    value = score.fn.mean if _has_mean(score.fn) else score.value
    return _flat(value.expand_as(score.value), score, num_particles).double()


def _flat(value: Tensor, score: Score, num_particles: int) -> Tensor:
    """A tensor shaped like a site's value, as `(K, N, D)`."""
    rows = score.value.dim() - score.fn.event_dim - 1
    return value.movedim(rows, 0).reshape(num_particles, value.shape[rows] // num_particles, -1)


def _variance(means: Tensor) -> Tensor:
    """Variance over the data of the mean over draws, less what chance adds to it: `(D,)`."""
    k, n, _ = means.shape
    if n < 2:
        return torch.full_like(means[0, 0], math.nan)
    variance = means.mean(0).var(0)
    return variance - means.var(0).mean(0) / k if k > 1 else variance


def _has_mean(fn: dist.TorchDistribution) -> bool:
    """Whether the mean has a formula; else it is taken from draws."""
    base = _base(fn)
    if base.event_shape and not isinstance(base, NORMAL):
        return False
    try:
        return bool(fn.mean.isfinite().all())
    except NotImplementedError:
        return False


NORMAL = (
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
    dist.Delta,
)


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _num_paired(num_data: int, layers: dict[str, Layer]) -> int:
    """How many data to take mutual information from."""
    if len(layers) > 1:
        return min(num_data, 300)
    (layer,) = layers.values()
    if not layer.kl_per_latent.isnan().any():
        return min(num_data, PAIRED)
    return min(num_data, PAIRED, max(50, math.isqrt(int(WORK)) // len(layer.variance)))


def _split(walk: Walk, args: Args) -> Tensor:
    """Log q(z|x) - log q(z) and log q(z) - log p(z) at one draw for each datum, shape `(2, N)`."""
    model, guide = walk.programs.model, walk.programs.guide
    drawn = program.draw(guide, args)
    log_pz = _log_prior(program.score_sites(model, args, drawn.values), drawn).double()
    log_q = _pairs(guide, args, drawn).double()
    marginal = log_q.logsumexp(1) - math.log(len(log_q))
    return torch.stack([log_q.diagonal() - marginal, marginal - log_pz])


def _pairs(guide: PyroFunction, args: Args, drawn: Draw) -> Tensor:
    """Log q(z_n|x_m) for all pairs of data, shape `(N, N)`."""
    count = len(args[0])
    if len(drawn.scores) == 1:
        (score,) = drawn.scores.values()
        if score.mask is None and score.fn.batch_shape == (count,):
            step = max(1, NUMBERS // (count * score.value[0].numel()))
            parts = score.value.split(step)
            return torch.cat([score.fn.log_prob(part.unsqueeze(1)) for part in parts])
    step = max(1, ROWS // count)
    return torch.cat([_pairs_by_rows(guide, args, drawn, i, step) for i in range(0, count, step)])


def _pairs_by_rows(guide: PyroFunction, args: Args, drawn: Draw, start: int, step: int) -> Tensor:
    """Log q(z_n|x_m) for some n and all m, the guide run on each pair."""
    count = len(args[0])
    some = torch.arange(start, min(start + step, count), device=args[0].device)
    values = {}
    for name, score in drawn.scores.items():
        rows = score.value.dim() - score.fn.event_dim - 1
        values[name] = score.value.index_select(rows, some.repeat_interleave(count))
    scores = program.score_sites(guide, program.repeat(args, len(some)), values)
    return program.total(scores).reshape(len(some), count)


def _nats(value: float, error: float = math.nan) -> str:
    known = "unknown" if math.isnan(value) else f"{value:.2f}"
    return known if math.isnan(error) else f"{known} ({error:.2f})"
