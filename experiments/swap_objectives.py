"""What does the objective change?

Question: with model and guide the same, what do log p(x), the ELBO, the active units and the time
          come to under each objective?
Command:  python experiments/swap_objectives.py --data-root DATA
Hardware: two cores, no GPU.
Expected: importance-weighted objectives end at a better log p(x) and a worse ELBO, with more units
          active: 84.78 for 86.35 nats and 25 for 20 units with 50 particles (Burda et al., 2016,
          Table 1); DReG at least as good as IWAE (Tucker et al., 2019). Objectives that are not
          bounds (beta, free bits, MMD) lose log p(x) for what they are made for.

MNIST, binarized dynamically, 20 epochs of which 5 warm the KL up, the first 2,000 test images. Rows
differ in particles, so in time; compare those with the same number. Writes
experiments/results/swap_objectives.json and .png.
"""

from _swap import main, table

ROWS = {
    "ELBO": "",
    "ELBO, analytic KL": "--objective.analytic-kl true",
    "ELBO, K = 5": "--objective.num-particles 5",
    "ELBO, no warm-up": "--kl-warmup 0",
    "ELBO, beta = 2": "--objective.beta 2",
    "ELBO, free bits": "--objective.free-bits 0.1",
    "StickingTheLanding": "--objective StickingTheLanding",
    "StickingTheLanding, K = 5": "--objective StickingTheLanding --objective.num-particles 5",
    "IWAE, K = 5": "--objective IWAE --objective.num-particles 5",
    "DReG, K = 5": "--objective DReG --objective.num-particles 5",
    "MIWAE, 2 x 5": "--objective MIWAE --objective.num-particles 5 --objective.num-bounds 2",
    "ReweightedWakeSleep, K = 5": "--objective ReweightedWakeSleep --objective.num-particles 5",
    "ScoreFunction, K = 5": "--objective ScoreFunction --objective.num-particles 5",
    "MMD": "--objective MMD",
    "Denoising": "--objective Denoising",
}
COMMON = "--data mnist --epochs 20 --kl-warmup 5 --compile true"

__all__ = ["COMMON", "ROWS", "table"]

if __name__ == "__main__":
    main(__file__, ROWS, COMMON, baseline="ELBO")
