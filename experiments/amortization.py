r"""What does an inference network save, and what does it lose?

Question: how many seconds of fitting each datum's q(z|x) by itself does it take to reach the ELBO
          of an inference network, and what is gained by fitting on from where the network puts it?
Command:  python experiments/amortization.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 35 seconds.
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

import math
import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import bernoulli_vae, elbo, markdown, parser
from torch import Tensor

import pyrovae
from pyrovae import evidence
from pyrovae.data import DataSet
from pyrovae.runs import made_by, write_json

STARTS = {"constant": "fitted from one start", "guide": "network, then fitted"}
STEPS = (0, 3, 10, 30, 100, 200)
LATENT_DIM = 20
HEADER = ("q(z given x)", "steps", "seconds", "ELBO, nats")
Row = dict[str, float]
Runs = dict[str, list[Row]]


def train(dataset: DataSet, epochs: int) -> pyrovae.VAE:
    """A VAE with the best weights by validation ELBO."""
    torch.manual_seed(0)
    vae = bernoulli_vae(dataset.shape, LATENT_DIM)
    pyrovae.fit(vae, dataset.train, valid=dataset.valid, epochs=epochs, progress=False)
    return vae


def bound(program: Any, num_particles: int) -> Row:
    """ELBO of a model, a guide and data, with its Monte Carlo error: nats per datum."""
    values, error = elbo(*program, num_particles)
    return {"elbo": float(values.mean()), "elbo_std_error": error}


def network(vae: pyrovae.VAE, x: Tensor, num_particles: int) -> Row:
    """Seconds and ELBO of the network alone."""
    vae.encode(x)  # the first call pays for setting up
    start = time.perf_counter()
    vae.encode(x)
    seconds = time.perf_counter() - start
    return {"steps": 0, "seconds": seconds} | bound((vae.model, vae.guide, x), num_particles)


def fitted(vae: pyrovae.VAE, x: Tensor, start: str, steps: int, num_particles: int) -> Row:
    """Seconds and ELBO of q(z|x) fitted to each datum in this many steps."""
    begun = time.perf_counter()
    refined = evidence.refine(vae.model, vae.guide, x, steps=steps, start=start, seed=0)
    seconds = time.perf_counter() - begun
    return {"steps": steps, "seconds": seconds} | bound(refined, num_particles)


def curves(axis: plt.Axes, alone: Row, runs: Runs, best: float) -> None:
    """ELBO by seconds of the three ways, up to log p(x)."""
    axis.plot(alone["seconds"], alone["elbo"], "C0s", ms=7, label="network")
    axis.axhline(alone["elbo"], color="C0", ls=":", lw=1)
    low = alone["elbo"]
    for (start, rows), style in zip(runs.items(), ("C1o-", "C2^--"), strict=True):
        seconds, elbos = ([row[key] for row in rows] for key in ("seconds", "elbo"))
        axis.plot(seconds, elbos, style, label=STARTS[start])
        low = min(low, *elbos)
    axis.axhline(best, color="0.4", ls="--", lw=1, label="log p(x), annealed bound")
    axis.set(xscale="log", ylabel="ELBO, nats per datum", title="ELBO by seconds")
    axis.set_ylim(bottom=max(low, best - 4))
    axis.legend(loc="lower left")


def bars(axis: plt.Axes, gaps: dict[str, Any]) -> None:
    """Approximation and amortization gap on top of each other, a bar for each part of the data."""
    bottom = torch.zeros(len(gaps))
    for part, colour, hatch in (("approximation", "C0", ""), ("amortization", "C1", "//")):
        sizes = torch.tensor([one[f"{part}_gap"] for one in gaps.values()])
        drawn = axis.bar(list(gaps), sizes, bottom=bottom, color=colour, hatch=hatch, label=part)
        axis.bar_label(
            drawn, fmt="{:.2f}", label_type="center", bbox={"fc": "w", "ec": "none", "pad": 1}
        )
        bottom = bottom + sizes
    axis.set(title="log p(x) less the ELBO", ylabel="nats per datum")
    axis.set_ylim(0, 1.4 * float(bottom.max()))
    axis.legend(loc="upper left")


def picture(alone: Row, runs: Runs, gaps: dict[str, Any]) -> plt.Figure:
    """ELBO by seconds of the three ways, and the gaps of training and test data."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.8), width_ratios=(3, 2), layout="constrained"
    )
    curves(left, alone, runs, gaps["test"]["log_px"])
    left.set_xlabel(f"seconds for {gaps['test']['num_data']} test data")
    bars(right, gaps)
    return figure


def table(alone: Row, runs: Runs, gaps: dict[str, Any]) -> str:
    """The rows as README shows them."""

    def cell(row: dict[str, Any], name: str, error: str) -> str:
        return f"{row[name]:.3f} ± {row[f'{name}_{error}']:.3f}"

    named = [("network", alone), *((STARTS[s], row) for s, rows in runs.items() for row in rows)]
    fits = [
        [name, f"{row['steps']}", f"{row['seconds']:.3g}", cell(row, "elbo", "std_error")]
        for name, row in named
    ]
    parts = ("approximation", "amortization")
    of_gaps = [
        [name, f"{one['log_px']:.2f}", *(cell(one, f"{p}_gap", "mean_std_error") for p in parts)]
        for name, one in gaps.items()
    ]
    header = ["data", "log p(x) ≥", *(f"{part} gap" for part in parts)]
    return f"{markdown(HEADER, fits)}\n\n{markdown(header, of_gaps)}"


def verdict(alone: Row, runs: Runs, gaps: dict[str, Any]) -> str:
    """What was expected beside what was found."""
    first = "one start for all does not reach the network"
    for row in reversed(runs["constant"]):
        if row["elbo"] >= alone["elbo"]:
            first = (
                f"one start for all reaches the network ({1000 * alone['seconds']:.1f} ms) in "
                f"{row['steps']} steps and {row['seconds']:.1f} s"
            )
    gains = [a["elbo"] - b["elbo"] for a, b in zip(runs["guide"], runs["constant"], strict=True)]
    noise = math.hypot(*(rows[-1]["elbo_std_error"] for rows in runs.values()))
    ahead, behind = (sum(sign * gain > 2 * noise for gain in gains) for sign in (1, -1))
    more = gaps["test"]["amortization_gap"] - gaps["train"]["amortization_gap"]
    error = math.hypot(*(one["amortization_gap_test_std_error"] for one in gaps.values()))
    return (
        f"{first}\nsame optimum from both starts: expected a difference of 0, found "
        f"{gains[-1]:.4f} ± {noise:.4f} nats after {STEPS[-1]} steps\nfitting from the network: "
        f"expected ahead, and level at the end; found ahead at {ahead} of {len(gains)} numbers of "
        f"steps, behind at {behind}\namortization gap of test less training data: expected above "
        f"0, found {more:.3f} ± {error:.3f} nats"
    )


def main() -> None:
    """Train, fit each datum from both starts, split the gap, draw."""
    asked = parser(__doc__).parse_args()
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
