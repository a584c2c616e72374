"""Base of objectives, and what they are made of: log densities under K draws for each datum."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae import program
from pyrovae._config import Configurable
from pyrovae.program import Args, Draw, PyroFunction, Score

_log = logging.getLogger(__name__)


class Objective(Configurable, pyro.infer.ELBO):
    """Base of objectives: a subclass writes `surrogate`, and says what it needs of a program.

    Args:
        num_particles: Draws of z per datum.
    """

    reparameterized = True
    """Whether the guide's draws must be differentiable."""

    density = False
    """Whether the guide must have a density, which a plain autoencoder's has not."""

    scaled = True
    """Whether a scale in the user's program is understood."""

    enumerated = True
    """Whether sites that the guide marks for enumeration are summed out."""

    labels = False
    """Whether data with labels for some only are understood."""

    by_rows = False
    """Whether the guide runs on the repeated data, so that its distributions are those of rows."""

    top_k: int | None = None
    """Of a site that is summed out, how many values count, the most probable; all if None."""

    def __init__(self, num_particles: int = 1):
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        super().__init__(num_particles=num_particles)
        self._said: set[tuple[str, str]] = set()

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to report of it.

        Args:
            model: p(x, z), a Pyro function of `args`.
            guide: q(z|x), a Pyro function of `args`.
            args: One batch.
            kl_weight: What training warms up to one: the weight of log p(z) - log q(z|x) wherever
                it stands, if the objective says no other, on top of the objective's
                own: training warms it up.

        Returns:
            The loss to differentiate, and by name detached terms to report, with "elbo" among them
            at KL weight 1. All are scalars in nats, summed over the batch.
        """
        raise NotImplementedError

    def arrange(self, given: int | None, share: float) -> None:
        """Take note of how `fit` arranges batches of data with labels for some.

        Args:
            given: How many rows of a batch, the first, have labels; None, as before and after, if
                all have, or none.
            share: Of all data, those with labels.
        """

    def draw(self, guide: PyroFunction, args: Args, num_particles: int) -> Draw:
        """Draw from the guide, as `program.draw`; one that cannot do what is needed is refused.

        Raises:
            Refused: With the reason.
        """
        drawn = program.draw(guide, args, num_particles, self.by_rows, self.top_k)
        if self.reparameterized:
            _refuse_undifferentiable(drawn)
        if self.density:
            program.refuse_points(drawn)
        elif points := program.points(drawn):
            self._say(points[0], "has no density: what is called elbo is log p(x, z), and no bound")
        if not self.enumerated:
            program.refuse_enumerated(drawn)
        return drawn

    def score(
        self, model: PyroFunction, args: Args, values: dict[str, Tensor], drawn: Draw
    ) -> dict[str, Score]:
        """Score the model at `values`, as `program.score_sites`, on the data repeated.

        Raises:
            Refused: If a site has a scale that is not understood.
        """
        sites = program.score_sites(model, program.repeat(args, drawn.num_particles), values)
        if not self.scaled:
            program.refuse_scales(sites | drawn.scores)
        return sites

    def _say(self, name: str, what: str) -> None:
        """Log once what a reader of the results must know about a site."""
        if (name, what) not in self._said:
            self._said.add((name, what))
            _log.warning("site %r %s", name, what)

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's objectives are made of joint traces, ours of densities per datum."""
        raise NotImplementedError

    def differentiable_loss(
        self, model: PyroFunction, guide: PyroFunction, *args: Tensor
    ) -> Tensor:
        """The loss of a batch, in nats summed over it; parameters are those of Pyro's store."""
        return self.surrogate(_in_store(model), _in_store(guide), args)[0]

    @torch.no_grad()
    def loss(self, model: PyroFunction, guide: PyroFunction, *args: Tensor) -> float:
        """Value of the loss."""
        return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: PyroFunction, guide: PyroFunction, *args: Tensor) -> float:
        """Value of the loss; its gradients are left with the parameters."""
        loss = self.differentiable_loss(model, guide, *args)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


@dataclass(frozen=True)
class Densities:
    """Log densities of K draws for each of N data, row `k * N + n` being draw k for datum n.

    Attributes:
        rest: The model's sites other than the guide's latents: nats, shape `(K * N,)`, or
            `(values, K * N)` where a site is enumerated.
        log_pz: The guide's latents under the model, broadcast with `rest`.
        log_qz: Those latents under the guide, broadcast with `rest`.
        num_particles: K.
    """

    rest: Tensor
    log_pz: Tensor
    log_qz: Tensor
    num_particles: int

    @classmethod
    def of(cls, sites: dict[str, Score], scores: dict[str, Score], num_particles: int) -> Densities:
        """Those of a model's sites and a guide's."""
        rest = {name: score for name, score in sites.items() if name not in scores}
        latents = {name: sites[name] for name in scores}
        log_pz, log_qz = program.total(latents), program.total(scores)
        return cls(program.total(rest), log_pz, log_qz, num_particles)

    def log_w(self, weight: Tensor | float = 1.0) -> Tensor:
        """Log p(x|z) + weight (log p(z) - log q(z|x)), enumerated sites summed: `(K, N)`."""
        log_w = program.sum_out(self.rest + weight * (self.log_pz - self.log_qz))
        return log_w.reshape(self.num_particles, -1)

    def log_p(self, weight: Tensor | float = 1.0) -> Tensor:
        """Log p(x|z) + weight log p(z), enumerated sites summed: `(K, N)`."""
        log_p = program.sum_out(self.rest + weight * self.log_pz)
        return log_p.reshape(self.num_particles, -1)

    def log_q(self) -> Tensor:
        """Log q(z|x): `(K, N)`."""
        return self.log_qz.reshape(self.num_particles, -1)

    def terms(self) -> dict[str, Tensor]:
        """The ELBO at KL weight 1; reconstruction and KL where nothing is enumerated."""
        k, elbo = self.num_particles, self.log_w().detach().mean(0).sum()
        if max(part.dim() for part in (self.rest, self.log_pz, self.log_qz)) > 1:
            return {"elbo": elbo}
        reconstruction = self.rest.detach().sum() / k
        return {"elbo": elbo, "reconstruction": reconstruction, "kl": reconstruction - elbo}


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Log of the mean weight over particles, which come first."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def with_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """A number with this value, and the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def _in_store(fn: PyroFunction) -> PyroFunction:
    """The function as one that no module owns, so that it runs in Pyro's store, where SVI looks."""
    return lambda *args: fn(*args)


def _refuse_undifferentiable(drawn: Draw) -> None:
    for name, score in drawn.scores.items():
        if not score.fn.has_rsample:
            raise program.Refused(
                f"the guide's site {name!r} ({program.family(score.fn)}) cannot be differentiated "
                "through: take a distribution that is reparameterized, mark a discrete one "
                'infer={"enumerate": "parallel"}, or take an objective that does without'
            )
