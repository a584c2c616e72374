"""Likelihoods of grey levels 0, 1, ..., m: probabilities, so nothing is added to the data.

The model sees level / m, from 0 to 1; log p(x) is of the level.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae import _levels
from pyrovae._config import shape_of
from pyrovae._distributions import Binomial as _Binomial
from pyrovae._distributions import softplus_inverse
from pyrovae._levels import CoupledLogistics, Lattice, Levels
from pyrovae._part import data_shape
from pyrovae.likelihoods.base import Likelihood
from pyrovae.nets import Net


class OfLevels(Likelihood):
    """Base of likelihoods of levels.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
        max_value: The highest level m: 255 for 8 bits.
    """

    kind = "levels"

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        max_value: int = 255,
    ):
        if type(max_value) is not int or max_value < 1:
            raise ValueError(f"max_value must be a whole number from 1 on, got {max_value}")
        self.max_value, self.support = max_value, Lattice(max_value)
        super().__init__(shape, latent_dim, net)

    def _seen(self, levels: dist.TorchDistribution) -> Levels:
        return Levels(levels, self.max_value)


class Binomial(OfLevels):
    r"""Levels as counts of m trials: m x_d ~ Binomial(m, sigmoid(f_d(z))).

    Use it for scores out of m. For images it is a rough choice: the spread follows from the mean.
    """

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Logits of a mean kept a thousandth away from 0 and 1."""
        return (mean.clamp(0.001, 0.999).logit(),)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Binomial with these logits."""
        return self._independent(self._seen(_Binomial(self.max_value, logits=params)))


class Categorical(OfLevels):
    """Levels as categories without order: m x_d ~ Categorical(softmax(f_d(z))), m + 1 logits each.

    Use it for few levels, or many data: any distribution of a level can be learned, and nothing is
    known beforehand, not even that 100 is near 101. The last layer is m + 1 times as large.

    References:
        Pixel Recurrent Neural Networks (van den Oord et al., 2016), arXiv:1601.06759
    """

    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameters of one distribution: the logits of each level side by side."""
        return ((self.max_value + 1) * self.event_shape[0], *self.event_shape[1:])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start a new network at the frequencies of the data's levels, with one datum spread."""
        if self._is_new():
            bias = self._by_level(self.net.bias)  # type: ignore[arg-type]
            levels = (x.nan_to_num() * self.max_value).round().long()
            counts = torch.full_like(bias, 1 / len(bias))
            counts.scatter_add_(0, levels, (~x.isnan()).to(counts))
            bias.copy_((counts / counts.sum(0)).log())

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Categorical with these logits."""
        dim = -len(self.shape) - 1
        logits = self._by_level(params).movedim(dim, -1)
        return self._independent(self._seen(_levels.Categorical(logits=logits)))

    def _by_level(self, params: Tensor) -> Tensor:
        """Parameters with shape `(*, m + 1, *shape)`."""
        return params.unflatten(-len(self.shape), (self.max_value + 1, self.shape[0]))


class DiscretizedLogistic(OfLevels):
    r"""Levels as rounded logistic noise: m x_d = round(m (f_d(z) + s_d(z) noise)), kept in 0 to m.

    Use it for 8-bit images: the first choice for levels. Location and scale are functions of z; the
    ends hold what lies outside, so pure black and white cost little.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        arXiv:1606.04934
    """

    num_params = 2

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """The location with this mean once cut off at the ends, and the scale before softplus."""
        raw = _raw_scale(variance, self.max_value)
        return _solve(lambda loc: self._levels(loc, raw).mean, mean, self.max_value), raw

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Discretized logistic with this location and raw scale, in units of the data."""
        return self._independent(self._seen(self._levels(*self.split(params))))

    def _levels(self, loc: Tensor, raw: Tensor) -> _levels.DiscretizedLogistic:
        scale = _scale(raw, self.max_value)
        return _levels.DiscretizedLogistic(self.max_value * loc, scale, self.max_value)


class DiscretizedLogisticMixture(OfLevels):
    r"""Levels as a mixture of rounded logistics, over the channels of a pixel together.

    Given the component, a channel's location moves linearly with the channels before it. Entries of
    vectors are pixels of one channel.

    Use it for colour images, whose channels agree, and where a level may be one of several.
    Parameters per pixel and component: a weight, two for each channel, one for each pair of them.

    Args:
        shape: Shape of one datum: channels first, or that of a vector.
        latent_dim: Number of latents.
        net: Recipe of the decoder; `MLP()` if None.
        max_value: The highest level m: 255 for 8 bits.
        num_components: Logistics in the mixture.

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        max_value: int = 255,
        num_components: int = 5,
    ):
        if len(sizes := data_shape(shape)) == 2:
            raise ValueError(f"shape must be {(1, *sizes)} for one channel, got {sizes}")
        (self.num_components,) = shape_of(num_components, "num_components")
        super().__init__(shape, latent_dim, net, max_value)

    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameters of one distribution: all of a pixel's along the channels."""
        vector = self.event_shape if len(self.event_shape) == 1 else (1, *self.event_shape[1:])
        return (self.num_components * sum(self._sizes) * vector[0], *vector[1:])

    def split(self, params: Tensor) -> tuple[Tensor, ...]:
        """Logits, locations, raw scales and couplings: `(*, K, sizes, *pixels)`."""
        dims = len(self.event_shape)
        pixels = self.event_shape if dims == 1 else self.event_shape[1:]
        lead = params.shape[: params.dim() - dims]
        each = params.reshape(*lead, self.num_components, sum(self._sizes), *pixels)
        return each.split(self._sizes, dim=-len(pixels) - 1)

    def link(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Components side by side within the data's spread, with their mean."""
        if len(self.event_shape) == 1:
            mean, variance = mean[None], variance[None]
        raw = _raw_scale(variance / self.num_components**2, self.max_value)
        places = (torch.arange(self.num_components).to(mean) + 0.5) / self.num_components
        aside = places.logit().view(-1, *[1] * mean.dim()) * _deviation(variance)

        def mean_of(loc: Tensor) -> Tensor:
            scale = _scale(raw, self.max_value)
            apart = self.max_value * (loc + aside)
            return _levels.DiscretizedLogistic(apart, scale, self.max_value).mean.mean(0)

        loc = _solve(mean_of, mean, self.max_value) + aside
        return torch.zeros_like(loc[:, :1]), loc, raw.expand_as(loc)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """The mixture with these parameters, in units of the data."""
        logits, loc, raw, coupling = self.split(params)
        dims = len(self.event_shape)
        pixel_dims = dims - (dims > 1)
        logits = logits.squeeze(-pixel_dims - 1)
        scale = _scale(raw, self.max_value)
        loc = self.max_value * loc
        if self._channels > 1:
            coupled = CoupledLogistics(logits, loc, scale, coupling.tanh(), self.max_value, dims)
            return self._seen(coupled)
        if dims == 1:
            loc, scale = loc.squeeze(-2), scale.squeeze(-2)
        else:
            logits = logits.unsqueeze(-dims)
        first = -dims - 1
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=logits.movedim(first, -1)),
            _levels.DiscretizedLogistic(
                loc.movedim(first, -1), scale.movedim(first, -1), self.max_value
            ),
        )
        return self._independent(self._seen(mixture))

    @property
    def _channels(self) -> int:
        return 1 if len(self.event_shape) == 1 else self.event_shape[0]

    @property
    def _sizes(self) -> list[int]:
        """Parameters of one component for a pixel: weight, locations, scales, couplings."""
        c = self._channels
        return [1, c, c, c * (c - 1) // 2]


def _scale(raw: Tensor, max_value: int) -> Tensor:
    """Scale in levels: softplus in units of the data, kept above a hundredth of a level."""
    return max_value * softplus(raw) + 0.01


def _deviation(variance: Tensor) -> Tensor:
    """Scale of a logistic with this variance."""
    return (3 * variance).sqrt() / torch.pi


def _raw_scale(variance: Tensor, max_value: int) -> Tensor:
    """Scale before softplus of a logistic with this variance, kept above half a level."""
    return softplus_inverse(_deviation(variance).clamp(min=0.5 / max_value) - 0.01 / max_value)


def _solve(mean_of: Callable[[Tensor], Tensor], mean: Tensor, max_value: int) -> Tensor:
    """The locations that give a mean in units of the data, kept off 0 and 1, by bisection."""
    target = max_value * mean.clamp(0.001, 0.999)
    low, high = torch.full_like(mean, -8.0), torch.full_like(mean, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = mean_of(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
