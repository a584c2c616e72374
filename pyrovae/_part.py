"""What likelihoods and guides share: a distribution whose parameters a network computes."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyrovae._config import Configurable, shape_of
from pyrovae.nets import DEFAULT, Net, Network, join


class Conditional(Configurable, nn.Module):
    """A distribution over `event_shape` given a tensor: `part(c) = distribution(net(c))`.

    A subclass says how many parameters each entry of the event has (`num_params`) and makes the
    distribution of them (`distribution`).

    Args:
        in_shape: Shape of one condition.
        event_shape: Shape of one draw.
        net: Recipe of the network; the default of `nets` if None.
    """

    num_params = 1

    def __init__(
        self, in_shape: tuple[int, ...], event_shape: tuple[int, ...], net: Net | None = None
    ):
        super().__init__()
        self.event_shape = event_shape
        self.net = (net or DEFAULT())(in_shape, self.param_shape())

    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameters of one distribution: what the network puts out."""
        return (self.num_params * self.event_shape[0], *self.event_shape[1:])

    def split(self, params: Tensor) -> tuple[Tensor, ...]:
        """The `num_params` parameters, each with shape `(*, *event_shape)`."""
        return params.chunk(self.num_params, dim=-len(self.event_shape))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """The distribution with these parameters, of shape `(*, *param_shape())`."""
        raise NotImplementedError

    def forward(self, *c: Tensor) -> dist.TorchDistribution:
        """The distribution given `c`, or vectors side by side: batch shape `(*)`."""
        one = len(c) == 1 or isinstance(self.net, Network)
        return self.distribution(self.net(*c) if one else self.net(join(*c)))


def latent_shape(latent_dim: int) -> tuple[int]:
    """`(latent_dim,)`, checked.

    Raises:
        ValueError: If it is less than one.
    """
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
    return (latent_dim,)


def data_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one datum, checked.

    Raises:
        ValueError: If it is empty or a size is less than one.
    """
    sizes = shape_of(shape, "shape")
    if not sizes:
        raise ValueError("shape is that of one datum, such as (1, 28, 28) or (5,), got ()")
    return sizes
