"""The prior that is made of the guide."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae._config import shape_of
from pyrovae._mixture import Mixture
from pyrovae._part import data_shape
from pyrovae.priors.base import Prior


class VampPrior(Prior):
    """Mixture of the guide's posteriors at pseudo-inputs, p(z) = 1/C sum_c q(z|u_c).

    The best prior for a guide is the mixture of its posteriors over all data; this one is the same
    of a few pseudo-inputs u_c, which are learned. Take it for a better log p(x), at the price of
    encoding the pseudo-inputs at every step. It needs a guide that scores any z.

    The pseudo-inputs start at training data when `fit` begins. They are not held in the range of
    the data, as the paper's are in [0, 1]: the density is one for any of them. In an encoder with
    batch normalisation they count in the running statistics beside the data.

    Args:
        shape: Shape of one datum.
        latent_dim: Number of latents.
        num_components: C, the number of pseudo-inputs.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv:1705.07120
    """

    def __init__(self, shape: tuple[int, ...], latent_dim: int, num_components: int = 500):
        super().__init__(latent_dim)
        self.shape = data_shape(shape)
        size = (*shape_of(num_components, "num_components"), *self.shape)
        self.pseudo_inputs = nn.Parameter(torch.empty(size))
        with torch.no_grad():
            self.pseudo_inputs.copy_(self._noise())
        self._guide: tuple[Any, ...] = ()  # in a tuple, a module is not registered

    def connect(self, guide: nn.Module) -> None:
        """Take note of the guide.

        Raises:
            ValueError: If it scores only its own draws, or is for other data or latents.
        """
        name = type(guide).__name__
        if not getattr(guide, "scorable", True):
            raise ValueError(
                f"VampPrior scores every z under q(z|u), and the guide {name} scores only its own "
                "draws: take another guide or prior"
            )
        for attribute in ("shape", "latent_dim"):
            own, other = getattr(self, attribute), getattr(guide, attribute, None)
            if other not in (None, own):
                raise ValueError(
                    f"VampPrior has {attribute} {own} and the guide {name} {other}: they must be "
                    "the same"
                )
        self._guide = (guide,)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start new pseudo-inputs at data spread over `x`, `(n, *shape)`, NaN at zero."""
        if not torch.allclose(self.pseudo_inputs, self._noise()):
            return
        x = x.nan_to_num().to(self.pseudo_inputs)
        chosen = torch.linspace(0, len(x) - 1, len(self.pseudo_inputs)).long()
        noise = x.std(correction=0) * (self._noise() - 0.5)  # data that come twice must part
        self.pseudo_inputs.copy_(x[chosen.to(x.device)] + 0.05 * noise)

    def forward(self) -> dist.TorchDistribution:
        """The mixture of q(z|u_c)."""
        if not self._guide:
            raise ValueError("VampPrior is made of a guide: VAE(prior, likelihood, guide) gives it")
        equal = self.pseudo_inputs.new_zeros(len(self.pseudo_inputs))
        return Mixture(equal, self.pseudo_inputs, self._guide[0])

    def _noise(self) -> Tensor:
        """Where pseudo-inputs are born: always the same uniform numbers."""
        shape, generator = self.pseudo_inputs.shape, torch.Generator().manual_seed(0)
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        return noise.to(self.pseudo_inputs)
