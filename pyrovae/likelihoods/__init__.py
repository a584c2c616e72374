"""Likelihoods p(x|z): `likelihood(z)` has the leading shape of z, and events like one datum."""

from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.counts import Poisson
from pyrovae.likelihoods.real import Normal
from pyrovae.likelihoods.unit import Bernoulli, ContinuousBernoulli

__all__ = ["Bernoulli", "ContinuousBernoulli", "Likelihood", "Normal", "Poisson"]

DEFAULT = {"binary": Bernoulli, "counts": Poisson, "grey": ContinuousBernoulli, "real": Normal}
"""What is taken for each kind of data where none is named."""
