"""The parts there are, each as a user would make it: every test of a property runs on all."""

from collections.abc import Callable

from torch import nn

from pyrovae import guides, likelihoods, nets, objectives, priors

IMAGE, LATENTS = (1, 3, 4), 2
NET = nets.MLP(hidden=(8,))


def vamp() -> priors.VampPrior:
    """A VampPrior with a guide."""
    prior = priors.VampPrior(IMAGE, LATENTS, num_components=4)
    prior.connect(guides.Normal(IMAGE, LATENTS, NET))
    return prior


PRIORS: dict[str, Callable[[], priors.Prior]] = {
    "StandardNormal": lambda: priors.StandardNormal(LATENTS),
    "Normal": lambda: priors.Normal(LATENTS),
    "GaussianMixture": lambda: priors.GaussianMixture(LATENTS, num_components=3),
    "VampPrior": vamp,
    "Flow": lambda: priors.Flow(LATENTS, transforms=2, hidden=8),
}
LIKELIHOODS: dict[str, Callable[[], likelihoods.Likelihood]] = {
    "Bernoulli": lambda: likelihoods.Bernoulli(IMAGE, LATENTS, NET),
    "Beta": lambda: likelihoods.Beta(IMAGE, LATENTS, NET),
    "Binomial": lambda: likelihoods.Binomial(IMAGE, LATENTS, NET, max_value=4),
    "Categorical": lambda: likelihoods.Categorical(IMAGE, LATENTS, NET, max_value=4),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(IMAGE, LATENTS, NET),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(
        IMAGE, LATENTS, NET, max_value=4
    ),
    "DiscretizedLogisticMixture": lambda: likelihoods.DiscretizedLogisticMixture(
        IMAGE, LATENTS, NET, max_value=4, num_components=3
    ),
    "Laplace": lambda: likelihoods.Laplace(IMAGE, LATENTS, NET),
    "NegativeBinomial": lambda: likelihoods.NegativeBinomial(IMAGE, LATENTS, NET),
    "Normal": lambda: likelihoods.Normal(IMAGE, LATENTS, NET),
    "Normal, fixed": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale=0.5),
    "Normal, per-pixel": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale="per-pixel"),
    "Normal, amortized": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale="amortized"),
    "Normal, optimal": lambda: likelihoods.Normal(IMAGE, LATENTS, NET, scale="optimal"),
    "Poisson": lambda: likelihoods.Poisson(IMAGE, LATENTS, NET),
    "RecurrentBernoulli": lambda: likelihoods.RecurrentBernoulli(IMAGE, LATENTS, NET, hidden=5),
    "RecurrentNormal": lambda: likelihoods.RecurrentNormal(IMAGE, LATENTS, NET, hidden=5),
    "StudentT": lambda: likelihoods.StudentT(IMAGE, LATENTS, NET),
    "StudentT, fixed": lambda: likelihoods.StudentT(IMAGE, LATENTS, NET, df=4.0),
    "ZeroInflatedNegativeBinomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(
        IMAGE, LATENTS, NET
    ),
}
SEQUENCES = ("RecurrentBernoulli", "RecurrentNormal")
"""Likelihoods whose entries depend on each other given z."""
INDEPENDENT = [name for name in LIKELIHOODS if name not in SEQUENCES]
GUIDES: dict[str, Callable[[], guides.Guide]] = {
    "Normal": lambda: guides.Normal(IMAGE, LATENTS, NET),
    "LowRankNormal": lambda: guides.LowRankNormal(IMAGE, LATENTS, NET, rank=1),
    "FullRankNormal": lambda: guides.FullRankNormal(IMAGE, LATENTS, NET),
    "NormalMixture": lambda: guides.NormalMixture(IMAGE, LATENTS, NET, num_components=3),
    "Planar": lambda: guides.Planar(IMAGE, LATENTS, NET, transforms=3),
    "OrthogonalSylvester": lambda: guides.OrthogonalSylvester(IMAGE, LATENTS, NET, transforms=2),
    "HouseholderSylvester": lambda: guides.HouseholderSylvester(
        IMAGE, LATENTS, NET, transforms=2, num_reflections=3
    ),
    "IAF": lambda: guides.IAF(IMAGE, LATENTS, NET, transforms=2, hidden=(8,), context_dim=3),
    "NeuralSpline": lambda: guides.NeuralSpline(
        IMAGE, LATENTS, NET, transforms=2, bins=4, hidden=(8,), context_dim=3
    ),
    "NeuralSplineCoupling": lambda: guides.NeuralSplineCoupling(
        IMAGE, LATENTS, NET, transforms=2, bins=4, hidden=(8,), context_dim=3
    ),
    "Delta": lambda: guides.Delta(IMAGE, LATENTS, NET),
}
OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "ELBO": lambda: objectives.ELBO(),
    "ELBO, analytic": lambda: objectives.ELBO(num_particles=2, analytic_kl=True),
    "ELBO, free bits": lambda: objectives.ELBO(num_particles=3, free_bits=0.001),
    "IWAE": lambda: objectives.IWAE(),
    "MIWAE": lambda: objectives.MIWAE(num_particles=3, num_bounds=2),
    "DReG": lambda: objectives.DReG(),
    "StickingTheLanding": lambda: objectives.StickingTheLanding(num_particles=2),
    "ReweightedWakeSleep": lambda: objectives.ReweightedWakeSleep(),
    "ReweightedWakeSleep, asleep": lambda: objectives.ReweightedWakeSleep(insomnia=0.5),
    "ScoreFunction": lambda: objectives.ScoreFunction(),
    "ScoreFunction, plain": lambda: objectives.ScoreFunction(num_particles=1, baseline="none"),
    "MMD": lambda: objectives.MMD(),
    "Denoising": lambda: objectives.Denoising(),
    "SemiSupervised": lambda: objectives.SemiSupervised(num_particles=2),
}
TABLE: dict[str, Callable[[], nn.Module]] = {
    f"{role} {name}": make
    for role, table in (("prior", PRIORS), ("likelihood", LIKELIHOODS), ("guide", GUIDES))
    for name, make in table.items()
}
