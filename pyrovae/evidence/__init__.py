"""Estimates of log p(x), how far they can be believed, and what the latents have to do with it."""

from pyrovae.evidence.annealed import Annealed
from pyrovae.evidence.bidirectional import Bidirectional, Bracket, validate
from pyrovae.evidence.classification import Classification
from pyrovae.evidence.compare import Comparison, compare
from pyrovae.evidence.estimate import elbo, exact, log_px
from pyrovae.evidence.exact import Exact
from pyrovae.evidence.gaps import Gaps, gaps
from pyrovae.evidence.importance import Importance
from pyrovae.evidence.latents import Latents, latents
from pyrovae.evidence.method import Method
from pyrovae.evidence.posterior import Posterior, posterior
from pyrovae.evidence.refine import Refined, refine
from pyrovae.evidence.result import LogPx

__all__ = [
    "Annealed",
    "Bidirectional",
    "Bracket",
    "Classification",
    "Comparison",
    "Exact",
    "Gaps",
    "Importance",
    "Latents",
    "LogPx",
    "Method",
    "Posterior",
    "Refined",
    "compare",
    "elbo",
    "exact",
    "gaps",
    "latents",
    "log_px",
    "posterior",
    "refine",
    "validate",
]
