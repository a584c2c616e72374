"""Does a decoder that reads what it has written still use its latents, and what helps?

Question: a recurrent VAE reads and writes an image row by row. How many nats do its latents carry
          when it is trained as it is, with a KL warm-up, with word dropout, with free bits?
Command:  python experiments/sequences.py
Hardware: two cores, no GPU; about a minute and a half.
Expected: as it is, the KL falls to zero and every latent collapses (Bowman et al., 2016); with each
          of the others the KL is above one nat and some latents are active. Found besides, with
          one seed: a warm-up and free bits raise log p(x), word dropout alone lowers it.

The guide is a normal on a recurrent encoder that reads both ways, as in sketch-RNN (Ha & Eck,
2017); the decoder is fed z at every step. A row of the binarized digits is a time step. For
comparison there is the same guide with a decoder whose pixels are independent given z.

Writes experiments/results/sequences.json and .png.

References:
    Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349;
    A Neural Representation of Sketch Drawings (Ha & Eck, 2017), arXiv:1704.03477;
    free bits: Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al.,
    2016), arXiv:1606.04934
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyrovae
from pyrovae import evidence, guides, likelihoods, nets, objectives, priors
from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.plotting.images import show_grid
from pyrovae.runs import made_by, write_json

LATENTS, HIDDEN = 8, 64
ROWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "KL warm-up": {"warmup": 0.5},
    "word dropout": {"word_dropout": 0.5},
    "free bits": {"free_bits": 0.5},
    "warm-up and word dropout": {"warmup": 0.5, "word_dropout": 0.5},
    "independent pixels": {"recurrent": False},
}
STEPS = 9


def train(dataset: Any, settings: dict[str, Any], epochs: int) -> pyrovae.VAE:
    """A VAE with these settings, trained."""
    torch.manual_seed(0)
    shape = dataset.preprocess.shape
    if settings.get("recurrent", True):
        rate = settings.get("word_dropout", 0.0)
        likelihood = likelihoods.RecurrentBernoulli(
            shape, LATENTS, hidden=HIDDEN, word_dropout=rate
        )
    else:
        likelihood = likelihoods.Bernoulli(shape, LATENTS)
    guide = guides.Normal(shape, LATENTS, nets.Recurrent(HIDDEN))
    vae = pyrovae.VAE(priors.StandardNormal(LATENTS), likelihood, guide)
    pyrovae.fit(
        vae, dataset.train, valid=dataset.valid, epochs=epochs, compile=False, progress=False,
        objective=objectives.ELBO(free_bits=settings.get("free_bits", 0.0)),
        kl_warmup=int(epochs * settings.get("warmup", 0)),
    )  # fmt: skip
    return vae


def judged(vae: pyrovae.VAE, test: Any, num_particles: int) -> tuple[dict[str, Any], Tensor]:
    """ELBO, KL, active units and log p(x) on the test data, and log p(x) of each datum."""
    carried = evidence.latents(vae.model, vae.guide, test, num_particles=10, seed=0)
    result = pyrovae.log_px(vae.model, vae.guide, test, num_particles, seed=0, progress=False)
    row = {
        "elbo": carried.elbo, "elbo_std_error": error_of_mean(carried.rate + carried.distortion),
        "kl": float(carried.rate.mean()), "kl_std_error": error_of_mean(carried.rate),
        "active_units": carried.active_units, "log_px": result.mean,
        "log_px_std_error": result.test_std_error, "mean_std_error": result.mean_std_error,
    }  # fmt: skip
    return row, result.values


def picture(rows: dict[str, dict], paths: Tensor) -> plt.Figure:
    """Bounds, KL and a path between the same two images, a row for each way to train."""
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(3, 2.2, 4.6)
    )
    place = range(len(rows))
    for name, label, marker in (("elbo", "ELBO", "o"), ("log_px", "log p(x) ≥", "s")):
        axes[0].plot([row[name] for row in rows.values()], place, marker, ls="", label=label)
    axes[0].set(xlabel="nats per test image", yticks=place)
    axes[0].set_yticklabels(rows)
    axes[0].legend(frameon=False)
    bars = axes[1].barh(place, [row["kl"] for row in rows.values()], height=0.6)
    axes[1].bar_label(bars, [f" {row['active_units']} active" for row in rows.values()], fontsize=8)
    axes[1].set(xlabel="KL, nats", yticks=[])
    axes[1].set_xlim(0, 1.5 * max(row["kl"] for row in rows.values()))
    for axis in axes[:2]:
        axis.set_ylim(len(rows) - 0.5, -0.5)
    show_grid(axes[2], paths, (0, 1), "Means of p(x|z) between two test images")
    axes[2].set_aspect("auto")
    return figure


def table(rows: dict[str, dict]) -> str:
    """A line for each way to train."""
    lines = ["| | KL, nats | active units | ELBO | log p(x) ≥ | above as it is |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {name} | {row['kl']:.2f} | {row['active_units']} of {LATENTS} | {row['elbo']:.2f} "
        f"| {row['log_px']:.2f} | {row['gain']:+.2f} ± {row['gain_std_error']:.2f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def verdict(rows: dict[str, dict]) -> str:
    """What was found beside what was expected."""
    plain, *others = [row for row in rows.values() if row["settings"].get("recurrent", True)]
    least = min(row["kl"] for row in others)
    collapsed = f"as it is: KL {plain['kl']:.2f} nats, {plain['active_units']} active"
    return f"{collapsed}; expected 0 and 0\nother ways: KL at least {least:.2f}; expected above 1"


def main() -> None:
    """Train every way, judge, draw, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--data-root", help="folder with the data sets' files")
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "sequences.json"
    dataset = pyrovae.data.load(asked.data, root=asked.data_root)
    epochs = 2 if asked.smoke else {"digits": 60, "mnist": 10}[asked.data]
    num_particles = 10 if asked.smoke else 200
    test = dataset.test.subset(slice(0, 1000))
    of = [test[slice(None)][test.y == label][:1] for label in (0, 1)]
    rows, paths, first = {}, [], None
    for name, settings in ROWS.items():
        start = time.perf_counter()
        vae = train(dataset, settings, epochs)
        seconds = time.perf_counter() - start
        row, log_px = judged(vae, test, num_particles)
        first = log_px if first is None else first
        gain = {
            "gain": float((log_px - first).mean()),
            "gain_std_error": error_of_mean(log_px - first),
        }
        rows[name] = row | gain | {
            "settings": settings, "epochs": epochs, "num_particles": num_particles, "seed": 0,
            "data": asked.data, "num_data": len(test), "seconds": seconds, "made_by": made_by(),
        }  # fmt: skip
        paths.append(vae.interpolate(*of, STEPS)[:, 0])
        print(name, row, flush=True)
    write_json(file, rows)
    picture(rows, torch.stack(paths)).savefig(file.with_suffix(".png"), dpi=150)
    print(table(rows), verdict(rows), sep="\n\n")


if __name__ == "__main__":
    main()
