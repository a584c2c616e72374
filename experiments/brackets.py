"""How near the truth does annealing come, between bounds from both sides?

Question: on data that a VAE of MNIST draws itself, how far apart are the bounds of bidirectional
          Monte Carlo, and how fast do they close with the number of distributions? Do they hold
          the truth where it is known?
Command:  python experiments/brackets.py --data-root DATA
Hardware: two cores, no GPU; about ten minutes.
Expected: on a linear-Gaussian model in 99 of 100 runs the exact mean is above the lower bound less
          two standard errors and below the upper bound plus two; a gap that falls as distributions
          grow, as in Wu et al. (2017), arXiv:1611.04273.

The VAE is that of `pyrovae train --data mnist --epochs 50`, trained first; 100 data, 16 chains. The
linear-Gaussian model has 10 latents and 20 numbers per datum, and a guide that is off by 0.3 and
1.2 times as wide; 100 data in each run. Writes experiments/results/brackets.json and .png.
"""

from __future__ import annotations

import argparse
from typing import Any

import _results
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _training import fitted
from torch import Tensor, nn

from pyrovae import evidence
from pyrovae.evidence import Annealed
from pyrovae.runs import made_by, write_json

TRAINING = "--data mnist --epochs 50 --compile true"
SMALL = "--data digits --epochs 1 --latent-dim 4"

STEPS = (1, 3, 10, 30, 100, 300, 1000)


class Linear(nn.Module):
    """Probabilistic PCA with noise 1, and its posterior, shifted and widened, for a guide."""

    def __init__(self, data_dim: int = 20, latent_dim: int = 10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(data_dim, latent_dim, generator=generator) / 2)

    def model(self, x: Tensor) -> None:
        """Draw z ~ N(0, I) and x ~ N(W z, I)."""
        with pyro.plate("data", len(x)):
            zero = torch.zeros_like(self.weight[0])
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Mean off by 0.3, standard deviations 1.2 times too wide."""
        precision = torch.eye(self.weight.shape[1]) + self.weight.T @ self.weight
        cov = torch.linalg.inv(precision)
        scale_tril = 1.2 * torch.linalg.cholesky(cov)
        with pyro.plate("data", len(x)):
            loc = x @ self.weight @ cov + 0.3
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def coverage(runs: int) -> dict[str, Any]:
    """How often the bounds hold the exact mean, and by how much they miss it on average."""
    program = Linear()
    few = torch.zeros(100, 20)
    held, low, high = 0, [], []
    for seed in range(runs):
        found = evidence.validate(program.model, program.guide, few, method=Annealed(30), seed=seed)
        exact = evidence.exact(program.model, program.guide, found.x[0]).mean
        told = found.summary()
        below = exact - told["lower"] >= -2 * told["lower_std_error"]
        held += below and told["upper"] - exact >= -2 * told["upper_std_error"]
        low.append(exact - told["lower"])
        high.append(told["upper"] - exact)
    means = {"exact_less_lower": sum(low) / runs, "upper_less_exact": sum(high) / runs}
    return {"runs": runs, "held": held, "num_distributions": 30} | means


def table(found: dict[str, Any]) -> str:
    """Bounds by number of distributions, as README shows them."""
    lines = [
        "| steps | from the guide: lower | upper | gap | from the prior: gap |",
        "|---|---|---|---|---|",
    ]
    for steps, row in found["guide"].items():
        prior = found["prior"][steps]
        lines.append(
            f"| {int(steps):,} | {row['lower']:.2f} | {row['upper']:.2f} "
            f"| {row['gap']:.3f} ({row['gap_std_error']:.3f}) "
            f"| {prior['gap']:.2f} ({prior['gap_std_error']:.2f}) |"
        )
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> plt.Figure:
    """Bounds, and the gap between them, by number of distributions."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for color, start in (("C0", "guide"), ("C1", "prior")):
        steps = [int(s) for s in found[start]]
        for name, style in (("lower", "-"), ("upper", "--")):
            values = [row[name] for row in found[start].values()]
            left.plot(
                steps, values, f"o{style}", color=color, ms=3, label=f"{name}, from the {start}"
            )
        gaps = [row["gap"] for row in found[start].values()]
        errors = [2 * row["gap_std_error"] for row in found[start].values()]
        right.errorbar(steps, gaps, errors, fmt="o-", ms=3, color=color, label=f"from the {start}")
    best = list(found["guide"].values())[-1]
    left.set(xscale="log", xlabel="distributions", ylabel="mean log p(x), nats")
    left.set_ylim(best["lower"] - 8, best["upper"] + 8)
    right.set(xscale="log", yscale="log", xlabel="distributions", ylabel="gap, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    return drawn


def main() -> None:
    """Train, bracket, tabulate, draw."""
    parser = argparse.ArgumentParser(description="See the docstring of brackets.py.")
    parser.add_argument("--data-root", help="folder with the data sets' files")
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "brackets.json"
    vae, dataset, _ = fitted(SMALL if asked.smoke else TRAINING, asked.data_root)
    found: dict[str, Any] = {"linear": coverage(2 if asked.smoke else 100)}
    print(found["linear"], flush=True)
    for start in ("guide", "prior"):
        found[start] = {}
        for steps in STEPS[:3] if asked.smoke else STEPS:
            bracket = evidence.validate(
                vae.model, vae.guide, dataset.test, method=Annealed(steps, start), seed=0
            )
            found[start][str(steps)] = bracket.summary()
            write_json(file, found | {"made_by": made_by()})
            print(start, steps, bracket, flush=True)
    figure(found).savefig(file.with_suffix(".png"), dpi=150)
    print(table(found))


if __name__ == "__main__":
    main()
