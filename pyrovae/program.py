r"""Any Pyro model and guide as densities per datum.

A program is a pair of Pyro functions over the same data: a model, with density p(x, z), and a
guide, with density q(z|x). Everything else in this package (bounds, objectives, estimates of
log p(x), training) needs three things of it, and only this module reads Pyro's traces to get them:

* `draw`: z ~ q(z|x), K times for every datum, and log q(z|x);
* `log_joint`: log p(x, z), one number per row;
* `log_weights`: log p(x, z) - log q(z|x), shape `(K, N)`.

Particles are rows: the model sees the data repeated K times, row `k * N + n` being datum n, so what
works on a batch works here. A log density has every constant; a scale (`poutine.scale`, a
subsampling plate's) is left out unless it is asked for, a mask is applied.

A discrete site marked `infer={"enumerate": "parallel"}` is summed over: its values go along a
dimension in front of the rows, its log q is left out, and the weights are summed along it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

__all__ = ["Draw", "Program", "Score", "check", "draw", "log_joint", "log_weights"]

PyroFunction = Callable[..., Any]
Args = tuple[Tensor, ...]


class Program(nn.Module):
    """A model and a guide, two Pyro functions of the data, as one trainable module.

    What owns parameters is registered: `nn.Module`s, `PyroModule`s, and the owners of bound methods
    (`Program(vae.model, my_guide)`). Plain functions keep their parameters in Pyro's store.

    Args:
        model: p(x, z), a Pyro function of the data.
        guide: q(z|x), a Pyro function of the same arguments.
    """

    def __init__(self, model: PyroFunction, guide: PyroFunction):
        super().__init__()
        for name, fn in (("model", model), ("guide", guide)):
            if not callable(fn):
                raise TypeError(f"{name} must be a Pyro function, got {type(fn).__name__}")
        self.owners = nn.ModuleList(owners(model, guide))
        self._functions = (model, guide)

    @property
    def model(self) -> PyroFunction:
        """The model, as it was given."""
        return self._functions[0]

    @property
    def guide(self) -> PyroFunction:
        """The guide, as it was given."""
        return self._functions[1]


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
        values: Each latent, `K * N` rows (an enumerated one has its values in front of one row).
        scores: Each latent's density; enumerated latents, which are summed over, have none.
        num_particles: K.
    """

    values: dict[str, Tensor]
    scores: dict[str, Score]
    num_particles: int

    @property
    def log_q(self) -> Tensor:
        """Log q(z|x) in nats, shape `(K, N)`, or `(values, K * N)` with enumerated sites."""
        log_q = total(self.scores)
        return log_q if log_q.dim() > 1 else log_q.reshape(self.num_particles, -1)


def draw(guide: PyroFunction, args: Args, num_particles: int = 1, by_rows: bool = False) -> Draw:
    """Draw each latent from the guide, `num_particles` times for each datum.

    With one latent the guide runs once and its distribution is drawn from; with several, or
    `by_rows`, it runs on the data repeated.

    Args:
        guide: A Pyro function of `args`.
        args: Data: tensors with the same first dimension, N.
        num_particles: K.
        by_rows: Run the guide on the repeated data even if it has one latent.
    """
    sites = _latents(_trace(guide, args))
    if any(_is_enumerated(site) for site in sites.values()):
        return _draw_enumerated(guide, args, num_particles)
    num_data = len(args[0])
    if num_particles > 1 and (by_rows or len(sites) > 1 or not _one_per_row(sites, num_data)):
        sites = _latents(_trace(guide, repeat(args, num_particles)))
    elif num_particles > 1:
        return _draw_more(sites, num_particles, num_data)
    scores = {name: _score(site, num_particles * num_data) for name, site in sites.items()}
    return Draw({name: s.value for name, s in scores.items()}, scores, num_particles)


def log_joint(model: PyroFunction, args: Args, values: dict[str, Tensor]) -> Tensor:
    """Log p(x, z) of each row, in nats; sites that the model marks for enumeration summed out.

    Args:
        model: A Pyro function of `args`.
        args: Data, repeated to as many rows as the latents have.
        values: Each latent's value, as `Draw.values`.
    """
    return sum_out(total(score_sites(model, args, values)))


def log_weights(model: PyroFunction, guide: PyroFunction, args: Args, num_particles: int) -> Tensor:
    """Log p(x, z_k) - log q(z_k|x) for z_k ~ q(z|x): nats, shape `(K, N)`."""
    drawn = draw(guide, args, num_particles)
    scores = score_sites(model, repeat(args, num_particles), drawn.values)
    return sum_out(total(scores) - total(drawn.scores)).reshape(num_particles, -1)


def score_sites(model: PyroFunction, args: Args, values: dict[str, Tensor]) -> dict[str, Score]:
    """The log density of each site of the model, latents set to `values`."""
    rows = len(args[0])
    conditioned = poutine.condition(model, data=values)
    sites = _samples(_trace(conditioned, args, owner=model))
    fresh = {n: s for n, s in sites.items() if not s["is_observed"]}
    if any(_is_enumerated(site) for site in fresh.values()):
        front = max((v.dim() - sites[n]["fn"].event_dim for n, v in values.items()), default=1)
        conditioned = poutine.enum(conditioned, first_available_dim=-1 - max(front, 1))
        sites = _samples(_trace(conditioned, args, owner=model))
    scores = {n: _score(s, rows) for n, s in sites.items()}
    observed = {n for n in scores if n not in values and n not in fresh}
    return {n: _observed(s) if n in observed else s for n, s in scores.items()}


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
    args = (x,) if isinstance(x, Tensor) else tuple(x)
    if not args or not all(isinstance(arg, Tensor) for arg in args):
        raise TypeError(f"x must be a tensor or a tuple of tensors, got {type(x).__name__}")
    sizes = {len(arg) if arg.dim() else 0 for arg in args}
    if len(sizes) > 1:
        raise ValueError(f"the tensors of x differ in their first dimension: {sorted(sizes)}")
    if sizes == {0}:
        raise ValueError("x is empty: expected a first dimension of at least one datum")
    return args


def check(model: PyroFunction, guide: PyroFunction, args: Args, scaled: bool = True) -> None:
    """Run model and guide on a few rows, with validation on, and refuse what cannot be scored.

    Changes no parameter, buffer, setting or random state.

    Args:
        model: A Pyro function of `args`.
        guide: A Pyro function of `args`.
        args: Data; a few rows are used.
        scaled: Whether a scale on a site is allowed.

    Raises:
        ValueError: If model and guide disagree on their latents, a latent has no density, a site
            does not give one number per row, or the data lie outside the likelihood's support.
    """
    # A number of rows that few other dimensions have, so that none passes for the rows.
    few = tuple(arg[torch.arange(7, device=arg.device) % len(arg)] for arg in args)
    with undisturbed(model, guide), pyro.validation_enabled(True), torch.no_grad():
        _check_guide(guide, few)
        sites = _latents(_trace(guide, few))
        drawn = draw(guide, few)
        try:
            scores = score_sites(model, few, drawn.values)
        except Refused:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(_first_line(error, "the model fails on a batch of 7 rows")) from error
        _check_latents(set(sites), model, few, drawn.values)
        if not any(score.observed for score in scores.values()):
            raise Refused("the model observes nothing: give its data as pyro.sample(..., obs=x)")
        if not scaled:
            _check_scales(scores | drawn.scores)
        log_weights(model, guide, few, 2)


def observed_support(model: PyroFunction, guide: PyroFunction, args: Args) -> tuple[str, Any]:
    """Name and support of the site that observes the first argument itself; None if none does."""
    few = tuple(arg[:2] for arg in args)
    with undisturbed(model, guide), pyro.validation_enabled(False), torch.no_grad():
        try:
            scores = score_sites(model, few, draw(guide, few).values)
        except (RuntimeError, IndexError, ValueError):  # `check` finds out why
            return "", None
    for name, score in scores.items():
        if score.observed and score.value is few[0]:
            return name, score.fn.support
    return "", None


def state(model: PyroFunction, guide: PyroFunction, args: Args) -> dict[str, Tensor]:
    """The live tensors of a program by name: parameters and buffers of modules, and the store's.

    Args:
        model: A Pyro function of `args`.
        guide: A Pyro function of `args`.
        args: Data on which a program that makes its parameters as it runs makes them.
    """
    tensors: dict[str, Any] = {}
    with undisturbed(model, guide), torch.no_grad():
        for fn in (model, guide):
            sites = _trace(fn, args).nodes.items()
            if not _owners(fn):
                params = {name: site for name, site in sites if site["type"] == "param"}
                tensors |= {n: site["value"].unconstrained() for n, site in params.items()}
    owned = owners(model, guide)
    for i, module in enumerate(owned):
        tensors |= {f"{i}.{n}": t for n, t in module.state_dict(keep_vars=True).items()}
    for i, module in enumerate(m for m in modules(model, guide) if m not in owned):
        tensors |= {f"buffer.{i}.{name}": buffer for name, buffer in module.named_buffers()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def owners(*functions: PyroFunction) -> list[nn.Module]:
    """The modules that Pyro functions belong to; none for plain functions."""
    return _unique([m for fn in functions for m in _owners(fn)])


def modules(*functions: PyroFunction) -> list[nn.Module]:
    """The modules that Pyro functions run: their owners, and those a plain function refers to."""
    found = [m for fn in functions for m in (*_owners(fn), *_referred(fn))]
    return _unique(found)


@contextmanager
def in_mode(training: bool, *functions: PyroFunction) -> Iterator[None]:
    """Training or evaluation mode (dropout, batch statistics); each module's own comes back."""
    all_modules = [m for module in modules(*functions) for m in module.modules()]
    modes = [module.training for module in all_modules]
    try:
        for module in all_modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(all_modules, modes, strict=True):
            module.training = mode


@contextmanager
def undisturbed(*functions: PyroFunction, buffers: bool = True) -> Iterator[None]:
    """Put back the random state and, if `buffers`, the modules' buffers afterwards."""
    kept = [b for module in modules(*functions) for b in module.buffers()] if buffers else []
    saved = [b.clone() for b in kept]
    with torch.random.fork_rng(devices=_cuda_devices(*functions)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(kept, saved, strict=True):
                    buffer.copy_(value)


def _cuda_devices(*functions: PyroFunction) -> list[int]:
    """Indices of the GPUs that the modules are on."""
    tensors = (p for module in modules(*functions) for p in module.parameters())
    return sorted({p.device.index or 0 for p in tensors if p.device.type == "cuda"})


class Refused(ValueError):
    """A program that cannot be scored per datum."""


class _AllRows(Messenger):
    """Plates take every row: batches are already drawn, so nothing is subsampled inside."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) and msg["value"] is None and fn.subsample_size is not None:
            msg["value"] = torch.arange(fn.subsample_size)
            msg["done"] = True


def _trace(fn: PyroFunction, args: Args, owner: PyroFunction | None = None) -> poutine.Trace:
    """Run a Pyro function; one owned by modules runs on their own tensors, not the store's."""
    store = pyro.get_param_store()
    with store.scope() if _owners(owner or fn) else nullcontext(), _AllRows():
        return poutine.trace(fn).get_trace(*args)


def _samples(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    }


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    return {name: s for name, s in _samples(trace).items() if not s["is_observed"]}


def _is_enumerated(site: Any) -> bool:
    return site["infer"].get("enumerate") == "parallel"


def _one_per_row(sites: dict[str, Any], rows: int) -> bool:
    return all(site["fn"].batch_shape == (rows,) for site in sites.values())


def _draw_more(sites: dict[str, Any], num_particles: int, num_data: int) -> Draw:
    """Draw `num_particles` times from the one latent's distribution."""
    ((name, site),) = sites.items()
    fn, rows = site["fn"], num_particles * num_data
    z = fn((num_particles,))
    log_prob = scale_and_mask(fn.log_prob(z), mask=site["mask"]).reshape(rows)
    value = z.reshape(rows, *fn.event_shape)
    return Draw({name: value}, {name: Score(fn, value, log_prob, site["scale"])}, num_particles)


def _draw_enumerated(guide: PyroFunction, args: Args, num_particles: int) -> Draw:
    rows = repeat(args, num_particles)
    trace = _trace(poutine.enum(guide, first_available_dim=-2), rows, owner=guide)
    sites = _latents(trace)
    values = {name: site["value"] for name, site in sites.items()}
    sampled = {name: site for name, site in sites.items() if not _is_enumerated(site)}
    num_rows = num_particles * len(args[0])
    return Draw(values, {n: _score(s, num_rows) for n, s in sampled.items()}, num_particles)


def _score(site: Any, rows: int) -> Score:
    """Score a site, its inner plates summed."""
    fn, value, mask = site["fn"], site["value"], site["mask"]
    log_prob = scale_and_mask(fn.log_prob(value), mask=mask)
    if log_prob.dim() == 0 or log_prob.shape[-1] != rows:
        raise Refused(
            f"site {site['name']!r} has log densities of shape {tuple(log_prob.shape)} for {rows} "
            "rows of data: expected one number per row in the last dimension. Sample it inside "
            'pyro.plate("data", len(x)) and declare event dimensions with .to_event'
        )
    inner = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.dim != -1]
    present = [dim for dim in inner if -dim <= log_prob.dim()]
    if present:
        log_prob = log_prob.sum(present, keepdim=True)
        while log_prob.dim() > 1 and log_prob.shape[0] == 1:
            log_prob = log_prob.squeeze(0)
    return Score(fn, value, log_prob, site["scale"], mask)


def _observed(score: Score) -> Score:
    return Score(score.fn, score.value, score.log_prob, score.scale, score.mask, observed=True)


def _owners(fn: PyroFunction) -> list[nn.Module]:
    """The modules a function belongs to: itself, what its method is bound to, what it wraps."""
    if isinstance(fn, Program):
        return list(fn.owners)
    if isinstance(fn, nn.Module):
        return [fn]
    if inspect.ismethod(fn):
        return [fn.__self__] if isinstance(fn.__self__, nn.Module) else []
    if isinstance(fn, functools.partial):
        inner = [fn.func, *fn.args, *(fn.keywords or {}).values()]
        return [m for item in inner if callable(item) for m in _owners(item)]
    return []


def _referred(fn: Any) -> list[nn.Module]:
    """Modules that a plain function reaches through its closure or its globals."""
    if isinstance(fn, functools.partial):
        return [m for item in (fn.func, *fn.args) if callable(item) for m in _referred(item)]
    if not inspect.isfunction(fn):
        return []
    variables = inspect.getclosurevars(fn)
    reached = [*variables.nonlocals.values(), *variables.globals.values()]
    return [value for value in reached if isinstance(value, nn.Module)]


def _unique(items: list[nn.Module]) -> list[nn.Module]:
    return list({id(item): item for item in items}.values())


def _first_line(error: Exception, where: str) -> str:
    lines = str(error).strip().splitlines()
    return f"{where}: {lines[0] if lines else type(error).__name__}"


def _check_guide(guide: PyroFunction, args: Args) -> None:
    try:
        sites = _latents(_trace(guide, args))
    except Refused:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(_first_line(error, "the guide fails on a batch of 7 rows")) from error
    if not sites:
        raise Refused("the guide samples nothing: it must sample every latent of the model")
    for name, site in sites.items():
        fn = site["fn"]
        while hasattr(fn, "base_dist") and not isinstance(fn, dist.Delta):
            fn = fn.base_dist
        if isinstance(fn, dist.Delta):
            raise Refused(
                f"the guide's site {name!r} is a Delta, which has no density: ELBO and log p(x) "
                "need a guide that spreads, such as a Normal"
            )


def _check_latents(
    in_guide: set[str], model: PyroFunction, args: Args, values: dict[str, Tensor]
) -> None:
    sites = _samples(_trace(poutine.condition(model, data=values), args, owner=model))
    in_model = {n for n, s in sites.items() if not s["is_observed"] and not _is_enumerated(s)}
    if in_model:
        raise Refused(
            f"the model's latent {_names(in_model)} is not in the guide: log p(x) would be wrong. "
            'Sample it in the guide, or mark it infer={"enumerate": "parallel"} to sum it out'
        )
    if extra := in_guide - set(sites):
        raise Refused(
            f"the guide's latent {_names(extra)} is not in the model: both must sample the same "
            "sites under the same names"
        )
    enumerated = [s for s in sites.values() if _is_enumerated(s)]
    plates = {f.name for s in sites.values() for f in s["cond_indep_stack"] if f.dim != -1}
    if enumerated and plates:
        raise Refused(
            f"site {enumerated[0]['name']!r} is enumerated beside the inner plate {_names(plates)}:"
            " sum it out by hand, or move the inner plate's variables into event dimensions"
        )


def _check_scales(scores: dict[str, Score]) -> None:
    for name, score in scores.items():
        if not isinstance(score.scale, Tensor) and score.scale == 1:
            continue
        raise Refused(
            f"site {name!r} has a scale: inside the logarithm of an importance-weighted objective "
            "it is no bound. Take poutine.scale or the subsampling plate away, or use the ELBO"
        )


def _names(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
