"""What training maximises: `ELBO`s in Pyro's sense, for `pyrovae.fit` and for Pyro's own `SVI`.

An objective's `differentiable_loss` is a scalar summed over the batch: its value is the loss, its
gradient the estimator. Nothing in it leaves the graph, so it is traced and compiled as it stands.
"""

from __future__ import annotations

import logging
from typing import Any

import pyro.infer
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae import program
from pyrovae._config import Configurable
from pyrovae.program import Args, Draw, PyroFunction, Score

__all__ = ["ELBO", "Objective"]

_log = logging.getLogger(__name__)


class Objective(Configurable, pyro.infer.ELBO):
    """Base of objectives: a subclass writes `surrogate`."""

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to report of it.

        Args:
            model: p(x, z), a Pyro function of `args`.
            guide: q(z|x), a Pyro function of `args`.
            args: One batch.
            kl_weight: Weight of the KL, on top of the objective's own: training warms it up.

        Returns:
            The loss to differentiate, and by name detached terms to report, with "elbo" among them
            at KL weight 1. All are scalars in nats, summed over the batch.
        """
        raise NotImplementedError

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's objectives are made of joint traces, ours of densities per datum."""
        raise NotImplementedError

    def differentiable_loss(
        self, model: PyroFunction, guide: PyroFunction, *args: Tensor
    ) -> Tensor:
        """The loss of a batch, in nats summed over it."""
        return self.surrogate(model, guide, args)[0]

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


class ELBO(Objective):
    r"""Evidence lower bound, by the reparameterization trick.

    .. math:: E_{q(z|x)}[\log p(x|z)] - \beta \, KL(q(z|x) \| p(z))

    A site marked for enumeration is summed out. A scale in the user's program (`poutine.scale`, a
    subsampling plate) weighs the loss, and not what is reported.

    Args:
        num_particles: Draws of z per datum.
        analytic_kl: Take the KL in closed form wherever one is registered; where none is, a line
            in the log says so and it is sampled.
        beta: Weight of the KL; 1 is the bound.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114;
        beta: beta-VAE (Higgins et al., 2017)
    """

    def __init__(self, num_particles: int = 1, analytic_kl: bool = False, beta: float = 1.0):
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        super().__init__(num_particles=num_particles)
        self.analytic_kl, self.beta = analytic_kl, beta
        self._said: set[str] = set()

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative bound, and "elbo", "reconstruction" and "kl" to report."""
        k = self.num_particles
        drawn = program.draw(guide, args, k, by_rows=self.analytic_kl)
        _check_reparameterized(drawn)
        sites = program.score_sites(model, program.repeat(args, k), drawn.values)
        if any(score.log_prob.dim() > 1 for score in (*sites.values(), *drawn.scores.values())):
            return self._summed_out(sites, drawn, k)
        latents = {name: sites[name] for name in drawn.values}
        observed = [(s.log_prob, s.scale) for s in sites.values() if s.observed]
        kl_terms = self._kl(latents, drawn)
        loss = self.beta * kl_weight * _weighted(kl_terms) - _weighted(observed)
        kl = sum(term.detach().sum() for term, _ in kl_terms) / k
        reconstruction = sum(term.detach().sum() for term, _ in observed) / k
        terms = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
        return loss / k, {name: torch.as_tensor(term) for name, term in terms.items()}

    def _kl(self, latents: dict[str, Score], drawn: Draw) -> list[tuple[Tensor, Any]]:
        """Terms that sum to the KL, each with the scale that weighs it in the loss."""
        in_order = list(latents) == list(drawn.values)
        terms: list[tuple[Tensor, Any]] = []
        for name, q in drawn.scores.items():
            p = latents[name]
            closed = self._closed_form(name, q, p) if self.analytic_kl and in_order else None
            if closed is not None:
                terms.append((closed, q.scale))
            else:
                terms += [(q.log_prob, q.scale), (-p.log_prob, p.scale)]
        return terms

    def _closed_form(self, name: str, q: Score, p: Score) -> Tensor | None:
        try:
            return scale_and_mask(kl_divergence(q.fn, p.fn), mask=q.mask)
        except NotImplementedError:
            if name not in self._said:
                self._said.add(name)
                kinds = f"{_family(q)} from {_family(p)}"
                _log.warning("the KL at site %r has no closed form (%s): sampled", name, kinds)
            return None

    def _summed_out(
        self, sites: dict[str, Score], drawn: Draw, k: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound whose enumerated sites are summed out inside the logarithm."""
        bound = program.sum_out(program.total(sites) - program.total(drawn.scores)).sum() / k
        return -bound, {"elbo": bound.detach()}


def _weighted(terms: list[tuple[Tensor, Any]]) -> Any:
    return sum((term * scale).sum() for term, scale in terms)


def _check_reparameterized(drawn: Draw) -> None:
    for name, score in drawn.scores.items():
        if not score.fn.has_rsample:
            raise ValueError(
                f"the guide's site {name!r} ({_family(score)}) cannot be differentiated through: "
                "take a distribution that is reparameterized, or mark a discrete one "
                'infer={"enumerate": "parallel"}'
            )


def _family(score: Score) -> str:
    fn = score.fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__
