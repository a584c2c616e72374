r"""Log densities per datum, read from Pyro's traces.

Particles are rows: the model sees the data repeated K times, row `k * N + n` being datum n, so what
works on a batch works here. A log density has every constant; a scale (`poutine.scale`, a
subsampling plate's) is left out unless it is asked for, a mask is applied, inner plates are summed.

A discrete site marked `infer={"enumerate": "parallel"}` is summed over: its values go along a
dimension in front of the rows, its log q is left out, and the weights are summed along it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints

from pyrovae.program.owned import PyroFunction, owners

Args = tuple[Tensor, ...]


class Refused(ValueError):
    """A program that cannot be scored per datum."""


@dataclass(frozen=True)
class Score:
    """One site's log density.

    Attributes:
        fn: The site's distribution.
        value: What was scored.
        log_prob: Nats, shape `(rows,)`, or `(values, rows)` where a site is enumerated.
        scale: What `poutine.scale` or a subsampling plate would multiply it with.
        mask: The site's mask, already applied to `log_prob`.
        observed: Whether it is data.
    """

    fn: dist.TorchDistribution
    value: Tensor
    log_prob: Tensor
    scale: Any = 1.0
    mask: Any = None
    observed: bool = False


@dataclass(frozen=True)
class Draw:
    """K draws from a guide for each of N data.

    Attributes:
        values: Each latent, `K * N` rows (an enumerated one has its values in front of one row, or
            in front of each row its own).
        scores: Each latent's density, but for enumerated ones, which are summed over.
        num_particles: K.
        summed: The density of each value of the enumerated latents.
    """

    values: dict[str, Tensor]
    scores: dict[str, Score]
    num_particles: int
    summed: dict[str, Score] = field(default_factory=dict)

    @property
    def log_q(self) -> Tensor:
        """Log q(z|x) in nats, shape `(K, N)`, or `(values, K * N)` with enumerated sites."""
        log_q = total(self.scores)
        return log_q if log_q.dim() != 1 else log_q.reshape(self.num_particles, -1)


def draw(
    guide: PyroFunction,
    args: Args,
    num_particles: int = 1,
    by_rows: bool = False,
    top_k: int | None = None,
) -> Draw:
    """Draw each latent from the guide, `num_particles` times for each datum.

    With one latent the guide runs once and its distribution is drawn from; with several, or
    `by_rows`, it runs on the data repeated.

    Args:
        guide: A Pyro function of `args`.
        args: Data: tensors with the same first dimension, N.
        num_particles: K.
        by_rows: Run the guide on the repeated data even if it has one latent.
        top_k: Of an enumerated latent, take so many of its values, the most probable of each row,
            with the guide's density of it cut to them and normalised.

    Raises:
        Refused: If a density is not one number per row, or `top_k` is given for several latents.
    """
    sites = latents(trace(guide, args))
    if any(map(is_enumerated, sites.values())):
        return _draw_enumerated(guide, args, num_particles, top_k)
    if num_particles == 1:
        scores = {name: _score(site, (len(args[0]),)) for name, site in sites.items()}
        return Draw({name: s.value for name, s in scores.items()}, scores, 1)
    return _sampler(guide, args, sites, by_rows)(num_particles)


def sampler(guide: PyroFunction, args: Args) -> Callable[[int], Draw]:
    """A function of K that draws each latent from the guide K times for each datum.

    Args:
        guide: A Pyro function of `args`, which runs here, once.
        args: Data.
    """
    return _sampler(guide, args, latents(trace(guide, args)))


def ancestral(fn: PyroFunction, args: Args) -> dict[str, Tensor]:
    """Each latent's value in one run of a Pyro function, but for those to be summed out.

    Of a guide these are draws from q(z|x), of a model from p(z), given what it observes beside it.

    Args:
        fn: A Pyro function of `args`.
        args: Data.
    """
    sites = latents(trace(fn, args)).items()
    return {name: site["value"] for name, site in sites if not is_enumerated(site)}


def summed_out(guide: PyroFunction, args: Args) -> frozenset[str]:
    """Names of the guide's sites that are marked to be summed over."""
    return frozenset(n for n, site in latents(trace(guide, args)).items() if is_enumerated(site))


def log_joint(model: PyroFunction, args: Args, values: dict[str, Tensor]) -> Tensor:
    """Log p(x, z) of each row, in nats; sites that the model marks for enumeration summed out.

    Args:
        model: A Pyro function of `args`.
        args: Data, repeated to as many rows as the latents have.
        values: Each latent's value, as `Draw.values`.
    """
    return sum_out(total(score_sites(model, args, values)))


def log_weights(
    model: PyroFunction,
    guide: PyroFunction,
    args: Args,
    num_particles: int,
    max_rows: int | None = None,
) -> Tensor:
    """Log p(x, z_k) - log q(z_k|x) for z_k ~ q(z|x): nats, shape `(K, N)`.

    Args:
        model: A Pyro function of `args`.
        guide: A Pyro function of `args`.
        args: Data: tensors with the same first dimension, N.
        num_particles: K.
        max_rows: Rows of the model to run at once; None runs all K * N.
    """
    num_data = len(args[0])
    step = min(num_particles, max(1, max_rows // num_data) if max_rows else num_particles)
    sample = sampler(guide, args)
    rows = repeat(args, step)

    def weights(count: int) -> Tensor:
        drawn = sample(count)
        here = rows if count == step else tuple(arg[: count * num_data] for arg in rows)
        scores = score_sites(model, here, drawn.values)
        return sum_out(total(scores) - total(drawn.scores)).reshape(count, num_data)

    first = weights(step)
    if step == num_particles:
        return first
    log_w = first.new_empty(num_particles, num_data)  # small pieces would scatter over the heap
    log_w[:step] = first
    for start in range(step, num_particles, step):
        log_w[start : start + step] = weights(min(step, num_particles - start))
    return log_w


def score_sites(model: PyroFunction, args: Args, values: dict[str, Tensor]) -> dict[str, Score]:
    """The log density of each site of the model, latents set to `values`."""
    conditioned = given(model, values)
    sites = samples(trace(conditioned, args, owner=model))
    fresh = {n: s for n, s in sites.items() if not s["is_observed"]}
    if any(map(is_enumerated, fresh.values())):
        front = max((v.dim() - sites[n]["fn"].event_dim for n, v in values.items()), default=1)
        conditioned = poutine.enum(conditioned, first_available_dim=-1 - max(front, 1))
        sites = samples(trace(conditioned, args, owner=model))
    hidden = {n: s for n, s in sites.items() if n in values or n in fresh}
    discrete = [s for s in hidden.values() if s["fn"].has_enumerate_support]
    shape = (*_front(discrete), len(args[0]))
    return {n: _score(s, shape, observed=n not in hidden) for n, s in sites.items()}


def rescore(
    guide: PyroFunction, args: Args, drawn: Draw, values: dict[str, Tensor]
) -> dict[str, Score]:
    """The log density of other values under the guide that was drawn from.

    With one latent its own distribution scores them; with several the guide runs on them, on the
    data repeated.

    Args:
        guide: The Pyro function that was drawn from.
        args: The data that it was drawn for.
        drawn: The draws.
        values: Each latent's value, as many rows as were drawn.

    Raises:
        Refused: If a latent is enumerated, or its distribution scores only its own draws.
    """
    refuse_enumerated(drawn)
    k = drawn.num_particles
    if len(drawn.scores) == 1:
        ((name, score),) = drawn.scores.items()
        fn, value = score.fn, values[name]
        if fn.batch_shape in ((len(args[0]),), (len(value),)):
            log_prob = _log_prob(name, fn, value.reshape(-1, *fn.batch_shape, *fn.event_shape))
            log_prob = scale_and_mask(log_prob, mask=score.mask).flatten()
            return {name: Score(fn, value, log_prob, score.scale, score.mask)}
    return score_sites(guide, repeat(args, k), values)


def simulate(model: PyroFunction, args: Args) -> tuple[Args, dict[str, Tensor]]:
    """Data and latents drawn from the model, as many rows as `args` have, without gradients.

    Args:
        model: A Pyro function of `args`.
        args: Data. One that the model observes as it is becomes a draw; what is merely conditioned
            on stays.

    Returns:
        The arguments, and each latent's value.
    """
    with torch.no_grad():
        sites = samples(trace(poutine.uncondition(model), args, owner=model))
    observed = {n: s for n, s in sites.items() if s["infer"].get("was_observed")}
    new = {id(s["infer"]["obs"]): s["value"] for s in observed.values()}
    latent = {n: s["value"] for n, s in sites.items() if n not in observed}
    return tuple(new.get(id(arg), arg) for arg in args), latent


def refuse_enumerated(drawn: Draw) -> None:
    """Refuse draws of a guide that sums a site out: log q of that site is nowhere."""
    if drawn.summed:
        raise Refused(
            f"the guide's site {min(drawn.summed)!r} is enumerated, and this objective needs its "
            "density: leave it out of the guide and mark it in the model, draw it, or take an "
            "objective that sums sites of the guide out"
        )


def family(fn: dist.TorchDistribution) -> str:
    """Name of a distribution, without what only reshapes, masks or expands it."""
    wrappers = (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return type(fn).__name__


def entries(score: Score) -> torch.distributions.Distribution | None:
    """The distribution of each dimension of a row, if they are independent and none is masked."""
    fn = score.fn
    if score.mask is not None or fn.batch_shape != score.log_prob.shape:
        return None
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def total(scores: dict[str, Score]) -> Tensor:
    """Sum of the sites' log densities: `(rows,)`, or `(values, rows)` if one is enumerated."""
    return sum((score.log_prob for score in scores.values()), torch.zeros(()))


def sum_out(log_p: Tensor) -> Tensor:
    """Sum probabilities over the dimensions of enumerated sites, all but the last."""
    return log_p if log_p.dim() < 2 else log_p.flatten(0, -2).logsumexp(0)


def repeat(args: Args, num_particles: int) -> Args:
    """The data `num_particles` times over: row `k * N + n` is datum n."""
    if num_particles == 1:
        return args
    return tuple(arg.repeat(num_particles, *[1] * (arg.dim() - 1)) for arg in args)


def as_args(x: Tensor | Args) -> Args:
    """The arguments of a model and guide: a tensor, or tensors with the same first dimension.

    Raises:
        TypeError: If `x` is something else.
        ValueError: If there is no datum, or the tensors disagree on how many.
    """
    args = (x,) if isinstance(x, Tensor) else x
    if not isinstance(args, (tuple, list)) or not all(isinstance(arg, Tensor) for arg in args):
        raise TypeError(f"x must be a tensor or a tuple of tensors, got {type(x).__name__}")
    sizes = {len(arg) if arg.dim() else 0 for arg in args}
    if len(sizes) > 1:
        raise ValueError(f"the tensors of x differ in their first dimension: {sorted(sizes)}")
    if sizes <= {0}:
        raise ValueError("x is empty: expected a first dimension of at least one datum")
    return tuple(args)


def trace(fn: PyroFunction, args: Args, owner: PyroFunction | None = None) -> poutine.Trace:
    """Run a Pyro function; one owned by modules runs on their own tensors, not the store's."""
    store = pyro.get_param_store()
    with store.scope() if owners(owner or fn) else nullcontext(), _AllRows():
        return poutine.trace(fn).get_trace(*args)


def samples(trace: poutine.Trace) -> dict[str, Any]:
    """The sites with a density: not a plate's indices, nor `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("_deterministic")
    }


def latents(trace: poutine.Trace) -> dict[str, Any]:
    """The sites that are not data."""
    return {name: s for name, s in samples(trace).items() if not s["is_observed"]}


def distributions(guide: PyroFunction, args: Args) -> dict[str, dist.TorchDistribution]:
    """The distribution of each of the guide's latents, in one run of it."""
    return {name: site["fn"] for name, site in latents(trace(guide, args)).items()}


def given(fn: PyroFunction, values: dict[str, Tensor]) -> PyroFunction:
    """The function with its latents set to these values."""
    return _Given(values)(fn)


def is_enumerated(site: Any) -> bool:
    """Whether a site is marked to be summed over."""
    return site["infer"].get("enumerate") == "parallel"


class _Given(Messenger):
    """Latents take these values, which `poutine.condition` would give to data too."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            return
        if msg["is_observed"]:
            raise Refused(
                f"the guide samples {name!r}, which the model observes: sample it in the guide "
                "only where it is not given"
            )
        msg["value"], msg["is_observed"] = self.values[name], True


class _AllRows(Messenger):
    """Plates take every row: batches are already drawn, so nothing is subsampled inside."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) and msg["value"] is None and fn.subsample_size is not None:
            msg["value"] = torch.arange(fn.subsample_size, device=fn.device)
            msg["done"] = True


class _MostProbable(Messenger):
    """An enumerated latent takes, of its values, the k most probable of each row."""

    def __init__(self, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not is_enumerated(msg):
            return
        if self.name not in (None, msg["name"]):
            raise Refused(
                f"top_k is for a guide that sums out one site, and this one sums out {self.name!r} "
                f"and {msg['name']!r}"
            )
        self.name, fn = msg["name"], msg["fn"]
        values = fn.enumerate_support(expand=False)
        top = fn.log_prob(values).topk(min(self.top_k, len(values)), 0).indices
        msg["value"], msg["done"] = values.reshape(len(values), *fn.event_shape)[top], True


def _sampler(
    guide: PyroFunction, args: Args, sites: dict[str, Any], by_rows: bool = False
) -> Callable[[int], Draw]:
    """A function of K that draws K times for each datum.

    Args:
        guide: A Pyro function of `args`.
        args: Data.
        sites: The guide's latents, from running it on `args`.
        by_rows: Run the guide on the repeated data even if it has one latent.
    """
    if any(map(is_enumerated, sites.values())):
        return lambda k: _draw_enumerated(guide, args, k)
    one_per_row = all(site["fn"].batch_shape == (len(args[0]),) for site in sites.values())
    if len(sites) == 1 and one_per_row and not by_rows:
        return lambda k: _draw_more(sites, k)
    return lambda k: _draw_rows(guide, repeat(args, k), k)


def _draw_more(sites: dict[str, Any], num_particles: int) -> Draw:
    """Draw `num_particles` times from the one latent's distribution."""
    ((name, site),) = sites.items()
    fn = site["fn"]
    z = fn((num_particles,))
    log_prob = scale_and_mask(fn.log_prob(z), mask=site["mask"]).flatten()
    score = Score(fn, z.flatten(0, 1), log_prob, site["scale"], site["mask"])
    return Draw({name: score.value}, {name: score}, num_particles)


def _draw_rows(guide: PyroFunction, rows: Args, num_particles: int) -> Draw:
    sites = latents(trace(guide, rows))
    scores = {name: _score(site, (len(rows[0]),)) for name, site in sites.items()}
    return Draw({name: s.value for name, s in scores.items()}, scores, num_particles)


def _draw_enumerated(
    guide: PyroFunction, args: Args, num_particles: int, top_k: int | None = None
) -> Draw:
    rows = repeat(args, num_particles)
    if top_k is None:
        enumerated = poutine.enum(guide, first_available_dim=-2)
    else:
        enumerated = _MostProbable(top_k)(guide)
    sites = latents(trace(enumerated, rows, owner=guide))
    values = {name: site["value"] for name, site in sites.items()}
    shape = (*_front(s for s in sites.values() if is_enumerated(s)), len(rows[0]))
    scores = {name: _score(site, shape) for name, site in sites.items()}
    summed = {name: scores.pop(name) for name, site in sites.items() if is_enumerated(site)}
    if top_k is not None:
        ((name, score),) = summed.items()
        summed[name] = replace(score, log_prob=score.log_prob.log_softmax(0))
    return Draw(values, scores, num_particles, summed)


def _front(sites: Iterable[Any]) -> tuple[int, ...]:
    """Dimensions in front of the rows, along which sites are enumerated."""
    shapes = []
    for site in sites:
        value = site["value"]
        shape = list(value.shape[: value.dim() - site["fn"].event_dim])
        for dim in _inner_dims(site, len(shape)):
            shape[dim] = 1
        shapes.append(shape[:-1])
    front = list(torch.broadcast_shapes(*shapes))
    while front and front[0] == 1:
        front.pop(0)
    return tuple(front)


def _score(site: Any, shape: Sequence[int], observed: bool = False) -> Score:
    """Score a site, inner plates summed; `shape` is `(*enumerated, rows)`."""
    fn, value, mask = site["fn"], site["value"], site["mask"]
    log_prob = _log_prob(site["name"], fn, value)
    if not observed and not _is_everywhere(fn):  # torch's formulas go on outside the support
        log_prob = log_prob.masked_fill(~fn.support.check(value), -torch.inf)
    log_prob = scale_and_mask(log_prob, mask=mask)
    found = tuple(log_prob.shape)
    if present := _inner_dims(site, log_prob.dim()):
        log_prob = log_prob.sum(present, keepdim=True)
    while log_prob.dim() > 1 and log_prob.shape[0] == 1:
        log_prob = log_prob.squeeze(0)
    front = log_prob.shape[:-1]
    allowed = shape[:-1][-len(front) :] if front else ()
    fits = len(front) == len(allowed) and all(
        size in (1, most) for size, most in zip(front, allowed, strict=True)
    )
    if log_prob.dim() == 0 or log_prob.shape[-1] != shape[-1] or not fits:
        raise Refused(
            f"site {site['name']!r} has log densities of shape {found} for {shape[-1]} rows of "
            "data: expected one number per row in the last dimension. Sample it inside "
            'pyro.plate("data", len(x)) and declare event dimensions with .to_event'
        )
    return Score(fn, value, log_prob, site["scale"], mask, observed)


def _log_prob(name: str, fn: dist.TorchDistribution, value: Tensor) -> Tensor:
    try:
        return fn.log_prob(value)
    except (NotImplementedError, KeyError) as error:  # a flow without an inverse
        remedy = "take a distribution that scores any value, or an objective that does without"
        reason = str(error) if isinstance(error, NotImplementedError) else ""
        raise Refused(
            f"site {name!r} ({family(fn)}) scores only its own draws, and the density of another "
            f"value is asked for: {reason or remedy}"
        ) from error


def _is_everywhere(fn: dist.TorchDistribution) -> bool:
    """Whether the distribution has a density for every real value, or does not say."""
    try:
        support = fn.support
    except NotImplementedError:
        return True
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def _inner_dims(site: Any, num_dims: int) -> list[int]:
    """Dimensions of the plates inside a row that a tensor of so many dimensions has."""
    dims = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.dim != -1]
    return [dim for dim in dims if -dim <= num_dims]
