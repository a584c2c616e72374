"""An estimator of log p(x), apart from the program and the data that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae._config import Configurable, class_path, parameters
from pyrovae.evidence import diagnostics
from pyrovae.evidence.result import LogPx
from pyrovae.evidence.walk import Walk
from pyrovae.program import Args

Estimate = Callable[[Args, slice], LogPx]


class Method(Configurable):
    """How log p(x) is estimated. Its constructor's arguments are its settings.

    Attributes:
        particles: K where none is given: log weights of each datum.
        unit: What its work is counted in.
        simulates: Whether it draws data of its own: it is for `validate` and not for `log_px`.
        dtype: The precision that it needs; None takes any.
    """

    particles: int
    dtype: torch.dtype | None = None
    unit = "particles"
    simulates = False

    @property
    def name(self) -> str:
        """What it is called: `log_px(..., method=name)`."""
        return type(self).__name__.lower()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, defaults among them."""
        defaults = {n: p.default for n, p in parameters(type(self)).items()}
        return defaults | self._init_args

    @property
    def identity(self) -> str:
        """What it is, and its settings."""
        return f"{class_path(type(self))} {self.settings}"

    def describe(self, num_particles: int) -> str:
        """What it does, for a sentence that says where a number comes from."""
        raise NotImplementedError

    def block_size(self, num_particles: int) -> int | None:
        """Data to estimate at once; None leaves it to the walk."""
        return None

    def work(self, num_particles: int, ways: int = 1) -> int:
        """Evaluations of the program that a datum takes, at most; 0 where that is not known.

        Args:
            num_particles: K.
            ways: 2 where the estimator runs backwards, too.
        """
        return 0

    def trial(self, walk: Walk) -> Callable[[Args], Callable[[], int]]:
        """A piece of the work, to be timed: a function from a block's data to one that does it.

        The inner function does so much of the work as it says.
        """
        raise NotImplementedError

    def estimator(self, walk: Walk, compile: bool | None = None) -> Estimate:
        """A function that estimates log p(x) of a block, as `Walk.map` takes it.

        Args:
            walk: Data and programs.
            compile: Compile what runs many times; None does where it pays.

        Raises:
            ValueError: If the method is not for this program.
        """
        raise NotImplementedError

    def summary(
        self, walk: Walk, args: Args, index: slice | Tensor, log_w: Tensor, **others: Any
    ) -> LogPx:
        """The mean weight of each datum of a block, with what the weights say of it.

        Args:
            walk: Data and programs.
            args: The block's data.
            index: Where in the data they are.
            log_w: Log weights, nats, shape `(K, N)`.
            others: Fields that the method knows better.

        Raises:
            ValueError: If a log weight is not a number.
        """
        log_w = log_w.cpu().double()
        if not (log_w < math.inf).all():
            raise ValueError(
                "a log weight is NaN or infinite: model or guide gives a density that is not a "
                "number for this data; check the weights and the data"
            )
        measures: dict[str, Callable[[Tensor], Tensor]] = {
            "values": diagnostics.log_mean_exp,
            "std_error": diagnostics.std_error,
            "ess": diagnostics.effective_sample_size,
            "khat": diagnostics.khat,
            "gain_per_doubling": diagnostics.gain_per_doubling,
            "spent": lambda log_w: torch.full_like(log_w[0], len(log_w)),
        }
        found = {n: measure(log_w) for n, measure in measures.items() if n not in others} | others
        found["values"] = found["values"] + walk.split.log_det[index].to(log_w)
        return LogPx(
            **found,
            method=self.name,
            num_particles=walk.num_particles,
            seed=walk.seed,
            how=self.describe(walk.num_particles),
            settings=self.settings,
            data=walk.split.description,
            num_dims=math.nan if len(args) > 1 else float((~args[0].isnan()).sum()) / len(args[0]),
        )
