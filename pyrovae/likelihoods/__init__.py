"""Likelihoods p(x|z): `likelihood(z)` has the leading shape of z, and events like one datum."""

from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrovae.likelihoods.levels import (
    Binomial,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
)
from pyrovae.likelihoods.real import Laplace, Normal, StudentT
from pyrovae.likelihoods.sequences import RecurrentBernoulli, RecurrentNormal
from pyrovae.likelihoods.unit import Bernoulli, Beta, ContinuousBernoulli

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "RecurrentBernoulli",
    "RecurrentNormal",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]

DEFAULT = {
    "binary": Bernoulli,
    "counts": Poisson,
    "grey": ContinuousBernoulli,
    "levels": DiscretizedLogistic,
    "real": Normal,
}
"""What is taken for each kind of data where none is named."""
