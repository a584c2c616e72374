r"""Any Pyro model and guide as densities per datum.

A program is a pair of Pyro functions over the same data: a model, with density p(x, z), and a
guide, with density q(z|x). Everything else in this package (bounds, objectives, estimates of
log p(x), training) needs three things of it, and only this package reads Pyro's traces to get them:

* `draw`: z ~ q(z|x), K times for every datum, and log q(z|x);
* `log_joint`: log p(x, z), one number per row;
* `log_weights`: log p(x, z) - log q(z|x), shape `(K, N)`.

`densities` does that; `checks` refuses what would come out wrong; `owned` finds the modules that
functions belong to, and leaves them as they were.
"""

from __future__ import annotations

from torch import nn

from pyrovae.program.checks import (
    attempt,
    check,
    misfit,
    observed_support,
    points,
    refuse_autoguides,
    refuse_points,
    refuse_scales,
    state,
    validate,
)
from pyrovae.program.densities import (
    Args,
    Draw,
    PyroFunction,
    Refused,
    Score,
    ancestral,
    as_args,
    distributions,
    draw,
    entries,
    family,
    log_joint,
    log_weights,
    refuse_enumerated,
    repeat,
    rescore,
    sampler,
    score_sites,
    simulate,
    sum_out,
    summed_out,
    total,
)
from pyrovae.program.owned import in_mode, modules, owners, store_kept, undisturbed, validation

__all__ = [
    "Args",
    "Draw",
    "Program",
    "PyroFunction",
    "Refused",
    "Score",
    "ancestral",
    "as_args",
    "attempt",
    "check",
    "distributions",
    "draw",
    "entries",
    "family",
    "in_mode",
    "log_joint",
    "log_weights",
    "misfit",
    "modules",
    "observed_support",
    "owners",
    "points",
    "refuse_autoguides",
    "refuse_enumerated",
    "refuse_points",
    "refuse_scales",
    "repeat",
    "rescore",
    "sampler",
    "score_sites",
    "simulate",
    "state",
    "store_kept",
    "sum_out",
    "summed_out",
    "total",
    "undisturbed",
    "validate",
    "validation",
]


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
