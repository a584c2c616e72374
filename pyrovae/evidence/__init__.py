"""Estimates of log p(x), how far they can be believed, and what the latents have to do with it."""

from pyrovae.evidence.importance import elbo, log_px
from pyrovae.evidence.latents import Latents, latents
from pyrovae.evidence.refine import Refined, refine
from pyrovae.evidence.result import LogPx

__all__ = ["Latents", "LogPx", "Refined", "elbo", "latents", "log_px", "refine"]
