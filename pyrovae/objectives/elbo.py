"""The evidence lower bound."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae import program
from pyrovae.objectives.base import Objective
from pyrovae.program import Args, Draw, PyroFunction, Score

_log = logging.getLogger(__name__)


class ELBO(Objective):
    r"""Evidence lower bound, by the reparameterization trick.

    .. math:: E_{q(z|x)}[\log p(x|z)] - \beta \, KL(q(z|x) \| p(z))

    The objective to start from, for any guide whose draws can be differentiated through.

    A scale in the user's program (`poutine.scale`, a subsampling plate) weighs the loss, and not
    what is reported. A site marked for enumeration is summed out inside the logarithm, where a
    scale has no meaning and is left out; the weight of the KL is then that of
    log p(z) - log q(z|x).

    Args:
        num_particles: Draws of z per datum.
        analytic_kl: Take the KL in closed form where that is possible; where it is not, a line in
            the log says why and it is sampled.
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
            return self._summed_out(sites, drawn, kl_weight)
        observed = [(s.log_prob, s.scale) for s in sites.values() if s.observed]
        kl_terms = self._kl(sites, drawn)
        loss = self.beta * kl_weight * _weighted(kl_terms) - _weighted(observed)
        kl = sum(term.detach().sum() for term, _ in kl_terms) / k
        reconstruction = sum(term.detach().sum() for term, _ in observed) / k
        terms = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
        return loss / k, {name: torch.as_tensor(term) for name, term in terms.items()}

    def _kl(self, sites: dict[str, Score], drawn: Draw) -> list[tuple[Tensor, Any]]:
        """Terms that sum to the KL, each with the scale that weighs it in the loss."""
        # Integrating a latent out is right only once those that it depends on have been drawn.
        in_order = [name for name in sites if name in drawn.scores] == list(drawn.scores)
        terms: list[tuple[Tensor, Any]] = []
        for name, q in drawn.scores.items():
            p = sites[name]
            closed = self._closed_form(name, q, p, in_order) if self.analytic_kl else None
            if closed is not None:
                terms.append((closed, q.scale))
            else:
                terms += [(q.log_prob, q.scale), (-p.log_prob, p.scale)]
        return terms

    def _closed_form(self, name: str, q: Score, p: Score, in_order: bool) -> Tensor | None:
        if not in_order:
            obstacle = "the guide samples the latents in another order than the model"
        elif not (_same(q.scale, p.scale) and _same(q.mask, p.mask)):
            obstacle = "its scale or mask is not that of the guide"
        else:
            try:
                return scale_and_mask(kl_divergence(q.fn, p.fn), mask=q.mask)
            except NotImplementedError:
                obstacle = f"none is registered for {_family(q)} from {_family(p)}"
        self._say(name, obstacle)
        return None

    def _say(self, name: str, reason: str) -> None:
        """Log once why the KL at a site is sampled."""
        if name not in self._said:
            self._said.add(name)
            _log.warning("the KL at site %r has no closed form (%s): sampled", name, reason)

    def _summed_out(
        self, sites: dict[str, Score], drawn: Draw, kl_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound with enumerated sites summed out inside the logarithm, scales left out."""
        latents = {name: sites[name] for name in drawn.scores}
        log_ratio = program.total(drawn.scores) - program.total(latents)
        rest = program.total(sites) - program.total(latents)
        if self.analytic_kl:
            for name in latents:
                self._say(name, "an enumerated site is summed out beside it")
        weight, k = self.beta * kl_weight, self.num_particles
        loss = -program.sum_out(rest - weight * log_ratio).sum() / k
        bound = program.sum_out((rest - log_ratio).detach()).sum() / k
        return loss, {"elbo": bound}


def report(model: PyroFunction, guide: PyroFunction, args: Args) -> dict[str, Tensor]:
    """One-sample ELBO of a batch, with its reconstruction and KL: nats, summed over the batch."""
    return ELBO().surrogate(model, guide, args)[1]


def _weighted(terms: list[tuple[Tensor, Any]]) -> Any:
    return sum((term * scale).sum() for term, scale in terms)


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are known to agree; tensors in a graph cannot be compared."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


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
