"""The parts there are, each as a user would make it: every test of a property runs on all."""

from collections.abc import Callable

from torch import nn

from pyrovae import guides, likelihoods, nets, objectives, priors

IMAGE, LATENTS = (1, 3, 4), 2
NET = nets.MLP(hidden=(8,))

PRIORS: dict[str, Callable[[], priors.Prior]] = {
    "StandardNormal": lambda: priors.StandardNormal(LATENTS),
}
LIKELIHOODS: dict[str, Callable[[], likelihoods.Likelihood]] = {
    "Bernoulli": lambda: likelihoods.Bernoulli(IMAGE, LATENTS, NET),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(IMAGE, LATENTS, NET),
    "Normal": lambda: likelihoods.Normal(IMAGE, LATENTS, NET),
    "Normal, fixed": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale=0.5),
    "Normal, per-pixel": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale="per-pixel"),
    "Poisson": lambda: likelihoods.Poisson(IMAGE, LATENTS, NET),
}
GUIDES: dict[str, Callable[[], guides.Guide]] = {
    "Normal": lambda: guides.Normal(IMAGE, LATENTS, NET),
}
OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "ELBO": lambda: objectives.ELBO(),
    "ELBO, analytic": lambda: objectives.ELBO(num_particles=2, analytic_kl=True),
}
TABLE: dict[str, Callable[[], nn.Module]] = {
    f"{role} {name}": make
    for role, table in (("prior", PRIORS), ("likelihood", LIKELIHOODS), ("guide", GUIDES))
    for name, make in table.items()
}
