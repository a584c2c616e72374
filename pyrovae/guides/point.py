"""A guide that is a single point."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyrovae.guides.base import Guide


class Delta(Guide):
    """All of q(z|x) at one point, z = f(x): what makes a plain autoencoder.

    For codes without uncertainty, and to see what the spread of q(z|x) is worth. A point has no
    density, so log p(x) cannot be estimated with it: its log density counts as 0.

    References:
        Auto-encoders with a penalty on the code: From Variational to Deterministic Autoencoders
        (Ghosh et al., 2020), arXiv:1903.12436
    """

    scorable = False

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """The point."""
        return dist.Delta(params, event_dim=1)
