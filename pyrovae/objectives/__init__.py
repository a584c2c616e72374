"""What training maximises: `ELBO`s in Pyro's sense, for `pyrovae.fit` and for Pyro's own `SVI`.

An objective's `differentiable_loss` is a scalar summed over the batch: its value is the loss, its
gradient the estimator. Nothing in it leaves the graph, so it is traced and compiled as it stands.
"""

from pyrovae.objectives.base import Objective
from pyrovae.objectives.denoising import Denoising
from pyrovae.objectives.elbo import ELBO, report
from pyrovae.objectives.importance import IWAE, MIWAE
from pyrovae.objectives.labels import SemiSupervised
from pyrovae.objectives.leaves import DReG, StickingTheLanding
from pyrovae.objectives.mmd import MMD
from pyrovae.objectives.score import ReweightedWakeSleep, ScoreFunction

__all__ = [
    "ELBO",
    "IWAE",
    "MIWAE",
    "MMD",
    "DReG",
    "Denoising",
    "Objective",
    "ReweightedWakeSleep",
    "ScoreFunction",
    "SemiSupervised",
    "StickingTheLanding",
    "report",
]

DEFAULT = ELBO
"""What is taken where none is named."""
