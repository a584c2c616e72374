"""Denoising: the encoder sees corrupted data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyrovae.objectives.elbo import ELBO
from pyrovae.program import Args, Draw, PyroFunction


class Denoising(ELBO):
    r"""Evidence lower bound of the data as they are, with a guide that sees them corrupted.

    .. math:: E_{c(\tilde x|x)} E_{q(z|\tilde x)}[\log p(x, z) - \log q(z|\tilde x)]

    For codes that small changes of x leave alone, and against overfitting of the encoder. Still a
    bound on log p(x), for the guide averaged over corruptions. The guide's first argument is
    corrupted, in training alone: what is measured elsewhere is that of clean data.

    Args:
        noise: mask sets entries to zero, flip turns x into 1 - x, normal adds normal noise.
        level: Probability that an entry is masked or flipped, or standard deviation of the noise.
        num_particles: Draws of z per datum.
        analytic_kl: Take the KL in closed form where that is possible.
        beta: Weight of the KL; 1 is the bound.
        free_bits: Nats of KL that cost nothing.

    References:
        Denoising Criterion for Variational Auto-Encoding Framework (Im et al., 2017),
        arXiv:1511.06406
    """

    def __init__(
        self,
        noise: Literal["mask", "flip", "normal"] = "mask",
        level: float = 0.1,
        num_particles: int = 1,
        analytic_kl: bool = False,
        beta: float = 1.0,
        free_bits: float = 0.0,
    ):
        super().__init__(num_particles, analytic_kl, beta, free_bits)
        if noise not in ("mask", "flip", "normal"):
            raise ValueError(f"noise must be 'mask', 'flip' or 'normal', got {noise!r}")
        if not level >= 0 or (noise != "normal" and level > 1):
            allowed = "not be negative" if noise == "normal" else "lie between 0 and 1"
            raise ValueError(f"level of {noise} noise must {allowed}, got {level}")
        self.noise, self.level = noise, level

    def draw(self, guide: PyroFunction, args: Args, num_particles: int) -> Draw:
        """Draw from the guide of corrupted data."""
        return super().draw(guide, (self.corrupt(args[0]), *args[1:]), num_particles)

    def corrupt(self, x: Tensor) -> Tensor:
        """Add the noise to x."""
        if self.noise == "normal":
            return x + self.level * torch.randn_like(x)
        hit = torch.rand(x.shape, device=x.device) < self.level
        return torch.where(hit, torch.zeros_like(x) if self.noise == "mask" else 1 - x, x)
