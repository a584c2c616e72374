r"""What does an inference network save, and what does it lose?

Question: how many seconds of fitting each datum's q(z|x) by itself does it take to reach the ELBO
          of an inference network, and what is gained by fitting on from where the network puts it?
Command:  python experiments/amortization.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; about two minutes.
Expected: the network is there at once and stays below the best of its family by its amortization
          gap; from one start for all data the same optimum is reached, much later; from the
          network's q(z|x) soonest (Kim et al., 2018, arXiv:1802.02550). The gap is larger on test
          data than on training data (Cremer et al., 2018, arXiv:1801.03558).

A VAE of 20 latents is trained with a network, by the ELBO, as usual. Then model and network stay as
they are, and the diagonal normals of 300 data are set free (`evidence.refine`): `constant` starts
all of them at one place, the mean of the network's parameters, and so never looks at x; `guide`
starts where the network puts them, which is semi-amortized inference at test time. Each number of
steps is a run of its own, as the rate falls to zero over it; its seconds are those of the whole
call, with checks and a comparison of start and end that take as long as the first dozen steps. The
gaps are those of `evidence.gaps`, log p(x) by annealing. With a network that lags behind its model
in training the gap is larger: see He et al. (2019), arXiv:1901.05534.

Writes experiments/results/amortization.json and .png.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyrovae
from pyrovae import evidence, guides, likelihoods, nets, priors
from pyrovae.data import DataSet
from pyrovae.runs import made_by, write_json

STARTS = {"constant": "fitted from one start", "guide": "network, then fitted"}
STEPS = (0, 3, 10, 30, 100, 200)
LATENT_DIM = 20


def train(dataset: DataSet, epochs: int) -> pyrovae.VAE:
    """A VAE with the best weights by validation ELBO."""
    torch.manual_seed(0)
    net, shape = nets.MLP(hidden=(200, 200)), dataset.shape
    vae = pyrovae.VAE(
        priors.StandardNormal(LATENT_DIM),
        likelihoods.Bernoulli(shape, LATENT_DIM, net=net),
        guides.Normal(shape, LATENT_DIM, net=net),
    )
    pyrovae.fit(vae, dataset.train, valid=dataset.valid, epochs=epochs, progress=False)
    return vae


def bound(program: Any, num_particles: int) -> dict[str, float]:
    """ELBO of a model, a guide and data, with its Monte Carlo error: nats per datum."""
    one, two = (pyrovae.elbo(*program, num_particles, seed=seed) for seed in (1, 2))
    error = float((one - two).std()) / 2 / math.sqrt(len(one))
    return {"elbo": float((one + two).mean()) / 2, "elbo_std_error": error}


def network(vae: pyrovae.VAE, x: Tensor, num_particles: int) -> dict[str, float]:
    """Seconds and ELBO of the network alone."""
    vae.encode(x)  # the first call pays for setting up
    start = time.perf_counter()
    vae.encode(x)
    seconds = time.perf_counter() - start
    return {"steps": 0, "seconds": seconds} | bound((vae.model, vae.guide, x), num_particles)


def fitted(
    vae: pyrovae.VAE, x: Tensor, start: str, steps: int, num_particles: int
) -> dict[str, float]:
    """Seconds and ELBO of q(z|x) fitted to each datum in this many steps."""
    begun = time.perf_counter()
    refined = evidence.refine(vae.model, vae.guide, x, steps=steps, start=start, seed=0)
    seconds = time.perf_counter() - begun
    return {"steps": steps, "seconds": seconds} | bound(refined, num_particles)


def picture(
    alone: dict[str, float], runs: dict[str, list[dict[str, float]]], gaps: dict[str, Any]
) -> plt.Figure:
    """ELBO by seconds of the three ways, and the gaps of training and test data."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.8), width_ratios=(3, 2), layout="constrained"
    )
    best, seen = gaps["test"]["log_px"], [alone, *(row for rows in runs.values() for row in rows)]
    left.plot(alone["seconds"], alone["elbo"], "C0s", ms=7, label="network")
    left.axhline(alone["elbo"], color="C0", ls=":", lw=1)
    for (start, rows), style in zip(runs.items(), ("C1o-", "C2^--"), strict=True):
        left.plot(
            [r["seconds"] for r in rows], [r["elbo"] for r in rows], style, label=STARTS[start]
        )
    left.axhline(best, color="0.4", ls="--", lw=1, label="log p(x), annealed bound")
    low = min(row["elbo"] for row in seen)
    left.set(xscale="log", xlabel=f"seconds for {gaps['test']['num_data']} test data")
    left.set(
        ylabel="ELBO, nats per datum", title="ELBO by seconds", ylim=(max(low, best - 4), None)
    )
    left.legend(loc="lower left")
    bottom = [0.0] * len(gaps)
    for part, colour, hatch in (("approximation", "C0", ""), ("amortization", "C1", "//")):
        sizes = [one[f"{part}_gap"] for one in gaps.values()]
        bars = right.bar(list(gaps), sizes, bottom=bottom, color=colour, hatch=hatch, label=part)
        right.bar_label(bars, [f"{size:.2f}" for size in sizes], label_type="center", color="k",
                        bbox={"fc": "w", "ec": "none", "pad": 1})  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    right.set(title="log p(x) less the ELBO", ylabel="nats per datum", ylim=(0, 1.4 * max(bottom)))
    right.legend(loc="upper left")
    return figure


def table(
    alone: dict[str, float], runs: dict[str, list[dict[str, float]]], gaps: dict[str, Any]
) -> str:
    """The rows as README shows them."""
    named = [("network", alone), *((STARTS[s], row) for s, rows in runs.items() for row in rows)]
    lines = ["| q(z given x) | steps | seconds | ELBO, nats |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['steps']} | {row['seconds']:.3g} "
        f"| {row['elbo']:.3f} ± {row['elbo_std_error']:.3f} |"
        for name, row in named
    ]
    lines += [
        "",
        "| data | log p(x) ≥ | approximation gap | amortization gap |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one['log_px']:.2f} "
        f"| {one['approximation_gap']:.3f} ± {one['approximation_gap_mean_std_error']:.3f} "
        f"| {one['amortization_gap']:.3f} ± {one['amortization_gap_mean_std_error']:.3f} |"
        for name, one in gaps.items()
    ]
    return "\n".join(lines)


def verdict(
    alone: dict[str, float], runs: dict[str, list[dict[str, float]]], gaps: dict[str, Any]
) -> str:
    """What was expected beside what was found."""
    reached = [row for row in runs["constant"] if row["elbo"] >= alone["elbo"]]
    last = {start: rows[-1] for start, rows in runs.items()}
    apart = last["guide"]["elbo"] - last["constant"]["elbo"]
    noise = math.hypot(*(row["elbo_std_error"] for row in last.values()))
    gains = [a["elbo"] - b["elbo"] for a, b in zip(runs["guide"], runs["constant"], strict=True)]
    ahead, behind = (sum(sign * g > 2 * noise for g in gains) for sign in (1, -1))
    more = gaps["test"]["amortization_gap"] - gaps["train"]["amortization_gap"]
    error = math.hypot(*(one["amortization_gap_data_std_error"] for one in gaps.values()))
    if reached:
        much = f"{reached[0]['steps']} steps and {reached[0]['seconds']:.1f} s"
        against = f"{1000 * alone['seconds']:.1f} ms"
        first = f"one start for all reaches the network ({against}) in {much}"
    else:
        first = "one start for all does not reach the network"
    return (
        f"{first}\nsame optimum from both starts: expected a difference of 0, found {apart:.4f} ± "
        f"{noise:.4f} nats after {STEPS[-1]} steps\nfitting from the network: expected ahead, and "
        f"level at the end; found ahead at {ahead} of {len(gains)} numbers of steps, behind at "
        f"{behind}\n"
        f"amortization gap of test less training data: expected above 0, found {more:.3f} ± "
        f"{error:.3f} nats"
    )


def main() -> None:
    """Train, fit each datum from both starts, split the gap, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--data-root", help="folder with the data sets' files")
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "amortization.json"
    epochs = 2 if asked.smoke else {"digits": 100, "mnist": 20}[asked.data]
    num_data, draws = (10, 20) if asked.smoke else (300, 500)
    dataset = pyrovae.data.load(asked.data, asked.data_root)
    vae = train(dataset, epochs)
    torch.manual_seed(0)
    x = {s.name: s[slice(0, num_data)] for s in (dataset.train, dataset.test)}
    alone = network(vae, x["test"], draws)
    runs = {s: [fitted(vae, x["test"], s, steps, draws) for steps in STEPS] for s in STARTS}
    method = evidence.Annealed(5 if asked.smoke else 50)
    options = {"method": method, "elbo_particles": draws, "steps": STEPS[-1], "seed": 0}
    found = {n: evidence.gaps(vae.model, vae.guide, part, **options) for n, part in x.items()}
    gaps = {name: one.summary() for name, one in found.items()}
    settings = {
        "data": dataset.test.description, "num_data": num_data, "epochs": epochs,
        "latent_dim": LATENT_DIM, "elbo_particles": 2 * draws, "seed": 0,
    }  # fmt: skip
    everything = {"network": alone, "fitted": runs, "gaps": gaps, "settings": settings}
    write_json(file, everything | {"made_by": made_by()})
    _results.save_figure(picture(alone, runs, gaps), file.with_suffix(".png"))
    print(table(alone, runs, gaps))
    print(verdict(alone, runs, gaps))


if __name__ == "__main__":
    main()
