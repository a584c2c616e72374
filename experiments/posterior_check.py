r"""Is the gap between log p(x) and the ELBO the KL from guide to posterior, to three digits?

Question: with two latents all of log p(x) = ELBO + KL(q(z|x) || p(z|x)) can be computed, each term
          by a road of its own. Do they agree, and what does the guide look like on the posterior?
Command:  python experiments/posterior_check.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 35 seconds.
Expected: log p(x) - ELBO - KL is zero for each datum within three standard errors, which are below
          0.001 nats: an identity (Jordan et al., 1999), here a check of three estimators.

The VAE is that of `pyrovae train --latent-dim 2`; the data are the first test image of each of six
digits. log p(x) is by adaptive quadrature in float64 (`log_px(method="exact")`), to which the
guide's density is nothing; the ELBO by two million draws from the guide, in a hundred estimates
that give its error; the KL by a sum over a grid of step 0.015, which normalises the posterior by
itself. Writes experiments/results/posterior_check.json and .png.
"""

from __future__ import annotations

import math
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import markdown, parser
from _training import fitted
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

import pyrovae
from pyrovae import evidence
from pyrovae.runs import made_by, write_json

DIGITS = range(6)
SEEDS, DRAWS = 100, 20_000
MASSES = (0.99, 0.9, 0.5)
BOUND = 6.0
"""How far the grid reaches on each side of zero."""


def elbo(vae: pyrovae.VAE, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The ELBO of each datum and its standard error, from repeated estimates."""
    repeated = torch.stack([pyrovae.elbo(vae.model, vae.guide, x, draws, s) for s in range(SEEDS)])
    return repeated.mean(0), repeated.std(0) / math.sqrt(SEEDS)


@torch.no_grad()
def on_grid(vae: pyrovae.VAE, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A line of the grid, and the probability of each cell under posterior and guide.

    Returns:
        The line, shape `(size,)`, and log probabilities, shape `(N, size, size)`, z1 first.
    """
    line = torch.linspace(-BOUND, BOUND, size, dtype=torch.float64)
    log_area = 2 * math.log(float(line[1] - line[0]))
    log_p, log_q = [], []
    for z in torch.cartesian_prod(line, line).split(20_000):
        likelihood, log_pz = vae.likelihood(z), vae.prior().log_prob(z)
        log_p.append(torch.stack([likelihood.log_prob(datum) + log_pz for datum in x]))
        log_q.append(vae.posterior(x).log_prob(z[:, None]).T + log_area)
    joint = torch.cat(log_p, 1)
    shape = (len(x), size, size)
    log_posterior = joint - joint.logsumexp(1, keepdim=True)
    return line, log_posterior.reshape(shape), torch.cat(log_q, 1).reshape(shape)


def kl_on_grid(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each datum, and how far the cells of q are from summing to one."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum((1, 2)), (q.sum((1, 2)) - 1).abs()


def figure(line: Tensor, log_p: Tensor, log_q: Tensor, rows: list[dict[str, Any]]) -> plt.Figure:
    """Posterior (filled) and guide (lines) of each datum."""
    drawn, axes = plt.subplots(2, 3, figsize=(6.2, 4.5), layout="constrained")
    for ax, p, q, row in zip(axes.flat, log_p.exp(), log_q.exp(), rows, strict=True):
        of_p, of_q = ([level(density, mass) for mass in MASSES] for density in (p, q))
        ax.contourf(line, line, p.T, [*of_p, p.max()], cmap="Blues", vmin=-p.max() / 3)
        ax.contour(line, line, q.T, of_q, colors="C1", linewidths=1.2)
        shown = (p > of_p[0]) | (q > of_q[0])
        across, up = line[shown.any(1)], line[shown.any(0)]
        ax.set(xlim=(across[0] - 0.1, across[-1] + 0.1), ylim=(up[0] - 0.1, up[-1] + 0.1))
        ax.set_title(f"digit {row['digit']}: KL = {row['kl']:.3f} nats", fontsize=9)
        ax.set(xlabel="$z_1$", ylabel="$z_2$")
        ax.tick_params(labelsize=8)
    handles = [
        Patch(color="C0", alpha=0.6, label="posterior p(z | x), on a grid"),
        Line2D([], [], color="C1", label="guide q(z | x)"),
    ]
    drawn.suptitle("Regions with 50, 90 and 99 % of the mass", fontsize=11)
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def level(probs: Tensor, mass: float) -> float:
    """The probability of a cell above which lies this share of all."""
    ordered = probs.flatten().sort(descending=True).values
    return float(ordered[int((ordered.cumsum(0) < mass).sum())])


def table(rows: list[dict[str, Any]]) -> str:
    """The three numbers of each datum, and by how much they miss the identity."""
    header = ["digit", "log p(x)", "ELBO", "their difference", "KL on the grid", "off by"]
    lines = [
        [
            f"{row['digit']}", f"{row['log_px']:.4f}", f"{row['elbo']:.4f}",
            f"{row['log_px'] - row['elbo']:.4f}", f"{row['kl']:.4f}", f"{row['off']:+.4f}",
            f"{row['std_error']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown([*header, "std. error"], lines)


def main() -> None:
    """Train, compute each term by its own road, compare, draw."""
    asked = parser(__doc__, data=None).parse_args()
    file = _results.folder(asked) / "posterior_check.json"
    draws, size = (100, 101) if asked.smoke else (DRAWS, 801)
    training = f"--data {asked.data} --latent-dim 2" + (" --epochs 1" if asked.smoke else "")
    vae, dataset, _ = fitted(training, asked.data_root)
    first = [int((dataset.test.y == digit).nonzero()[0]) for digit in DIGITS]
    x = dataset.test[first]
    log_px = evidence.log_px(vae.model, vae.guide, x, method="exact")
    bound, std_error = elbo(vae, x, draws)
    line, log_p, log_q = on_grid(vae.double(), x.double(), size)
    kl, missing = kl_on_grid(log_p, log_q)
    off = log_px.values - bound - kl
    columns = {
        "digit": torch.tensor(DIGITS), "log_px": log_px.values, "log_px_error": log_px.std_error,
        "elbo": bound, "std_error": std_error, "kl": kl, "mass_off_grid": missing, "off": off,
    }  # fmt: skip
    rows = [
        dict(zip(columns, values, strict=True))
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    found = {
        "rows": rows, "training": training, "num_particles": SEEDS * draws, "grid": size,
        "seed": 0, "data": dataset.test.description, "made_by": made_by(),
    }  # fmt: skip
    write_json(file, found)
    _results.save_figure(figure(line, log_p, log_q, rows), file.with_suffix(".png"))
    print(table(rows))
    worst = float((off / std_error).abs().max())
    print(f"\nlargest miss: {float(off.abs().max()):.5f} nats, {worst:.1f} standard errors (< 3)")


if __name__ == "__main__":
    main()
