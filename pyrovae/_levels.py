r"""Distributions over whole levels 0, 1, ..., m, and over what the model sees of them: level / m.

A level has a probability, not a density: log p(x) needs no dequantization and no Jacobian, and a
uniform distribution over 256 levels costs exactly 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid


class Lattice(constraints.Constraint):
    """The numbers 0, 1/m, 2/m, ..., 1.

    Args:
        max_value: m.
    """

    is_discrete = True

    def __init__(self, max_value: int):
        self.max_value = max_value
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values are within a hundredth of a level: float32 divides and multiplies so."""
        level = value * self.max_value
        return (value >= 0) & (value <= 1) & ((level - level.round()).abs() < 0.01)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.max_value} from 0 to 1"


class Levels(TorchDistribution):
    """A distribution over levels 0 to m, seen as level / m.

    Args:
        base: Distribution over levels.
        max_value: m.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, base: dist.TorchDistribution, max_value: int, validate_args: bool | None = None
    ):
        self.base, self.max_value = base, max_value
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Levels:
        """The same with a larger batch shape."""
        return Levels(self.base.expand(batch_shape), self.max_value, self._validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where level / m lies."""
        return constraints.independent(Lattice(self.max_value), self.event_dim)

    @property
    def mean(self) -> Tensor:
        """Mean of level / m."""
        return self.base.mean / self.max_value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the level, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self.base.log_prob((value * self.max_value).round())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of level / m."""
        return self.base.sample(sample_shape) / self.max_value


class Categorical(dist.Categorical):
    """Categorical whose categories are numbers: with a mean, and draws in the logits' precision."""

    has_enumerate_support = False

    @property
    def mean(self) -> Tensor:
        """Mean of the category."""
        levels = torch.arange(self.logits.shape[-1], device=self.logits.device)
        return (self.probs * levels).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)


class DiscretizedLogistic(TorchDistribution):
    r"""Logistic noise rounded to levels 0 to m, what falls outside taken to the ends.

    .. math:: P(k) = \sigma(b_k) - \sigma(a_k), \quad a_k, b_k = (k \mp \tfrac12 - \text{loc}) / s

    with a at the lowest level minus, b at the highest plus infinity: the probabilities sum to one.
    Their logarithms are taken without forming the difference,

    .. math:: \log P(k) = \log \sigma(b_k) + \log \sigma(-a_k) + \log(1 - e^{-1/s}),

    so they are exact, with finite gradients, however small the scale and far the location.

    Args:
        loc: Location, in levels, any shape.
        scale: Scale s, in levels, any shape.
        max_value: m.

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self, loc: Tensor, scale: Tensor, max_value: int, validate_args: bool | None = None
    ):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.max_value = max_value
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> DiscretizedLogistic:
        """The same with a larger batch shape."""
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogistic(loc, scale, self.max_value, self._validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.max_value)

    @property
    def mean(self) -> Tensor:
        """Mean level: the sum over levels of the probability to reach them, in flat memory."""
        total = torch.zeros_like(self.loc)
        for level in range(self.max_value):
            total = total + torch.sigmoid((self.loc - level - 0.5) / self.scale)
        return total

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of each level."""
        if self._validate_args:
            self._validate_sample(value)
        up = logsigmoid((value + 0.5 - self.loc) / self.scale)
        down = logsigmoid((self.loc - value + 0.5) / self.scale)
        between = up + down + torch.log(-torch.expm1(-1 / self.scale))
        return torch.where(value == 0, up, torch.where(value == self.max_value, down, between))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of logistic noise, rounded."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        noise = uniform.clamp(min=torch.finfo(uniform.dtype).tiny).logit()
        return (self.loc + self.scale * noise).round().clamp(0, self.max_value)


class CoupledLogistics(TorchDistribution):
    r"""For each pixel a mixture over its channels together, each channel led by those before it.

    Given the component, channel c is a discretized logistic at
    :math:`\text{loc}_c + \sum_{j < c} \gamma_{cj} (x_j - m/2)`.

    Args:
        logits: Of the components, with shape `(*, K, *pixels)`.
        loc: Locations, in levels, with shape `(*, K, C, *pixels)`.
        scale: Scales, in levels, with shape `(*, K, C, *pixels)`.
        coupling: Gamma below the diagonal, row by row: `(*, K, C * (C - 1) / 2, *pixels)`.
        max_value: m.
        event_dim: Dimensions of one draw, `(C, *pixels)`.

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        coupling: Tensor,
        max_value: int,
        event_dim: int,
        validate_args: bool | None = None,
    ):
        self.logits, self.loc, self.scale, self.coupling = logits, loc, scale, coupling
        self.max_value = max_value
        batch, event = loc.shape[: -event_dim - 1], loc.shape[-event_dim:]
        super().__init__(batch, event, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> CoupledLogistics:
        """The same with a larger batch shape."""
        lead = len(self.batch_shape)

        def wide(part: Tensor) -> Tensor:
            return part.expand(*batch_shape, *part.shape[lead:])

        logits, loc, scale = wide(self.logits), wide(self.loc), wide(self.scale)
        most, dims = self.max_value, self.event_dim
        return CoupledLogistics(logits, loc, scale, wide(self.coupling), most, dims)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.independent(
            constraints.integer_interval(0, self.max_value), self.event_dim
        )

    @property
    def mean(self) -> Tensor:
        """Mean level where no draw is cut off at the ends; else near it after the first channel."""
        each = self._in_turn(lambda channel: channel.mean)
        return (self.logits.softmax(-self.event_dim).unsqueeze(-self.event_dim) * each).sum(
            -self.event_dim - 1
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of a datum."""
        if self._validate_args:
            self._validate_sample(value)
        levels = value.unsqueeze(-self.event_dim - 1).unbind(-self.event_dim)
        weights = self.logits.log_softmax(-self.event_dim)
        given = [self._channel(levels[:c]).log_prob(level) for c, level in enumerate(levels)]
        pixels = torch.logsumexp(weights + torch.stack(given).sum(0), -self.event_dim)
        return pixels.flatten(pixels.dim() - self.event_dim + 1).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws: a component for each pixel, then channel after channel."""
        wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
        each = wide._in_turn(lambda channel: channel.sample())
        chosen = dist.Categorical(logits=wide.logits.movedim(-self.event_dim, -1)).sample()
        index = chosen.unsqueeze(-self.event_dim).unsqueeze(-self.event_dim)
        return each.take_along_dim(index, -self.event_dim - 1).squeeze(-self.event_dim - 1)

    def _in_turn(self, level_of: Callable[[DiscretizedLogistic], Tensor]) -> Tensor:
        """A level of each channel, made of its distribution given those before: `(*, K, *event)`.

        Args:
            level_of: From the distribution of a channel to its level.
        """
        levels: list[Tensor] = []
        for _ in range(self.event_shape[0]):
            levels.append(level_of(self._channel(levels)))
        return torch.stack(levels, -self.event_dim)

    def _channel(self, before: Sequence[Tensor]) -> DiscretizedLogistic:
        """The channel that follows these levels, of each component."""
        c = len(before)
        loc, scale = (part.select(-self.event_dim, c) for part in (self.loc, self.scale))
        for j, level in enumerate(before):
            gamma = self.coupling.select(-self.event_dim, c * (c - 1) // 2 + j)
            loc = loc + gamma * (level - self.max_value / 2)
        return DiscretizedLogistic(loc, scale, self.max_value, self._validate_args)
