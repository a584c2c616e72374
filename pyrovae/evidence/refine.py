r"""A guide whose parameters are free for each datum: variational inference without an encoder.

An encoder gives each datum the parameters :math:`\phi = f(x)` of its q(z|x). Here they are set
free,

.. math:: \phi_n^* = \arg\max_\phi E_{q_\phi(z)}[\log p(x_n, z) - \log q_\phi(z)],

each datum by itself, from where the encoder puts them or from one place for all, model and encoder
as they are. What is gained over the encoder is its amortization gap; what is then left to log p(x)
is the price of the family.

References:
    Semi-Amortized Variational Autoencoders (Kim et al., 2018), arXiv:1802.02550;
    Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018), arXiv:1801.03558
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import is_dependent

from pyrovae import program
from pyrovae._part import Conditional
from pyrovae.data import Split
from pyrovae.evidence.walk import ROWS, Walk, at_least
from pyrovae.objectives import StickingTheLanding
from pyrovae.program import Args, PyroFunction

STARTS = ("guide", "constant")

BLOCK = 4000
"""Rows of the model, about, in a step of Adam, whose own price many rows share."""

COMPARED = 100
"""Draws per datum by which the end is compared with the start."""

TOLERATED = 0.1
"""Nats, at most, that the end may seem worse by and pass for better, by chance of those draws."""

PREFERRED = {
    "probs": "logits",
    "covariance_matrix": "scale_tril",
    "precision_matrix": "scale_tril",
}
"""Of parameters that say the same, which one is set free."""


class Refined(NamedTuple):
    """A program whose guide has parameters for each datum, which travel beside the data.

    Whatever takes a model, a guide and data takes these three: `log_px(*refine(...))`.

    Attributes:
        model: p(x, z), blind to the parameters.
        guide: q(z|x) with the parameters of each row.
        x: The data as the model saw them, and behind them the parameters, unconstrained.
    """

    model: PyroFunction
    guide: PyroFunction
    x: Split


def refine(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    *,
    steps: int = 200,
    lr: float = 0.1,
    num_particles: int = 8,
    start: str = "guide",
    seed: int | None = None,
    progress: bool = False,
) -> Refined:
    """Fit the guide's distributions to each datum by itself, by maximising its ELBO.

    What is free: all that a guide of this package takes from its network, and in a guide by hand
    the parameters of each site's distribution. A site given an earlier draw forgets it, as each
    site's parameters are now those of the datum alone. Adam takes `steps` steps, its rate falling
    to zero; a datum goes back to its start if fresh draws find the end worse by two standard
    errors, or a tenth of a nat. Gradients are those of sticking the landing, for guides that score
    any z: where the family holds the posterior, it is found. Nothing of the caller's changes.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x, whose sites can be differentiated through.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        steps: Of Adam; 0 sets the parameters free where they are.
        lr: Rate of the first step, for parameters before softplus, exp and the like.
        num_particles: Draws per datum and step.
        start: "guide", where the guide puts them, or "constant", their mean over the data: what
            can be found without an encoder.
        seed: Of the noise; None takes a new one.
        progress: Show a bar.

    Returns:
        Model, guide and data that `elbo` and `log_px` take.

    Raises:
        ValueError: If an argument is out of range, the program cannot be scored per datum, or a
            site cannot be differentiated through or taken apart.

    Example:
        >>> import pyro
        >>> from pyrovae.evidence import elbo
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # far from the posterior N(x / 2, 1 / 2)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        >>> better = refine(model, guide, torch.tensor([0.0, 1.0]), seed=0)
        >>> elbo(*better, num_particles=1000, seed=0)  # log p(x) is -1.2655 and -1.5155
        tensor([-1.2655, -1.5155], dtype=torch.float64)

    References:
        Semi-Amortized Variational Autoencoders (Kim et al., 2018), arXiv:1802.02550;
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018), arXiv:1801.03558;
        Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194
    """
    steps, num_particles = at_least("steps", steps, 0), at_least("num_particles", num_particles, 1)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}")
    if start not in STARTS:
        raise ValueError(f"start must be 'guide' or 'constant', got {start!r}")
    walk = Walk(model, guide, x, num_particles, seed, block_size=-(-BLOCK // num_particles))
    here = walk.programs
    begun = walk.map(lambda args, _: _free(here.guide, args))
    places, free = begun[0][0], _joined([params for _, params in begun])
    if start == "constant":
        free = tuple(p.mean(0, keepdim=True).expand_as(p) for p in free)

    def fitted(args: Args, index: slice) -> Args:
        refined = _programs(here.model, here.guide, len(args), places)
        first = tuple(p[index].clone() for p in free)
        last = _maximise(*refined, args, first, steps, lr, num_particles)
        kept = _better(*refined, args, first, last)
        return tuple(t.to(walk.split.log_det.device) for t in (*args, *kept))

    found = _joined(walk.map(fitted, "refine", progress))
    treatment = f"{walk.split.treatment}, guide refined"
    split = replace(walk.split, data=found, transform=_as_they_are, treatment=treatment)
    return Refined(*_programs(model, guide, len(found) - len(free), places), split)


def _maximise(
    model: PyroFunction,
    guide: PyroFunction,
    args: Args,
    start: Args,
    steps: int,
    lr: float,
    num_particles: int,
) -> Args:
    """The parameters that maximise each datum's ELBO, found by Adam."""
    free = [p.clone().requires_grad_() for p in start]
    loss = _loss(model, guide, (*args, *free), num_particles)
    adam = torch.optim.Adam(free, lr)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(model, guide, (*args, *free)), free)
        for param, grad in zip(free, grads, strict=True):
            param.grad = grad
        adam.step()
    return tuple(p.detach() for p in free)


def _loss(
    model: PyroFunction, guide: PyroFunction, args: Args, num_particles: int
) -> Callable[[PyroFunction, PyroFunction, Args], Tensor]:
    """Negative ELBO summed over the data; its gradient has no noise at a posterior if it can."""
    landing = StickingTheLanding(num_particles)
    try:
        landing.surrogate(model, guide, args)
    except (program.Refused, NotImplementedError):  # the guide scores only its own draws
        return lambda p, q, x: -program.log_weights(p, q, x, num_particles).sum() / num_particles
    return lambda p, q, x: landing.surrogate(p, q, x)[0]


def _better(model: PyroFunction, guide: PyroFunction, args: Args, first: Args, last: Args) -> Args:
    """The last parameters; the first where fresh noise, the same for both, speaks for those."""
    noise, bounds = _noise(), []
    for free in (first, last):
        torch.manual_seed(noise)
        bounds.append(program.log_weights(model, guide, (*args, *free), COMPARED, ROWS))
    gain = bounds[1] - bounds[0]
    noise_of_mean = gain.std(0) / math.sqrt(COMPARED)  # large where one of them is far off
    keep = gain.mean(0) > -(2 * noise_of_mean).clamp(max=TOLERATED)
    pairs = zip(first, last, strict=True)
    return tuple(b.where(keep.reshape(-1, *[1] * (b.dim() - 1)), a) for a, b in pairs)


@dataclass(frozen=True)
class _Places:
    """Where a guide's free parameters go.

    Attributes:
        nets: Which networks of parts have their output replaced, by the order in which they run.
        sites: How many parameters each other site's distribution has.
    """

    nets: tuple[int, ...]
    sites: dict[str, int]


def _programs(
    model: PyroFunction, guide: PyroFunction, num_args: int, places: _Places
) -> tuple[PyroFunction, PyroFunction]:
    """Model and guide as functions of the data and, behind them, the free parameters."""
    return (
        functools.partial(_blind, model, num_args),
        functools.partial(_freed, guide, num_args, places),
    )


def unrefined(guide: PyroFunction) -> PyroFunction:
    """The guide that was refined, a function of the same arguments: blind to the parameters."""
    assert isinstance(guide, functools.partial), "made by refine"
    before, num_args, _ = guide.args
    return functools.partial(_blind, before, num_args)


def _blind(model: PyroFunction, num_args: int, *args: Tensor) -> Any:
    return model(*args[:num_args])


def _freed(guide: PyroFunction, num_args: int, places: _Places, *args: Tensor) -> Any:
    free = iter(args[num_args:])
    outputs = {i: next(free) for i in places.nets}
    params = {name: [next(free) for _ in range(count)] for name, count in places.sites.items()}
    with _outputs(guide, lambda i, output: outputs.get(i, output)), _Given(params):
        return guide(*args[:num_args])


class _Given(Messenger):
    """Sites' distributions have these parameters, rows first."""

    def __init__(self, params: dict[str, list[Tensor]]):
        super().__init__()
        self.params = params

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.params and not msg["is_observed"]:
            values = iter(self.params[msg["name"]])
            rows = len(msg["fn"].batch_shape) - 1
            msg["fn"] = _rebuilt(msg["fn"], lambda _: next(values).movedim(0, rows))


@contextmanager
def _outputs(guide: PyroFunction, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """What the i-th network of a part to run puts out is `change(i, output)`."""
    inside = [m for owner in program.modules(guide) for m in owner.modules()]
    nets = {id(m.net): m.net for m in inside if isinstance(m, Conditional)}
    count = itertools.count()
    handles = [
        net.register_forward_hook(lambda _, __, output: change(next(count), output))
        for net in nets.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Dependence(Messenger):
    """Notes each site's distribution, and what its draw, earlier draws given, depends on."""

    def __init__(self, outputs: dict[int, Tensor]):
        super().__init__()
        self.outputs = outputs
        self.found: dict[str, set[int]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        z, used = msg["value"], set[int]()
        if isinstance(z, Tensor) and z.requires_grad and self.outputs:
            leaves = list(self.outputs.values())
            grads = torch.autograd.grad(z.sum(), leaves, retain_graph=True, allow_unused=True)
            used = {i for i, grad in zip(self.outputs, grads, strict=True) if grad is not None}
        self.found[msg["name"]] = used
        msg["value"] = z.detach() if isinstance(z, Tensor) else z


def _free(guide: PyroFunction, args: Args) -> tuple[_Places, list[Tensor]]:
    """The parameters to set free, unconstrained and rows first, where the guide puts them."""
    outputs: dict[int, Tensor] = {}

    def leaf(i: int, output: Tensor) -> Tensor:
        if len(output) != len(args[0]):
            return output
        outputs[i] = output.detach().requires_grad_()
        return outputs[i]

    with torch.enable_grad(), _outputs(guide, leaf), _Dependence(outputs) as depends:
        fns = program.distributions(guide, args)
    for name, fn in fns.items():
        if not fn.has_rsample:
            raise program.Refused(
                f"the guide's site {name!r} ({program.family(fn)}) cannot be differentiated "
                "through, so it cannot be refined: take a distribution that is reparameterized"
            )
    by_hand = {n: _parameters(n, fn) for n, fn in fns.items() if not depends.found[n]}
    used = sorted(set().union(*(depends.found[name] for name in fns)))
    places = _Places(tuple(used), {name: len(params) for name, params in by_hand.items()})
    ours = [outputs[i].detach() for i in used]
    return places, ours + [param for params in by_hand.values() for param in params]


def _parameters(name: str, fn: Any) -> list[Tensor]:
    """The parameters of a site's distribution, unconstrained and rows first."""
    params: list[Tensor] = []
    rows = len(fn.batch_shape) - 1

    def take(value: Tensor) -> Tensor:
        params.append(value.detach().movedim(rows, 0))
        return value

    try:
        again = _rebuilt(fn, take)
        same = _draws_alike(fn, again)
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise program.Refused(f"the guide's site {name!r} cannot be refined: {error}") from error
    if not same:
        raise program.Refused(
            f"the guide's site {name!r} cannot be refined: a {program.family(fn)} made anew of "
            "its parameters is another distribution"
        )
    return params


def _rebuilt(fn: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The distribution with `change` applied to its unconstrained parameters."""
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(_rebuilt(fn.base_dist, change), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _rebuilt(fn.base_dist, change).mask(fn._mask)
    if isinstance(fn, ExpandedDistribution) and fn.base_dist.batch_shape == fn.batch_shape:
        return _rebuilt(fn.base_dist, change)
    if fn.arg_constraints:
        return _rebuilt_of_arguments(fn, change)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(_rebuilt(fn.base_dist, change), fn.transforms)
    raise NotImplementedError(f"a {type(fn).__name__} does not say what its parameters are")


def _rebuilt_of_arguments(fn: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same of a distribution whose constructor takes its parameters."""
    if is_dependent(type(fn).support):  # then draws alone do not show how the ELBO changes
        raise NotImplementedError(f"the support of {type(fn).__name__} depends on its parameters")
    constraints = fn.arg_constraints
    arguments = {
        name: _changed(fn, getattr(fn, name), constraint, change)
        for name, constraint in constraints.items()
        if PREFERRED.get(name) not in constraints
    }
    for name, parameter in inspect.signature(type(fn).__init__).parameters.items():
        if parameter.default is parameter.empty and name not in ("self", *arguments):
            arguments[name] = getattr(fn, name)
    return type(fn)(**arguments)


def _changed(fn: Any, value: Any, constraint: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    transform = transform_to(constraint)
    raw = transform.inv(torch.as_tensor(value))
    event = raw.shape[raw.dim() - transform.domain.event_dim :]
    return transform(change(raw.expand(fn.batch_shape + event)))


def _draws_alike(fn: Any, again: Any) -> bool:
    """Whether two distributions give the same draws, and the same densities to their own."""
    noise, found = _noise(), []
    for one in (fn, again):
        torch.manual_seed(noise)
        z = one()
        found += [z, one.log_prob(z)]
    pairs = zip(found[:2], found[2:], strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-3) for a, b in pairs)


def _noise() -> int:
    """A seed."""
    return int(torch.randint(2**31, ()))


def _joined(blocks: list[Any]) -> Args:
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _as_they_are(x: Any) -> Any:
    return x
