"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae import program
from pyrovae.objectives.base import Densities, Objective
from pyrovae.program import Args, Draw, PyroFunction, Refused, Score


class ELBO(Objective):
    r"""Evidence lower bound, by the reparameterization trick.

    .. math:: E_{q(z|x)}[\log p(x|z)] - \beta \, KL(q(z|x) \| p(z))

    The objective to start from, for any guide whose draws can be differentiated through.

    With free bits the KL of each dimension of z, averaged over the batch, costs nothing below a
    floor, so that latents are not given up early; the loss then is that of
    :math:`\sum_j \max(\text{free bits}, KL_j)`, once per datum. Where guide or prior do not
    factorise, the floor is that of the whole site, and a line in the log says so.

    A scale in the user's program (`poutine.scale`, a subsampling plate) weighs the loss, and not
    what is reported. A site marked for enumeration is summed out inside the logarithm, where a
    scale has no meaning and is left out; the weight of the KL is then that of
    log p(z) - log q(z|x).

    Args:
        num_particles: Draws of z per datum.
        analytic_kl: Take the KL in closed form where that is possible; where it is not, a line in
            the log says why and it is sampled.
        beta: Weight of the KL; 1 is the bound.
        free_bits: Nats of KL that cost nothing, in each dimension of z.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114;
        beta: beta-VAE (Higgins et al., 2017); free bits: Improved Variational Inference with
        Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934
    """

    def __init__(
        self,
        num_particles: int = 1,
        analytic_kl: bool = False,
        beta: float = 1.0,
        free_bits: float = 0.0,
    ):
        super().__init__(num_particles)
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.analytic_kl, self.beta, self.free_bits = analytic_kl, beta, free_bits
        self.density, self.scaled = free_bits > 0, not free_bits
        self.by_rows = analytic_kl or free_bits > 0

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative bound, and "elbo", "reconstruction" and "kl" to report, the KL by site."""
        drawn = self.draw(guide, args, self.num_particles)
        return self._bound(model, args, drawn, kl_weight)

    def _bound(
        self, model: PyroFunction, args: Args, drawn: Draw, kl_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sites, k = self.score(model, args, drawn.values, drawn), self.num_particles
        if any(score.log_prob.dim() > 1 for score in (*sites.values(), *drawn.scores.values())):
            return self._summed_out(sites, drawn, kl_weight)
        observed = [(s.log_prob, s.scale) for s in sites.values() if s.observed]
        kls = self._kls(sites, drawn)
        cost = _weighted(term for terms in kls.values() for term in terms)
        if self.free_bits:
            cost = sum(self._floored(n, q, sites[n], kls[n]) for n, q in drawn.scores.items())
        loss = (self.beta * kl_weight * cost - _weighted(observed)) / k
        kl = {name: sum(term.detach().sum() for term, _ in kls[name]) / k for name in kls}
        reconstruction = sum(term.detach().sum() for term, _ in observed) / k
        total = sum(kl.values())
        terms = {"elbo": reconstruction - total, "reconstruction": reconstruction, "kl": total}
        if len(kl) > 1:
            terms |= {f"kl_{name}": value for name, value in kl.items()}
        return loss, {name: torch.as_tensor(term) for name, term in terms.items()}

    def _kls(self, sites: dict[str, Score], drawn: Draw) -> dict[str, list[tuple[Tensor, Any]]]:
        """For each site, terms that sum to its KL, each with the scale that weighs it."""
        # Integrating a latent out is right only once those that it depends on have been drawn.
        in_order = [name for name in sites if name in drawn.scores] == list(drawn.scores)
        kls: dict[str, list[tuple[Tensor, Any]]] = {}
        for name, q in drawn.scores.items():
            p = sites[name]
            closed = self._closed_form(name, q, p, in_order) if self.analytic_kl else None
            sampled = [(q.log_prob, q.scale), (-p.log_prob, p.scale)]
            kls[name] = sampled if closed is None else [(closed, q.scale)]
        return kls

    def _closed_form(self, name: str, q: Score, p: Score, in_order: bool) -> Tensor | None:
        if not in_order:
            obstacle = "the guide samples the latents in another order than the model"
        elif not (_same(q.scale, p.scale) and _same(q.mask, p.mask)):
            obstacle = "its scale or mask is not that of the guide"
        else:
            try:
                return scale_and_mask(kl_divergence(q.fn, p.fn), mask=q.mask)
            except NotImplementedError:
                pair = f"{program.family(q.fn)} from {program.family(p.fn)}"
                obstacle = f"none is registered for {pair}"
        self._say(name, f"has no closed form of its KL ({obstacle}): sampled")
        return None

    def _floored(self, name: str, q: Score, p: Score, kl: list[tuple[Tensor, Any]]) -> Tensor:
        """The KL at a site, each dimension's mean over rows held above the floor, for all rows."""
        q_entry, p_entry = program.entries(q), program.entries(p)
        if q_entry is None or p_entry is None:
            self._say(name, "has one floor for all its dimensions: they do not factorise")
            each = sum((term for term, _ in kl), torch.zeros(()))
        elif len(kl) == 1:
            each = kl_divergence(q_entry, p_entry)
        else:
            each = q_entry.log_prob(q.value) - p_entry.log_prob(p.value)
        return len(each) * each.mean(0).clamp(min=self.free_bits).sum()

    def _summed_out(
        self, sites: dict[str, Score], drawn: Draw, kl_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bound with enumerated sites summed out inside the logarithm, scales left out."""
        if self.free_bits:
            raise Refused(
                "free_bits need the KL of each site, and an enumerated site is summed out beside "
                "them: take free_bits=0"
            )
        if self.analytic_kl:
            for name in drawn.scores:
                self._say(name, "has no closed form of its KL beside an enumerated site: sampled")
        densities = Densities.of(sites, drawn.scores, self.num_particles)
        return -densities.log_w(self.beta * kl_weight).mean(0).sum(), densities.terms()


def report(model: PyroFunction, guide: PyroFunction, args: Args) -> dict[str, Tensor]:
    """One-sample ELBO of a batch, with its reconstruction and KL: nats, summed over the batch.

    With several latents, the KL of each is there as `kl_` and its name.
    """
    return ELBO()._bound(model, args, program.draw(guide, args), 1.0)[1]


def _weighted(terms: Iterable[tuple[Tensor, Any]]) -> Any:
    return sum((term * scale).sum() for term, scale in terms)


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are known to agree; tensors in a graph cannot be compared."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
