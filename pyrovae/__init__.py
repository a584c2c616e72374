"""Variational autoencoders written as Pyro programs.

Train one and score it::

    vae = pyrovae.VAE(prior, likelihood, guide)
    history = pyrovae.fit(vae, train, valid=valid)
    print(pyrovae.log_px(vae.model, vae.guide, test))
"""

from pyrovae import data, evidence, guides, likelihoods, nets, objectives, plotting, priors
from pyrovae.conditional import ConditionalVAE
from pyrovae.evidence import LogPx, elbo, log_px
from pyrovae.hierarchical import HierarchicalVAE, LadderVAE
from pyrovae.program import Program
from pyrovae.runs import load, save
from pyrovae.semisupervised import AuxiliaryVAE, Classifier, SemiSupervisedVAE
from pyrovae.training import NonFiniteLoss, fit
from pyrovae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "AuxiliaryVAE",
    "Classifier",
    "ConditionalVAE",
    "HierarchicalVAE",
    "LadderVAE",
    "LogPx",
    "NonFiniteLoss",
    "Program",
    "SemiSupervisedVAE",
    "data",
    "elbo",
    "evidence",
    "fit",
    "guides",
    "likelihoods",
    "load",
    "log_px",
    "nets",
    "objectives",
    "plotting",
    "priors",
    "save",
]
