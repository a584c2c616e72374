"""Base of guides q(z|x): a net of x and a family of distributions over z."""

from __future__ import annotations

from pyrovae._part import Conditional, data_shape, latent_shape
from pyrovae.nets import Net


class Guide(Conditional):
    """Base of guides.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the encoder; `MLP()` if None.
    """

    scorable = True
    """Whether log q(z|x) can be had for any z, and not only for the guide's own draws."""

    is_diagonal_normal = False
    """Whether it is a normal with diagonal covariance, which can be multiplied by another."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None):
        super().__init__(data_shape(shape), latent_shape(latent_dim), net)
        self.shape, (self.latent_dim,) = data_shape(shape), self.event_shape
