"""Estimates of log p(x): how likely a model finds data, and how far the number can be believed."""

from pyrovae.evidence.importance import elbo, log_px
from pyrovae.evidence.result import LogPx

__all__ = ["LogPx", "elbo", "log_px"]
