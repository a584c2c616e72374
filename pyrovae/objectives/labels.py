"""The bound for data of which some have labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.objectives.base import Densities, Objective
from pyrovae.program import Args, PyroFunction, Refused


class SemiSupervised(Objective):
    r"""Evidence lower bound where labels y are given for some data, with a term that classifies.

    With L(x, y) for the ELBO of log p(x, y), a datum with a label counts L(x, y), one without

    .. math:: U(x) = \sum_y q(y|x) \, (L(x, y) - \log q(y|x)) \le \log p(x),

    and the loss, per datum, is

    .. math:: - s \, E_{labelled} L(x, y) - (1 - s) \, E_{others} U(x)
        - \alpha \, E_{labelled} \log q(y|x),

    with s the share of data that have a label: the bound of all data, and the last term.

    The classifier q(y|x) is part of the bound only where there is no label; the last term teaches
    it where there is. Every site that the guide marks for enumeration is summed so, one batch of
    rows for each of its values: a bound without the noise of drawn labels, which `TraceEnum_ELBO`
    estimates as well.

    The label is the last argument of model and guide, and left out where it is not given. `fit`
    takes data with labels for some (-1 for the others), and sees to it that each batch has data of
    both kinds, weighed as in the loss above.

    Training that warms up (`kl_warmup`) warms up the label, not the KL of z: until then the
    classifier learns from labels alone, and the model from what it says. From the start data
    without labels would move it to whatever clusters an untrained model sees.

    Args:
        num_particles: Draws of z per datum.
        alpha: Weight of the classification, in nats per nat of cross-entropy. The paper's is 0.1.
        beta: Weight of the KL of the continuous latents; 1 is the bound.
        share: Another s where some data have labels and some have not. Maaloe et al. take 0.5, with
            an alpha of 0.05 times data per label; with few labels a tenth, and 0.01 times data per
            label, learns fewer of them by heart.
        top_k: Where there is no label, sum the so many most probable ones only, or all if None.
            With q(y|x) cut to them this is a bound as well, lower, and cheaper.

    References:
        Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014),
        arXiv:1406.5298; Auxiliary Deep Generative Models (Maaloe et al., 2016), arXiv:1602.05473;
        for `top_k` Expectation Truncation and the Benefits of Preselection in Training Generative
        Models (Luecke and Eggert, 2010), JMLR 11
    """

    density, scaled, labels = True, False, True

    def __init__(
        self,
        num_particles: int = 1,
        alpha: float = 0.1,
        beta: float = 1.0,
        share: float | None = None,
        top_k: int | None = None,
    ):
        super().__init__(num_particles)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {value}")
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"share must be a number from 0 to 1, got {share}")
        if top_k is not None and not (isinstance(top_k, int) and top_k >= 2):
            raise ValueError(
                "top_k must be a whole number from 2 on, as one label alone does not move q(y|x), "
                f"got {top_k}"
            )
        self.alpha, self.beta, self.share, self.top_k = alpha, beta, share, top_k
        self._given: tuple[int, float] | None = None

    def arrange(self, given: int | None, share: float) -> None:
        """Take note of which rows have labels, and which share of all data does."""
        weight = share if self.share is None else self.share
        self._given = None if given is None else (given, weight)

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to report of it.

        That is "elbo", of log p(x) of data without labels, "labelled_elbo", of log p(x, y) of those
        with, "cross_entropy" of q(y|x) in nats and "accuracy": sums over the batch if all its data
        were like those.
        """
        batch = len(args[0])
        given, others, share = self._parts(args)
        loss = torch.zeros(())
        terms: dict[str, Tensor] = {}
        if others:
            bound, terms = self._unlabelled(model, guide, others, kl_weight)
            loss = loss - (1 - share) * batch * bound
        if given:
            bound, found = self._labelled(model, guide, given)
            loss = loss - batch * (share * bound - self.alpha * found["cross_entropy"])
            terms |= found if terms else found | {"elbo": found["labelled_elbo"]}
        return loss, {name: batch * term.detach() for name, term in terms.items()}

    def _parts(self, args: Args) -> tuple[Args, Args, float]:
        """Arguments of the data with labels and of those without, and the share of the first."""
        if len(args) == 1:
            return (), args, 0.0
        rows, share = self._given or (len(args[0]), 1.0)
        given = tuple(arg[:rows] for arg in args) if rows else ()
        others = tuple(arg[rows:] for arg in args[:-1]) if rows < len(args[0]) else ()
        return given, others, share

    def _unlabelled(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of U(x), and the mean ELBO at KL weight 1, its sum over labels inside the log."""
        drawn = self.draw(guide, args, self.num_particles)
        densities = Densities.of(
            self.score(model, args, drawn.values, drawn), drawn.scores, self.num_particles
        )
        log_qy = program.total(drawn.summed)
        warm = torch.as_tensor(kl_weight >= 1, device=log_qy.device)
        log_qy = torch.where(warm, log_qy, log_qy.detach())
        log_w = densities.rest + self.beta * (densities.log_pz - densities.log_qz)
        hidden = log_w.dim() - max(log_qy.dim(), 1)  # sites that the model alone sums out
        log_w = log_w.flatten(0, hidden - 1).logsumexp(0) if hidden > 0 else log_w
        bound = (log_qy.exp() * (log_w - log_qy)).sum() / (self.num_particles * len(args[0]))
        return bound, {"elbo": densities.log_w().mean()}

    def _labelled(
        self, model: PyroFunction, guide: PyroFunction, args: Args
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of L(x, y); what to report, with the cross-entropy of the classifier."""
        drawn = self.draw(guide, args, self.num_particles)
        if drawn.summed:
            raise Refused(
                f"the guide's site {min(drawn.summed)!r} is summed out though its label is given: "
                "sample it only where there is none"
            )
        densities = Densities.of(
            self.score(model, args, drawn.values, drawn), drawn.scores, self.num_particles
        )
        log_qy = self._log_qy(guide, args)
        right = (log_qy.argmax(0) == args[-1]).to(log_qy.dtype).mean()
        cross_entropy = -log_qy.gather(0, args[-1][None]).mean()
        return densities.log_w(self.beta).mean(), {
            "labelled_elbo": densities.log_w().mean(),
            "cross_entropy": cross_entropy,
            "accuracy": right,
        }

    def _log_qy(self, guide: PyroFunction, args: Args) -> Tensor:
        """Log q(y|x) of data with labels, from the guide without: `(values, rows)`."""
        summed = program.draw(guide, args[:-1]).summed  # all values, whatever `top_k`
        if len(summed) != 1:
            raise Refused(
                "the guide must sample one label where none is given, marked "
                f'infer={{"enumerate": "parallel"}}; it marks {len(summed)} sites'
            )
        ((_, score),) = summed.items()
        return score.log_prob
