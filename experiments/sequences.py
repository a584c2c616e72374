"""Does a decoder that reads what it has written still use its latents, and what helps?

Question: a recurrent VAE reads and writes an image row by row. How many nats do its latents carry
          when it is trained as it is, with a KL warm-up, with word dropout, with free bits?
Command:  python experiments/sequences.py
Hardware: two cores, no GPU; 45 seconds.
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

import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import markdown, mean_and_error, parser
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
    shape, rate = dataset.shape, settings.get("word_dropout", 0.0)
    if settings.get("recurrent", True):
        likelihood: likelihoods.Likelihood = likelihoods.RecurrentBernoulli(
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
        **mean_and_error("kl", carried.rate), "active_units": carried.active_units,
        "log_px": result.mean, "log_px_std_error": result.test_std_error,
        "mean_std_error": result.mean_std_error,
    }  # fmt: skip
    return row, result.values


def picture(rows: dict[str, dict], paths: Tensor) -> plt.Figure:
    """Bounds, KL and a path between the same two images, a row for each way to train."""
    figure, (bounds, carried, images) = plt.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(3, 2.2, 4.6)
    )
    place, kl = range(len(rows)), [row["kl"] for row in rows.values()]
    for name, label, marker in (("elbo", "ELBO", "o"), ("log_px", "log p(x) ≥", "s")):
        bounds.plot([row[name] for row in rows.values()], place, marker, ls="", label=label)
    bounds.set(xlabel="nats per test image", ylim=(len(rows) - 0.5, -0.5))
    bounds.set_yticks(place, list(rows))
    bounds.legend(frameon=False)
    bars = carried.barh(place, kl, height=0.6)
    carried.bar_label(bars, [f" {row['active_units']} active" for row in rows.values()], fontsize=8)
    carried.set(xlabel="KL, nats", yticks=[], xlim=(0, 1.5 * max(kl)), ylim=bounds.get_ylim())
    show_grid(images, paths, (0, 1), "Means of p(x|z) between two test images")
    images.set_aspect("auto")
    return figure


def table(rows: dict[str, dict]) -> str:
    """A line for each way to train."""
    lines = [
        [
            name, f"{row['kl']:.2f}", f"{row['active_units']} of {LATENTS}", f"{row['elbo']:.2f}",
            f"{row['log_px']:.2f}", f"{row['gain']:+.2f} ± {row['gain_std_error']:.2f}",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    header = ["", "KL, nats", "active units", "ELBO", "log p(x) ≥", "above as it is"]
    return markdown(header, lines)


def verdict(rows: dict[str, dict]) -> str:
    """What was found beside what was expected."""
    plain, *others = [row for row in rows.values() if row["settings"].get("recurrent", True)]
    least = min(row["kl"] for row in others)
    collapsed = f"as it is: KL {plain['kl']:.2f} nats, {plain['active_units']} active"
    return f"{collapsed}; expected 0 and 0\nother ways: KL at least {least:.2f}; expected above 1"


def main() -> None:
    """Train every way, judge, draw, tabulate."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "sequences.json"
    dataset = pyrovae.data.load(asked.data, asked.data_root)
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
        rows[name] = row | mean_and_error("gain", log_px - first) | {
            "settings": settings, "epochs": epochs, "num_particles": num_particles, "seed": 0,
            "data": asked.data, "num_data": len(test), "seconds": seconds, "made_by": made_by(),
        }  # fmt: skip
        paths.append(vae.interpolate(*of, STEPS)[:, 0])
        print(name, row, flush=True)
    write_json(file, rows)
    _results.save_figure(picture(rows, torch.stack(paths)), file.with_suffix(".png"))
    print(table(rows), verdict(rows), sep="\n\n")


if __name__ == "__main__":
    main()
