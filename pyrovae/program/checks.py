"""What a program must be for its densities to be those of each datum: refused before it counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from pyrovae.program.densities import (
    Args,
    Draw,
    Refused,
    Score,
    draw,
    family,
    given,
    is_enumerated,
    latents,
    log_weights,
    samples,
    score_sites,
    trace,
)
from pyrovae.program.owned import PyroFunction, in_mode, modules, owners, undisturbed, validation

ROWS = 7
"""Rows to try a program on: a number that few other dimensions have, so none passes for rows."""

T = TypeVar("T")


def check(
    model: PyroFunction,
    guide: PyroFunction,
    args: Args,
    scaled: bool = True,
    alone: bool = False,
    density: bool = False,
) -> None:
    """Run model and guide on a few rows, with validation on, and refuse what cannot be scored.

    Changes no parameter, buffer, mode, setting or random state.

    Args:
        model: A Pyro function of `args`.
        guide: A Pyro function of `args`.
        args: Data; a few rows are used.
        scaled: Whether a scale on a site is allowed.
        alone: Whether a datum's densities must be the same in every batch: training does without,
            log p(x) does not.
        density: Whether the guide's latents need a density; `alone` they do.

    Raises:
        ValueError: If model and guide disagree on their latents, a latent has no density and needs
            one, a site does not give one number per row (or, if `alone`, depends on other rows), or
            the data lie outside the likelihood's support.
    """
    refuse_autoguides(guide)
    _refuse_other_arguments(model, guide, args)
    few = tuple(arg[torch.arange(ROWS, device=arg.device) % len(arg)] for arg in args)
    with (
        undisturbed(model, guide),
        in_mode(False, model, guide),
        validation(True),
        torch.no_grad(),
        _no_stray_modules(model, guide),
    ):
        torch.manual_seed(0)
        drawn, q_sites = _check_guide(guide, few)
        if density or alone:
            refuse_points(drawn)
        scores = _check_model(model, few, drawn, q_sites)
        for fn in (model, guide):
            _check_parameters(fn, few)
        if not scaled:
            refuse_scales(scores | drawn.scores)
        if alone:
            _check_reach(drawn, scores)
            _check_rows_alone(model, guide, few, drawn, scores)
        where = "model and guide fail on a batch of 14 rows, 7 data twice"
        attempt(where, lambda: log_weights(model, guide, few, 2))


def refuse_autoguides(guide: PyroFunction) -> None:
    """Refuse, before they run, guides that set themselves up for the data they see first."""
    if any(isinstance(owner, AutoGuide) for owner in owners(guide)):
        raise Refused(
            f"{type(guide).__name__} has parameters for each datum it was first run on: take a "
            "guide that is a function of the data, for any number of them"
        )


def points(drawn: Draw) -> list[str]:
    """The drawn sites that have all their mass at one value, and no density."""
    return [name for name, score in drawn.scores.items() if _is_point(score.fn)]


def refuse_points(drawn: Draw) -> None:
    """Refuse draws that have no density."""
    for name in points(drawn):
        raise Refused(
            f"the guide's site {name!r} is a Delta, which has no density: bounds and estimates of "
            "log p(x) need a guide that spreads, such as a Normal"
        )


def refuse_scales(scores: dict[str, Score]) -> None:
    """Refuse sites with a scale."""
    for name, score in scores.items():
        if not isinstance(score.scale, Tensor) and score.scale == 1:
            continue
        raise Refused(
            f"site {name!r} has a scale: inside the logarithm of an importance-weighted objective "
            "it is no bound. Take poutine.scale or the subsampling plate away, or use the ELBO"
        )


def validate(where: str, model: PyroFunction, guide: PyroFunction, args: Args) -> None:
    """Run one particle with validation on; what it raises becomes one line.

    Raises:
        ValueError: If the data, or what is drawn for them, lie outside a distribution's support.
    """
    with (
        undisturbed(model, guide),
        in_mode(False, model, guide),
        validation(True),
        torch.no_grad(),
    ):
        attempt(where, lambda: log_weights(model, guide, args, 1))


def observed_support(model: PyroFunction, guide: PyroFunction, args: Args) -> tuple[str, Any]:
    """Name and support of the site that observes the first argument itself.

    The support is None where no site does, and where its bounds are one for each row.
    """
    _refuse_other_arguments(model, guide, args)
    few = tuple(arg[:2] for arg in args)
    with undisturbed(model, guide), validation(False), torch.no_grad():
        try:
            scores = score_sites(model, few, draw(guide, few).values)
        except (RuntimeError, IndexError, TypeError, ValueError):  # `check` finds out why
            return "", None
    for name, score in scores.items():
        if score.observed and score.value is few[0]:
            return name, None if _by_rows(score.fn.support) else score.fn.support
    return "", None


def _refuse_other_arguments(model: PyroFunction, guide: PyroFunction, args: Args) -> None:
    """Refuse data of more or fewer parts than model and guide take.

    Raises:
        Refused: With what they take.
    """
    if found := misfit(args, model=model, guide=guide):
        parts = "x alone" if len(args) == 1 else f"{len(args)} tensors, as (x, y) is two"
        raise Refused(f"{found}, and the data are {parts}")


def misfit(args: Args, **functions: PyroFunction) -> str | None:
    """What the first of some functions takes that does not take these, by name; None if all do."""
    for role, function in functions.items():
        called = function.forward if isinstance(function, nn.Module) else function
        try:
            signature = inspect.signature(called, follow_wrapped=False)
        except ValueError:  # of what is built in, and of Pyro's handlers
            continue
        try:
            signature.bind(*args)
        except TypeError:
            bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            return f"the {role} takes {inspect.Signature(bare)}"
    return None


def _by_rows(support: Any) -> bool:
    """Whether a support has bounds for each row, as that of a binomial has."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return any(isinstance(bound, Tensor) and bound.dim() > 0 for bound in vars(support).values())


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
            sites = trace(fn, args).nodes.items()
            if not owners(fn):
                params = {name: site for name, site in sites if site["type"] == "param"}
                tensors |= {n: site["value"].unconstrained() for n, site in params.items()}
    owned = owners(model, guide)
    for i, module in enumerate(owned):
        tensors |= {f"{i}.{n}": t for n, t in module.state_dict(keep_vars=True).items()}
    for i, module in enumerate(m for m in modules(model, guide) if m not in owned):
        tensors |= {f"buffer.{i}.{name}": buffer for name, buffer in module.named_buffers()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def attempt(where: str, run: Callable[[], T]) -> T:
    """What `run` returns; what it raises as one line that says where."""
    try:
        return run()
    except Exception as error:  # whatever the user's program raises
        reason = (str(error).strip().splitlines() or [""])[0]
        if not reason or reason.startswith("Trace Shapes:"):  # all that Pyro adds to an empty one
            reason = type(error.__cause__ or error).__name__
        if isinstance(error, Refused):
            raise Refused(reason) from None
        kind = "" if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{reason}") from error


@contextmanager
def _no_stray_modules(*functions: PyroFunction) -> Iterator[None]:
    """Refuse a layer in training mode that could not be found, so cannot be put in evaluation."""

    def look(module: nn.Module, _: Any) -> None:
        if module.training and isinstance(module, (_DropoutNd, _NormBase)):
            raise Refused(
                f"a {type(module).__name__} in training mode runs that cannot be found from model "
                "and guide: call .eval() on it, or make it part of an nn.Module that they belong to"
            )

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _check_guide(guide: PyroFunction, args: Args) -> tuple[Draw, dict[str, Any]]:
    where = "the guide fails on a batch of 7 rows"
    traced = attempt(where, lambda: trace(guide, args))
    sites = latents(traced)
    _check_inner_plates(traced)
    if observed := samples(traced).keys() - sites.keys():
        raise Refused(
            f"the guide observes {_names(observed)}: a guide samples latents and nothing else (no "
            "obs=, no pyro.factor); what it depends on comes as an argument"
        )
    if not sites:
        raise Refused("the guide samples nothing: it must sample every latent of the model")
    _check_enumerated(sites)
    return attempt(where, lambda: draw(guide, args)), sites


def _check_model(
    model: PyroFunction, args: Args, drawn: Draw, q_sites: dict[str, Any]
) -> dict[str, Score]:
    where = "the model fails on a batch of 7 rows"
    traced = attempt(where, lambda: trace(given(model, drawn.values), args, owner=model))
    sites = samples(traced)
    _check_inner_plates(traced)
    in_model = {n for n, s in sites.items() if not s["is_observed"] and not is_enumerated(s)}
    if in_model:
        raise Refused(
            f"the model's latent {_names(in_model)} is not in the guide: log p(x) would be wrong. "
            'Sample it in the guide, or mark it infer={"enumerate": "parallel"} to sum it out'
        )
    if extra := q_sites.keys() - sites.keys():
        raise Refused(
            f"the guide's latent {_names(extra)} is not in the model: both must sample the same "
            "sites under the same names"
        )
    # What the guide sums is summed in the model too, marked there or not.
    marks = {n: q_sites[n] for n in q_sites if is_enumerated(q_sites[n])}
    _check_enumerated(sites | {n: sites[n] | {"infer": s["infer"]} for n, s in marks.items()})
    for name, site in q_sites.items():
        _check_alike(name, site, sites[name])
    scores = attempt(where, lambda: score_sites(model, args, drawn.values))
    if not any(score.observed for score in scores.values()):
        raise Refused("the model observes nothing: give its data as pyro.sample(..., obs=x)")
    return scores


def _check_parameters(fn: PyroFunction, args: Args) -> None:
    """What modules own runs in a scope of its own: it can keep no parameters in Pyro's store."""
    if not owners(fn):
        return
    own = {id(p) for module in modules(fn) for p in module.parameters()}
    with pyro.get_param_store().scope():
        poutine.trace(fn).get_trace(*args)
        used = pyro.get_param_store().get_state()["params"]
        strays = {name for name, tensor in used.items() if id(tensor) not in own}
    if strays:
        raise Refused(
            f"pyro.param {_names(strays)} in a function that belongs to a module would be "
            "forgotten: make it an nn.Parameter or a PyroParam of the module"
        )


def _check_alike(name: str, q: Any, p: Any) -> None:
    """The two distributions of a latent must be over the same space."""
    if q["fn"].event_dim != p["fn"].event_dim:
        raise Refused(
            f"site {name!r} has event shape {tuple(q['fn'].event_shape)} in the guide and "
            f"{tuple(p['fn'].event_shape)} in the model: declare the same dimensions by .to_event"
        )
    if is_enumerated(q):
        if _num_values(q) != _num_values(p):
            raise Refused(
                f"site {name!r} has {_num_values(q)} values in the guide and {_num_values(p)} in "
                "the model: summed out, it must have the same"
            )
        return
    if not _supports(p["fn"], q["fn"]):
        raise Refused(
            f"the guide draws {name!r} outside the support of the model's {name!r} "
            f"({p['fn'].support}): take a guide with that support"
        )


def _check_reach(drawn: Draw, scores: dict[str, Score]) -> None:
    """What the model may draw the guide must be able to draw, or a part of p(x) is left out."""
    for name, q in drawn.scores.items():
        if not _supports(q.fn, scores[name].fn):
            kinds = family(q.fn), family(scores[name].fn)
            raise Refused(
                f"the guide cannot draw all that the model's {name!r} may be ({kinds[0]} for a "
                f"{kinds[1]}), so log p(x) would come out too low: take a guide with the model's "
                "support"
            )


def _num_values(site: Any) -> int | str:
    try:
        return len(site["fn"].enumerate_support(expand=False))
    except NotImplementedError:
        return "uncountable"


def _supports(p: dist.TorchDistribution, q: dist.TorchDistribution) -> bool:
    """Whether p has a density where q draws; True where p cannot tell."""
    try:
        return bool(p.support.check(q.sample((100,))).all())
    except (NotImplementedError, AttributeError):
        return True


def _check_enumerated(sites: dict[str, Any]) -> None:
    summed = {n: s for n, s in sites.items() if is_enumerated(s)}
    plates = {f.name for s in sites.values() for f in s["cond_indep_stack"] if f.dim != -1}
    for name, site in summed.items():
        if plates:
            raise Refused(
                f"site {name!r} is enumerated beside the inner plate {_names(plates)}: sum it out "
                "by hand, or move the inner plate's variables into event dimensions"
            )
        if "num_samples" in site["infer"] or "_markov_scope" in site["infer"]:
            raise Refused(
                f"site {name!r} is enumerated with num_samples or inside pyro.markov: only plain "
                'infer={"enumerate": "parallel"} is summed out'
            )
        if _num_values(site) == "uncountable":
            raise Refused(
                f"site {name!r} is enumerated, but {type(site['fn']).__name__} does not list its "
                "values: take a Categorical over them"
            )


def _check_inner_plates(traced: Any) -> None:
    """A plate inside a row must not leave a part of it out."""
    parts = {
        name
        for name, site in traced.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["fn"], _Subsample)
        and site["fn"].subsample_size not in (None, site["fn"].size)
    }
    used = {f.name for s in samples(traced).values() for f in s["cond_indep_stack"] if f.dim != -1}
    if parts & used:
        raise Refused(
            f"the inner plate {_names(parts & used)} takes a subsample: log p(x) needs every entry "
            "of a datum"
        )


def _check_rows_alone(
    model: PyroFunction, guide: PyroFunction, args: Args, drawn: Draw, scores: dict[str, Score]
) -> None:
    """A datum's densities must not depend on what else is in the batch, nor on chance."""
    values = {}
    for name, value in drawn.values.items():
        dim = value.dim() - scores[name].fn.event_dim - 1
        values[name] = value.narrow(dim, 4, 3) if value.shape[dim] == ROWS else value
    alone = score_sites(model, tuple(arg[4:] for arg in args), values)
    for name, score in scores.items():
        _same("model", name, score.log_prob[..., 4:], alone[name].log_prob)
    others = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    try:
        before = score_sites(guide, args, drawn.values)
        after = score_sites(guide, tuple(arg[others.to(arg.device)] for arg in args), drawn.values)
    except Exception:  # a flow that scores only its own draws
        return
    for name, score in before.items():
        _same("guide", name, score.log_prob[..., :3], after[name].log_prob[..., :3])


def _same(where: str, name: str, left: Tensor, right: Tensor) -> None:
    if left.dtype in (torch.bfloat16, torch.float16):
        return
    left, right = torch.broadcast_tensors(left, right)
    if not torch.allclose(left, right, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise Refused(
            f"site {name!r} of the {where} gives a datum another log density in another batch: it "
            "must depend on that row of the arguments alone (no statistics of the batch, no random "
            "numbers outside pyro.sample, no data that are not arguments)"
        )


def _is_point(fn: dist.TorchDistribution) -> bool:
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.Delta):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _names(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
