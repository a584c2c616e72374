"""What does the guide buy?

Question: with everything else the same, how do log p(x), the ELBO and the time change with q(z|x)?
Command:  python experiments/swap_guides.py --data-root DATA
Hardware: two cores, no GPU.
Expected: a better guide closes the gap between ELBO and log p(x) and, since it was trained with,
          raises both: with convolutions and 64 latents, -ELBO falls from 86.55 to 86.06 (planar),
          84.20 (IAF) and 83.32 (Sylvester) on static MNIST (Grathwohl et al., 2019, Table 3).

MNIST, binarized dynamically, 20 epochs of which 5 warm the KL up, the first 2,000 test images. The
neural splines, two minutes to score, are run with one seed, the others with three. Writes
experiments/results/swap_guides.json and .png.
"""

from _swap import main, table

ROWS = {
    "Normal": "--guide Normal",
    "LowRankNormal": "--guide LowRankNormal",
    "FullRankNormal": "--guide FullRankNormal",
    "NormalMixture": "--guide NormalMixture",
    "Planar": "--guide Planar",
    "OrthogonalSylvester": "--guide OrthogonalSylvester",
    "HouseholderSylvester": "--guide HouseholderSylvester",
    "IAF": "--guide IAF",
    "NeuralSpline": "--guide NeuralSpline",
    "NeuralSplineCoupling": "--guide NeuralSplineCoupling",
}
SLOW = "NeuralSpline", "NeuralSplineCoupling"
COMMON = "--data mnist --epochs 20 --kl-warmup 5 --compile true"

__all__ = ["COMMON", "ROWS", "table"]

if __name__ == "__main__":
    main(__file__, ROWS, COMMON, baseline="Normal", once=SLOW)
