"""Priors p(z): `prior()` has batch shape `()` and event shape `(latent_dim,)`."""

from pyrovae.priors.base import Prior
from pyrovae.priors.flow import Flow
from pyrovae.priors.normal import GaussianMixture, Normal, StandardNormal
from pyrovae.priors.vamp import VampPrior

__all__ = ["Flow", "GaussianMixture", "Normal", "Prior", "StandardNormal", "VampPrior"]

DEFAULT = StandardNormal
"""What is taken where none is named."""
