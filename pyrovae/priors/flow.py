"""The prior that is a normalizing flow."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae._config import shape_of
from pyrovae._flows import Flowed, zuko
from pyrovae.priors.base import Prior


class Flow(Prior):
    """Normalizing flow of affine couplings, p(z) = N(f(z); 0, I) |det df/dz|.

    One half of the latents is shifted and scaled by learned numbers, then the other half by a
    network of the first; in the next transformation the halves change places. Take it where a
    mixture's components would have to be many: it bends one mode into any shape, and is less good
    at tearing it into several. It starts near N(0, I). A draw is scored in one pass through the
    networks and made in two.

    Args:
        latent_dim: Number of latents, at least two.
        transforms: Number of transformations.
        hidden: Units of each hidden layer of a transformation's network.

    References:
        Density Estimation Using Real NVP (Dinh et al., 2017), arXiv:1605.08803; as a prior:
        Learnable Explicit Density for Continuous Latent Space and Variational Inference (Huang et
        al., 2017), arXiv:1710.02248
    """

    loc: Tensor

    def __init__(
        self, latent_dim: int, transforms: int = 8, hidden: int | Sequence[int] = (64, 64)
    ):
        super().__init__(latent_dim)
        if latent_dim < 2:
            raise ValueError("Flow changes latents given others: latent_dim must be at least 2")
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.to_noise = zuko.flows.MAF(
            latent_dim,
            transforms=shape_of(transforms, "transforms")[0],
            passes=2,  # halves, not one latent after the other
            hidden_features=shape_of(hidden, "hidden"),
            activation=nn.SiLU,
        ).transform
        with torch.no_grad():
            for transform in self.to_noise.transforms:
                for param in transform.hyper[-1].parameters():
                    param.mul_(0.01)

    def forward(self) -> dist.TorchDistribution:
        """The flow."""
        noise = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        return Flowed(noise, self.to_noise().inv)
