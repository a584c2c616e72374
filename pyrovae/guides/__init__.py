"""Guides q(z|x): `guide(x)` has the leading shape of x and event shape `(latent_dim,)`."""

from pyrovae.guides.base import Guide
from pyrovae.guides.normal import Normal

__all__ = ["Guide", "Normal"]

DEFAULT = Normal
"""What is taken where none is named."""
