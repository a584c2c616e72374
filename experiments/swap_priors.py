"""What do the prior and the depth buy?

Question: with everything else the same, how does log p(x) change with p(z), and with a second layer
          of latents?
Command:  python experiments/swap_priors.py --data-root DATA
Hardware: two cores, no GPU.
Expected: VampPrior above the standard normal: 82.43 for 84.45 with one layer, 81.56 for 82.39 with
          two, after full training (Tomczak & Welling, 2018, as rerun by Norouzi et al., 2020).

MNIST, binarized dynamically, 20 epochs of which 5 warm the KL up, the first 2,000 test images.
Writes experiments/results/swap_priors.json and .png.
"""

from _swap import main, table

ROWS = {
    "StandardNormal": "--prior StandardNormal",
    "Normal": "--prior Normal",
    "GaussianMixture": "--prior GaussianMixture",
    "VampPrior": "--prior VampPrior",
    "Flow": "--prior Flow",
    "two layers, bottom-up": "--latent-dim 50,20 --inference bottom-up",
    "two layers, top-down": "--latent-dim 50,20 --inference top-down",
}
COMMON = "--data mnist --epochs 20 --kl-warmup 5 --compile true"

__all__ = ["COMMON", "ROWS", "table"]

if __name__ == "__main__":
    main(__file__, ROWS, COMMON, baseline="StandardNormal")
