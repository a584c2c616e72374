"""Log p(x, z) as a function of a program's continuous latents alone, its discrete ones summed.

A site that is marked for enumeration is summed by Pyro, along a dimension in front of the rows. A
discrete site that is not was not written for that: its values are listed, and each makes more rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.evidence.space import Space, summing
from pyrovae.program import Args, PyroFunction

LogDensity = Callable[[Tensor, Tensor], Tensor]
"""Numbers of data `(M,)` and their latents `(M, D)` to log densities `(M,)`, nats."""

MAX_VALUES = 10_000
"""Joint values of discrete latents that are listed at most."""

ROWS = 2000
"""Rows of the model run at once."""


class Joint:
    """Log p(x, z), z unconstrained, with all that is discrete summed out.

    Args:
        model: p(x, z), a Pyro function of `args`.
        guide: q(z|x), a Pyro function of `args`; only its sites and draws count.
        args: A few data.

    Attributes:
        space: The continuous latents.
        num_values: Joint values of the discrete latents; 1 without any.

    Raises:
        Refused: If the values of a discrete latent are too many, or not listed, or the support of a
            latent depends on the data.
    """

    def __init__(self, model: PyroFunction, guide: PyroFunction, args: Args):
        self._guide, self._model = guide, summing(model, program.summed_out(guide, args))
        drawn = program.ancestral(guide, args)
        scores = program.score_sites(self._model, args, drawn)
        self._listed = frozenset(name for name in drawn if _is_discrete(scores[name].fn))
        self.space = Space(model, guide, args, self._listed)
        self._enumerated = math.prod(program.total(scores).shape[:-1])
        self.num_values = self._enumerated * self._values(args)[0]

    def draws(self, args: Args, count: int) -> tuple[Tensor, Tensor]:
        """Draws from the guide and from the prior, each of shape `(count, N, D)`."""
        rows = program.repeat(args, count)
        found = [program.ancestral(fn, rows) for fn in (self._guide, self._model)]
        guide, prior = (self.space.flatten(z).unflatten(0, (count, -1)) for z in found)
        return guide, prior

    def at(self, args: Args) -> LogDensity:
        """The function of the latents, at these data."""
        count, listed = self._values(args)
        step = max(1, ROWS // (count * self._enumerated))

        def some(owner: Tensor, u: Tensor) -> Tensor:
            rows = program.repeat(tuple(arg[owner] for arg in args), count)
            values, log_det = self.space.values(u.repeat(count, 1))
            for name, (value, rows_dim) in listed.items():
                values[name] = value.repeat_interleave(len(u), 0).movedim(0, rows_dim)
            log_p = program.log_joint(self._model, rows, values) + log_det
            return log_p.unflatten(0, (count, -1)).logsumexp(0)

        def log_density(owner: Tensor, u: Tensor) -> Tensor:
            pieces = zip(owner.split(step), u.split(step), strict=True)
            return torch.cat([some(*piece) for piece in pieces])

        return log_density

    def _values(self, args: Args) -> tuple[int, dict[str, tuple[Tensor, int]]]:
        """How many joint values the listed latents have, and theirs, with where their rows go."""
        if not self._listed:
            return 1, {}
        drawn = program.ancestral(self._guide, args)
        scores = program.score_sites(self._model, args, drawn)
        found: dict[str, tuple[Tensor, int]] = {}
        count = 1
        for name in sorted(self._listed):
            fn, value = scores[name].fn, drawn[name]
            rows_dim = value.dim() - fn.event_dim - 1
            values = _every_value(name, fn, value.movedim(rows_dim, 0).shape[1:], count)
            found = {n: (v.repeat_interleave(len(values), 0), dim) for n, (v, dim) in found.items()}
            found[name] = values.repeat(count, *[1] * (values.dim() - 1)), rows_dim
            count *= len(values)
        return count, found


def _every_value(name: str, fn: Any, shape: torch.Size, others: int) -> Tensor:
    """All values of a discrete latent, shape `(values, *shape)`.

    Args:
        name: Of its site.
        fn: Its distribution.
        shape: Of one value.
        others: Joint values of the sites before it.
    """
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    try:
        one = base.enumerate_support(expand=False)
    except NotImplementedError:
        raise program.Refused(
            f"site {name!r} ({program.family(fn)}) does not list its values, so they cannot be "
            "summed: take a Categorical over those that matter, or method='importance'"
        ) from None
    one = one.reshape(len(one), *base.event_shape)
    entries = shape.numel() // base.event_shape.numel()
    if entries * math.log(len(one)) > math.log(MAX_VALUES / others) + 1e-9:
        raise program.Refused(
            f"site {name!r} has {len(one)} values in each of {entries} entries: all discrete "
            f"latents together may have {MAX_VALUES:,} values to be summed; take "
            "method='importance'"
        )
    index = torch.cartesian_prod(*[torch.arange(len(one), device=one.device)] * entries)
    return one[index.reshape(-1, entries)].reshape(-1, *shape)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:  # says nothing
        return False
