r"""What does the noise of the likelihood decide?

Question: p(x|z) = N(f(z), c I): how does c trade reconstruction against KL, how blurred are
          pictures, and what is log p(x), for fixed c, learned c, and other likelihoods?
Command:  python experiments/observation_models.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 40 seconds.
Expected: squared error is the log likelihood up to constants, to rounding; the rate falls and the
          squared error and the blur of reconstructions and samples rise with c; learned c has the
          best log p(x) of the normals (Rybkin et al., 2021, arXiv:2006.13202).

.. math:: \log p(x|z) = -\frac{\|x - f(z)\|^2}{2c} - \frac D2 \log 2 \pi c

so that a VAE with "squared error plus beta KL" is one with c = beta / 2: c = 1/2 is the plain sum.

Every model has the same network and 10 latents. Grey digits of 17 levels are dequantized, and all
log p(x) but one are of these same data: lower bounds by annealing, in nats and bits per dimension
of whole grey levels. The Bernoulli sees binarized digits: other data, another unit, not to be
compared; the continuous Bernoulli is its density on grey ones. Squared errors are per pixel between
x and the mean of p(x|z), z drawn from the guide. Sharpness is the mean size of the gradient of such
means, and of those of 500 codes from the prior, relative to that of test digits without noise.

Writes experiments/results/observation_models.json and .png.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import MLP, markdown, parser
from torch import Tensor

import pyrovae
from pyrovae import evidence, guides, likelihoods, priors
from pyrovae.data import DataSet
from pyrovae.plotting.images import show_grid
from pyrovae.runs import made_by, write_json

VARIANCES = (0.0005, 0.002, 0.008, 0.03, 0.12, 0.5)
FIXED = tuple(map(str, VARIANCES))
OTHERS = ("learned c", "ContinuousBernoulli", "Bernoulli")
LATENT_DIM = 10


def likelihood(name: str, shape: tuple[int, ...]) -> likelihoods.Likelihood:
    """The likelihood of this row."""
    if name in ("ContinuousBernoulli", "Bernoulli"):
        return getattr(likelihoods, name)(shape, LATENT_DIM, net=MLP)
    scale: Any = "learned" if name == "learned c" else math.sqrt(float(name))
    return likelihoods.Normal(shape, LATENT_DIM, net=MLP, scale=scale)


def train(name: str, dataset: DataSet, epochs: int) -> pyrovae.VAE:
    """A VAE with this likelihood, with the best weights by validation ELBO."""
    torch.manual_seed(0)
    shape = dataset.shape
    guide = guides.Normal(shape, LATENT_DIM, net=MLP)
    vae = pyrovae.VAE(priors.StandardNormal(LATENT_DIM), likelihood(name, shape), guide)
    pyrovae.fit(
        vae, dataset.train, valid=dataset.valid, epochs=epochs, clip_norm=100, progress=False
    )
    return vae


def identity(vae: pyrovae.VAE, x: Tensor) -> float:
    """By how much log p(x|z) and the squared error with its constants differ, relative."""
    vae, x = copy.deepcopy(vae).double(), x.double()
    z = vae.encode(x)
    with torch.no_grad():
        log_px = vae.likelihood(z).log_prob(x)
        c = torch.as_tensor(vae.likelihood.scale, dtype=torch.float64).square()
    error = (x - vae.decode(z)).square().flatten(1).sum(1) / (2 * c)
    constant = x[0].numel() / 2 * (2 * math.pi * c).log()
    return float(((log_px + error + constant) / (error + constant.abs())).abs().max())


def sharpness(pictures: Tensor) -> float:
    """Mean size of the gradient, by differences of neighbouring pixels."""
    down = pictures.diff(dim=-2)[..., :, :-1]
    across = pictures.diff(dim=-1)[..., :-1, :]
    return float(torch.hypot(down, across).mean())


def measure(
    name: str, vae: pyrovae.VAE, dataset: DataSet, grey: Tensor, quick: bool
) -> dict[str, Any]:
    """Log p(x), rate, squared error and sharpness on test data."""
    test = dataset.test.subset(slice(0, len(grey)))
    method = evidence.Annealed(5 if quick else 50)
    result = pyrovae.log_px(vae.model, vae.guide, test, 4, method=method, seed=0)
    carried = evidence.latents(vae.model, vae.guide, test, seed=0).summary()
    torch.manual_seed(0)
    x, drawn = test[slice(None)], vae.sample(500, mean=True)
    with torch.no_grad():
        again = vae.decode(vae.posterior(x).sample((20,)))
    seen = x if dataset.kind == "grey" else grey
    normal = isinstance(vae.likelihood, likelihoods.Normal)
    return {
        "c": float(torch.as_tensor(vae.likelihood.scale).detach()) ** 2 if normal else None,
        "log_px": result.summary(),
        "rate": carried["rate"],
        "rate_std_error": carried["rate_std_error"],
        "squared_error": float((again - seen).square().mean()),
        "sharpness": sharpness(again) / sharpness(grey),
        "sharpness_of_samples": sharpness(drawn) / sharpness(grey),
        "identity": identity(vae, x) if normal else None,
    }


def trade_off(axis: plt.Axes, rows: dict[str, Any]) -> None:
    """Squared error over rate."""
    at = {name: (row["rate"], row["squared_error"]) for name, row in rows.items()}
    axis.plot(*zip(*(at[name] for name in FIXED), strict=True), "o-", label="fixed c")
    axis.plot(*at["learned c"], "C1*", ms=12, label="learned c")
    axis.plot(*at["ContinuousBernoulli"], "C2s", label="continuous Bernoulli")
    for name in FIXED:
        axis.annotate(name, at[name], (5, 5), textcoords="offset points", size=8)
    axis.set(xlabel="rate, nats per datum", ylabel="squared error per pixel", yscale="log")
    axis.set_title("Rate and distortion, at the c written beside")
    axis.margins(x=0.22, y=0.12)
    axis.legend()


def cost(axis: plt.Axes, rows: dict[str, Any]) -> None:
    """Bits per dimension over c."""
    bits = {name: row["log_px"]["bits_per_dim"] for name, row in rows.items()}
    axis.plot(VARIANCES, [bits[name] for name in FIXED], "o-", label="fixed c")
    axis.plot(rows["learned c"]["c"], bits["learned c"], "C1*", ms=12, label="learned c")
    axis.axhline(bits["ContinuousBernoulli"], color="C2", ls="--", label="continuous Bernoulli")
    axis.set(xlabel="c", ylabel="bits per dimension (less is better)", xscale="log")
    axis.set_title("$-\\log_2$ p(x) of the same grey test data")
    axis.legend()


def picture(rows: dict[str, Any], vaes: dict[str, pyrovae.VAE], grey: Tensor) -> plt.Figure:
    """Rate and squared error over c, log p(x) over c, and samples of each model."""
    figure = plt.figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplot_mosaic([["curve", "bits"], ["strip", "strip"]], height_ratios=(3, 4))
    trade_off(axes["curve"], rows)
    cost(axes["bits"], rows)
    torch.manual_seed(0)
    z = torch.randn(20, LATENT_DIM)
    tiles = torch.stack([grey[:20], *(vae.decode(z) for vae in vaes.values())])
    title = "Data, and means of p(x|z) for z from the prior"
    _, down = show_grid(axes["strip"], tiles, (0, 1), title)
    axes["strip"].set_yticks(down, ["data", *map(label, vaes)])
    return figure


def label(name: str) -> str:
    """A row's name to be read."""
    return name if name in OTHERS else f"c = {name}"


def table(rows: dict[str, Any]) -> str:
    """The rows as README shows them."""
    header = ["p(x given z)", "c", "rate, nats", "squared error per pixel", "log p(x) ≥, nats"]
    header += ["bits / dim ≤", "sharpness of reconstructions, data = 1", "of samples"]
    lines = []
    for name, row in rows.items():
        found = row["log_px"]
        lines.append([
            f"{label(name)}{', of other data' if name == 'Bernoulli' else ''}",
            "" if row["c"] is None else f"{row['c']:.2g}",
            f"{row['rate']:.2f} ± {row['rate_std_error']:.2f}", f"{row['squared_error']:.4f}",
            f"{found['mean']:.2f} ± {found['mean_std_error']:.2f}", f"{found['bits_per_dim']:.3f}",
            f"{row['sharpness']:.2f}", f"{row['sharpness_of_samples']:.2f}",
        ])  # fmt: skip
    return markdown(header, lines)


def verdict(rows: dict[str, Any]) -> str:
    """What was expected beside what was found."""
    fixed = [rows[name] for name in FIXED]
    claims = {
        "rate falls with c": [-row["rate"] for row in fixed],
        "squared error rises with c": [row["squared_error"] for row in fixed],
        "reconstructions blur with c": [-row["sharpness"] for row in fixed],
        "samples blur with c": [-row["sharpness_of_samples"] for row in fixed],
    }
    lines = [
        f"{claim}: {'found' if values == sorted(values) else 'not found at every c'}"
        for claim, values in claims.items()
    ]
    best = max(row["log_px"]["mean"] for row in fixed)
    learned = rows["learned c"]["log_px"]["mean"]
    worst = max(row["identity"] for row in rows.values() if row["identity"] is not None)
    lines += [
        f"learned c best of the normals: {'' if learned > best else 'not '}found, {learned:.2f} "
        f"against {best:.2f} nats at the best fixed c",
        "squared error is log p(x|z) up to constants: expected equal to rounding, 1e-15; found a "
        f"relative difference of at most {worst:.1e}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train and measure every likelihood, draw."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "observation_models.json"
    epochs = 2 if asked.smoke else {"digits": 100, "mnist": 20}[asked.data]
    num_data = 20 if asked.smoke else 300
    grey_data = pyrovae.data.load(asked.data, asked.data_root, binarize="none")
    binary_data = pyrovae.data.load(asked.data, asked.data_root)
    levels = grey_data.preprocess.max_value + 1
    grey = (grey_data.test.x[:num_data] + 0.5) / levels
    rows, vaes = {}, {}
    for name in (*FIXED, *OTHERS):
        dataset = binary_data if name == "Bernoulli" else grey_data
        vaes[name] = train(name, dataset, epochs)
        rows[name] = measure(name, vaes[name], dataset, grey, asked.smoke)
        print(name, rows[name], flush=True)
    settings = {"epochs": epochs, "latent_dim": LATENT_DIM, "seed": 0}
    write_json(file, {"rows": rows, "settings": settings, "made_by": made_by()})
    _results.save_figure(picture(rows, vaes, grey), file.with_suffix(".png"))
    print(table(rows))
    print(verdict(rows))


if __name__ == "__main__":
    main()
