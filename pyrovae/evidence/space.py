"""A program's continuous latents as one unconstrained vector per row.

A latent with support in a part of space is z = T(u), u any real vector, and its density in u is
p(z) times the Jacobian determinant of T. Quadrature, annealing and Hamiltonian Monte Carlo move u.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrovae import program
from pyrovae.program import Args, PyroFunction


@dataclass(frozen=True)
class _Site:
    """One latent.

    Attributes:
        transform: From the real numbers to its support.
        shape: Of its unconstrained value without the rows.
        rows_dim: Where the rows are among its dimensions.
    """

    transform: Transform
    shape: torch.Size
    rows_dim: int


class Space:
    """The latents of a program that are not summed out, side by side.

    Args:
        model: p(x, z), a Pyro function of `args`.
        guide: q(z|x), a Pyro function of `args`.
        args: A few data.

    Attributes:
        names: The sites, in order.
        dim: D, the number of unconstrained latents of a row.
        summed: Names of the sites that the guide sums out.

    Raises:
        Refused: If a latent is discrete, or its support depends on the data.
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction,
        args: Args,
        listed: frozenset[str] = frozenset(),
    ):
        self.summed = program.summed_out(guide, args)
        drawn = program.ancestral(guide, args)
        scores = program.score_sites(summing(model, self.summed), args, drawn)
        ours = [name for name in drawn if name not in listed]
        self._sites = {name: _site(name, scores[name].fn, drawn[name]) for name in ours}
        self.names = tuple(self._sites)
        self.dim = sum(site.shape.numel() for site in self._sites.values())

    def flatten(self, values: dict[str, Tensor]) -> Tensor:
        """Latents as unconstrained vectors, shape `(rows, D)`."""
        parts = [
            site.transform.inv(values[name]).movedim(site.rows_dim, 0).flatten(1)
            if values[name].dim() > 1
            else site.transform.inv(values[name])[:, None]
            for name, site in self._sites.items()
        ]
        return torch.cat(parts, 1)

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Latents at unconstrained vectors, and the log determinant of each row, nats."""
        values, log_det = {}, u.new_zeros(len(u))
        start = 0
        for name, site in self._sites.items():
            count = site.shape.numel()
            part = u[:, start : start + count].reshape(len(u), *site.shape)
            part = part.movedim(0, site.rows_dim)
            values[name] = site.transform(part)
            det = site.transform.log_abs_det_jacobian(part, values[name])
            log_det = log_det + det.movedim(site.rows_dim, 0).reshape(len(u), -1).sum(1)
            start += count
        return values, log_det

    def rows_first(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Latents with their rows in front of all other dimensions, inner plates' included."""
        return {name: v.movedim(self._sites[name].rows_dim, 0) for name, v in values.items()}


def summing(model: PyroFunction, names: frozenset[str]) -> PyroFunction:
    """The model with these sites marked to be summed out, as the guide marks them."""
    return functools.partial(_marked, model, names) if names else model


def _marked(model: PyroFunction, names: frozenset[str], *args: Tensor) -> Any:
    def mark(site: Any) -> dict[str, Any]:
        return site["infer"] | ({"enumerate": "parallel"} if site["name"] in names else {})

    return poutine.infer_config(model, config_fn=mark)(*args)


def _site(name: str, fn: dist.TorchDistribution, value: Tensor) -> _Site:
    try:
        support = fn.support
    except NotImplementedError:  # says nothing: all real vectors
        support = constraints.real if fn.event_dim == 0 else constraints.real_vector
    if isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support.is_discrete:
        raise program.Refused(
            f"site {name!r} is discrete, and what moves it here needs its gradient: mark it "
            'infer={"enumerate": "parallel"} in the model and leave it out of the guide, to sum it '
            'out, or take method="importance"'
        )
    transform = biject_to(_alike(name, support))
    rows_dim = value.dim() - fn.event_dim - 1
    shape = list(transform.inverse_shape(value.shape))
    del shape[rows_dim]
    return _Site(transform, torch.Size(shape), rows_dim)


def _alike(name: str, support: Any) -> Any:
    """A support that is the same for every row, its bounds as numbers."""
    if isinstance(support, constraints.independent):
        base = _alike(name, support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = {n: v for n, v in vars(support).items() if isinstance(v, Tensor) and v.numel() > 1}
    if not bounds:
        return support
    if any(
        not torch.equal(bound, bound.flatten()[0].expand_as(bound)) for bound in bounds.values()
    ):
        raise program.Refused(
            f"the support of site {name!r} is not the same for every datum and entry: sample a "
            "variable of fixed support and make this one of it"
        )
    kinds = {"lower_bound": -math.inf, "upper_bound": math.inf}
    given = [torch.as_tensor(vars(support)[kind]) for kind in kinds if kind in vars(support)]
    numbers = [float(bound.flatten()[0]) for bound in given]
    return type(support)(*numbers)
