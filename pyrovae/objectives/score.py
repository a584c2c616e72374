r"""Gradients from the score :math:`\nabla \log q(z|x)`, for guides without differentiable draws."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pyrovae import program
from pyrovae.objectives.base import Densities, Objective, log_mean_exp, with_value
from pyrovae.program import Args, Draw, PyroFunction, Refused


class _AtDraws(Objective):
    """Base: model and guide are scored at draws that carry no gradient."""

    reparameterized, density, scaled, enumerated = False, True, False, False

    def _densities(
        self, model: PyroFunction, guide: PyroFunction, args: Args
    ) -> tuple[Densities, Draw]:
        drawn = self.draw(guide, args, self.num_particles)
        values = {name: z.detach() for name, z in drawn.values.items()}
        scores = program.rescore(guide, args, drawn, values)
        sites = self.score(model, args, values, drawn)
        return Densities.of(sites, scores, self.num_particles), drawn


class ScoreFunction(_AtDraws):
    r"""Evidence lower bound, by the score function: black-box variational inference.

    .. math:: \nabla_\phi = E_q[(\log w - b) \nabla_\phi \log q(z|x)],
        \quad \log w = \log p(x, z) - \log q(z|x)

    The ELBO for guides whose draws cannot be differentiated through, such as those of discrete
    latents. Much noisier than the reparameterization trick; take many particles and a baseline b.

    Args:
        num_particles: Draws of z per datum.
        baseline: leave-one-out takes the mean log w of the datum's other draws off; none does not.

    References:
        Black Box Variational Inference (Ranganath et al., 2014), arXiv:1401.0118;
        leave-one-out: Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019)
    """

    def __init__(
        self,
        num_particles: int = 10,
        baseline: Literal["leave-one-out", "none"] = "leave-one-out",
    ):
        super().__init__(num_particles)
        if baseline not in ("leave-one-out", "none"):
            raise ValueError(f"baseline must be 'leave-one-out' or 'none', got {baseline!r}")
        if baseline == "leave-one-out" and num_particles < 2:
            raise ValueError("baseline 'leave-one-out' needs num_particles of at least 2, got 1")
        self.baseline = baseline

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative bound with the score function's gradient, and "elbo" to report."""
        densities, _ = self._densities(model, guide, args)
        log_w = densities.log_w(kl_weight)
        signal = log_w.detach()
        if self.baseline == "leave-one-out":
            k = self.num_particles
            signal = (signal - signal.mean(0)) * k / (k - 1)
        surrogate = densities.log_p(kl_weight) + signal * densities.log_q()
        loss = with_value(-log_w.mean(0).sum(), -surrogate.mean(0).sum())
        return loss, densities.terms()


class ReweightedWakeSleep(_AtDraws):
    r"""Reweighted wake-sleep: model and guide each descend on a loss of their own.

    .. math:: -\log \tfrac1K \sum_k w_k \;\text{ for p}, \qquad
        -\sum_k \tilde w_k \log q(z_k|x), \quad \tilde w_k = w_k / \textstyle\sum_j w_j
        \;\text{ for q}

    The guide learns the inclusive KL(p(z|x) || q(z|x)), so that it covers the posterior; its
    gradient gets better with K and needs no differentiable draws: for discrete latents, too. Asleep
    it learns from data and latents that the model dreams up (which count in running statistics, if
    the decoder has any). The value of the loss is the first of the two. Weights are normalised for
    each datum.

    Args:
        num_particles: K, the draws of z per datum.
        insomnia: Fraction of the guide's loss that is learned awake, on data; the rest asleep.

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, 2015), arXiv:1406.2751
    """

    def __init__(self, num_particles: int = 10, insomnia: float = 1.0):
        super().__init__(num_particles)
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia must lie between 0 and 1, got {insomnia}")
        self.insomnia = insomnia

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's loss with the gradients of both, and "elbo" and "bound" to report."""
        densities, drawn = self._densities(model, guide, args)
        log_w = densities.log_w(kl_weight)
        w = log_w.detach().softmax(0)
        awake = densities.log_p(kl_weight) + self.insomnia * densities.log_q()
        surrogate = (w * awake).sum()
        if self.insomnia < 1:
            dreamt = _dream_scores(model, guide, args, drawn)
            surrogate = surrogate + (1 - self.insomnia) * dreamt.sum()
        loss = with_value(-log_mean_exp(log_w).sum(), -surrogate)
        bound = log_mean_exp(densities.log_w().detach()).sum()
        return loss, densities.terms() | {"bound": bound}


def _dream_scores(model: PyroFunction, guide: PyroFunction, args: Args, drawn: Draw) -> Tensor:
    """Log q(z|x) at x and z drawn from the model, one for each datum."""
    dreamt, latents = program.simulate(model, args)
    if all(new is old for new, old in zip(dreamt, args, strict=True)):
        raise Refused(
            "the model observes none of its arguments as it is, so the guide cannot be shown data "
            "that the model draws: take insomnia=1"
        )
    values = {name: latents[name] for name in drawn.scores}
    return program.total(program.score_sites(guide, dreamt, values))
