"""Guides q(z|x): `guide(x)` has the leading shape of x and event shape `(latent_dim,)`."""

from pyrovae.guides.autoregressive import IAF, NeuralSpline, NeuralSplineCoupling
from pyrovae.guides.base import Guide
from pyrovae.guides.flows import HouseholderSylvester, OrthogonalSylvester, Planar
from pyrovae.guides.mixture import NormalMixture
from pyrovae.guides.normal import FullRankNormal, LowRankNormal, Normal
from pyrovae.guides.point import Delta

__all__ = [
    "IAF",
    "Delta",
    "FullRankNormal",
    "Guide",
    "HouseholderSylvester",
    "LowRankNormal",
    "NeuralSpline",
    "NeuralSplineCoupling",
    "Normal",
    "NormalMixture",
    "OrthogonalSylvester",
    "Planar",
]

DEFAULT = Normal
"""What is taken where none is named."""
