"""What does the likelihood say of grey pixels?

Question: on 8-bit images, how many bits per dimension does each likelihood need, as a density of
          dequantized pixels or as a probability of levels?
Command:  python experiments/swap_likelihoods.py --data-root DATA
Hardware: two cores, no GPU.
Expected: distributions with a shape of their own for each pixel (categorical, mixtures of
          discretized logistics) need the fewest; a normal of fixed or common scale the most. Both
          kinds of number are in the same units: a density of dequantized pixels is a lower bound of
          the probability of the levels (Theis et al., 2016).

Frey faces, 200 epochs, three seeds; grey MNIST, 20 epochs, one seed, the first 2,000 test images.
Categorical is left out: its last layer has 29 million weights on Frey faces and 40 million on
MNIST, and a run takes a quarter of an hour. Writes experiments/results/swap_likelihoods.json and
.png.
"""

from functools import partial

import _swap

MNIST = "--data mnist --epochs 20 --kl-warmup 5"
FREY = "--data frey-faces --epochs 200 --kl-warmup 50"
EACH = {
    "Normal, learned": "--likelihood Normal",
    "Normal, per-pixel": "--likelihood Normal --likelihood.scale per-pixel",
    "Normal, amortized": "--likelihood Normal --likelihood.scale amortized",
    "Normal, optimal": "--likelihood Normal --likelihood.scale optimal",
    "Laplace": "--likelihood Laplace",
    "StudentT": "--likelihood StudentT",
    "Beta": "--likelihood Beta",
    "ContinuousBernoulli": "--likelihood ContinuousBernoulli",
    "Binomial": "--likelihood Binomial",
    "DiscretizedLogistic": "--likelihood DiscretizedLogistic",
    "DiscretizedLogisticMixture": "--likelihood DiscretizedLogisticMixture",
}
ON_FREY = {f"Frey, {name}": f"{FREY} {flags}" for name, flags in EACH.items()}
ON_MNIST = {f"MNIST, {name}": f"{MNIST} {flags}" for name, flags in EACH.items()}
ROWS = ON_FREY | ON_MNIST
COMMON = "--clip-norm 100 --compile true"

table = partial(_swap.table, bits=True)

__all__ = ["COMMON", "ROWS", "table"]

if __name__ == "__main__":
    _swap.main(__file__, ROWS, COMMON, once=list(ON_MNIST), num_particles=250, bits=True)
