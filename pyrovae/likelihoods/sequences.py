r"""Likelihoods of sequences: a recurrent decoder writes a datum step after step.

.. math:: p(x|z) = \prod_t p(x_t | x_1, ..., x_{t-1}, z)

The steps are the entries of a vector, the first dimension of data of shape `(steps, features)`, or
the rows of an image. The entries of a step are independent given z and the steps before.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pad

from pyrovae._config import shape_of
from pyrovae._distributions import diagonal_normal, positive_inverse
from pyrovae._sequences import Sequences
from pyrovae.likelihoods.base import Likelihood, moments
from pyrovae.likelihoods.unit import Bernoulli
from pyrovae.nets import GRU, Net, to_steps


class OfSequences(Likelihood):
    """Base of likelihoods of sequences: a gated recurrent unit that reads what it has written.

    The net makes of z the first state, and what is added to the unit's gates at every step. The
    last layer starts at zero and has a bias for each step, so a new decoder starts where its
    entries are independent, with the moments of the data.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        net: Recipe of the network from z to the unit, `4 * hidden` numbers; `MLP()` if None.
        hidden: Units of the decoder's state.
        word_dropout: Probability that a step is not read, in training only: what is left out must
            come from z. Draws, and densities in evaluation, read all steps.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        hidden: int = 64,
        word_dropout: float = 0.0,
    ):
        (self.hidden,) = shape_of(hidden, "hidden")
        if not 0 <= word_dropout < 1:
            raise ValueError(f"word_dropout must be at least 0 and below 1, got {word_dropout}")
        super().__init__(shape, latent_dim, net)
        self.word_dropout = word_dropout
        steps, features = to_steps(torch.empty(self.shape), self.shape).shape
        self.unit = GRU(features + 1, self.hidden)
        self.head = nn.Linear(self.hidden, self.num_params * features, bias=False)
        self.bias = nn.Parameter(torch.zeros(steps, self.num_params * features))
        nn.init.zeros_(self.head.weight)

    def step(self, params: Tensor) -> dist.TorchDistribution:
        """The distribution of a step, event shape `(features,)`, of these parameters."""
        raise NotImplementedError

    def quantile(self, step: dist.TorchDistribution, uniform: Tensor) -> Tensor:
        """A draw of a step made of uniform noise in [0, 1), one number for each entry."""
        raise NotImplementedError

    def param_shape(self) -> tuple[int]:
        """Shape of what the net puts out: the first state, and what the gates are given."""
        return (4 * self.hidden,)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new decoder at the moments of data `x`, `(n, *shape)`, whatever was before."""
        if not self.bias.any():
            parts = self.bias.chunk(self.num_params, -1)
            for part, start in zip(parts, self.link(*moments(x)), strict=True):
                part.copy_(to_steps(start, self.shape))

    def distribution(self, params: Tensor) -> Sequences:
        """Sequences by a decoder with this first state and these additions to its gates."""
        return Sequences(self, params)

    def score(self, context: Tensor, steps: Tensor) -> Tensor:
        """Log density of sequences `(*, steps, features)`, all steps read at once: shape `(*)`."""
        state, given = self._start(context)
        read = self.unit.read(self._before(steps)) + given[..., None, :]
        states = []
        for each in read.unbind(-2):
            state = self.unit(each, state)
            states.append(state)
        params = self.head(torch.stack(states, -2)) + self.bias
        return self.step(params).log_prob(steps).sum(-1)

    @torch.no_grad()
    def write(self, context: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences made of noise `(*, steps, features)`, and each step's mean given the others."""
        state, given = self._start(context)
        before = given.new_zeros(*given.shape[:-1], uniform.shape[-1] + 1)
        steps, means = [], []
        for noise, bias in zip(uniform.unbind(-2), self.bias, strict=True):
            state = self.unit(self.unit.read(before) + given, state)
            step = self.step(self.head(state) + bias)
            steps.append(self.quantile(step, noise))
            means.append(step.mean)
            before = pad(steps[-1], (0, 1), value=1.0)
        return torch.stack(steps, -2), torch.stack(means, -2)

    def _start(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The first state, and what is added to the gates."""
        state, given = context.split([self.hidden, 3 * self.hidden], -1)
        return state.tanh(), given

    def _before(self, steps: Tensor) -> Tensor:
        """What is read at each step: the one before and a 1, or zeros where there is none."""
        read = pad(pad(steps, (0, 1), value=1.0), (0, 0, 1, -1))
        if self.training and self.word_dropout:
            read = read * (torch.rand_like(read[..., :1]) >= self.word_dropout)
        return read


class RecurrentBernoulli(OfSequences):
    """Binary sequences: x_td ~ Bernoulli(sigmoid(f_td(z, x_1, ..., x_t-1))).

    Use it for binary data in which a step tells much of the next: rows of images, piano rolls. What
    the decoder learns of x from x it need not be told by z, so latents are easily given up; a KL
    warm-up, free bits and word dropout are there against that.

    Missing entries are refused: entries depend on each other given z.

    References:
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349;
        A Hierarchical Latent Vector Model for Learning Long-Term Structure in Music (Roberts et
        al., 2018), arXiv:1803.05428
    """

    kind = "binary"
    support = constraints.boolean
    link = Bernoulli.link

    def step(self, params: Tensor) -> dist.TorchDistribution:
        """Bernoulli with these logits."""
        return dist.Bernoulli(logits=params).to_event(1)

    def quantile(self, step: dist.TorchDistribution, uniform: Tensor) -> Tensor:
        """One where the noise is below the mean."""
        return (uniform < step.mean).to(uniform)


class RecurrentNormal(OfSequences):
    """Sequences of real values: x_td ~ N(f_td, s_td^2), functions of z and x_1, ..., x_t-1.

    Use it for measurements over time, standardized. What is said of `RecurrentBernoulli` holds.

    References:
        A Neural Representation of Sketch Drawings (Ha & Eck, 2017), arXiv:1704.03477
    """

    kind = "real"
    num_params = 2

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The mean, and the scale before softplus."""
        return mean, positive_inverse(variance.sqrt().clamp(min=0.01))

    def step(self, params: Tensor) -> dist.TorchDistribution:
        """Normal with this mean and raw scale."""
        loc, raw = params.chunk(2, -1)
        return diagonal_normal(loc, raw, 1)

    def quantile(self, step: dist.TorchDistribution, uniform: Tensor) -> Tensor:
        """The value that a share `uniform` of all draws is below."""
        return step.base_dist.icdf(uniform.clamp(min=torch.finfo(uniform.dtype).eps))
