r"""Why does a plain autoencoder not generate?

Question: what do an autoencoder, a denoising one and a VAE of the same network make of codes that
          no datum has: how evenly do pictures change between two codes (continuity), and how
          plausible are pictures of random codes (completeness)?
Command:  python experiments/autoencoder_vs_vae.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 40 seconds.
Expected: the VAE is more continuous (largest over mean step nearer 1) and more complete (log
          density of decoded codes higher, by more than two standard errors) than the autoencoder,
          as only its codes are pulled to the prior (Kingma & Welling, 2014, arXiv:1312.6114). No
          published number is known.

One network, a Bernoulli likelihood of binarized digits, 2 and 10 latents, three ways to train:

* autoencoder: the guide is a point, `guides.Delta`, and the KL has weight 0;
* denoising: the same, with a tenth of the pixels flipped before the encoder sees them
  (`objectives.Denoising`, which takes any guide), after Vincent et al. (2008);
* VAE: a normal guide and the ELBO.

Continuity: each test datum is joined with the next, the straight line between the two codes is
decoded in 32 steps, and the largest change of the picture divided by the mean change.
Completeness: pictures of 1,000 random codes are scored by a kernel density of the real test digits
(its bandwidth maximises the log density of validation digits) and by the entropy of a logistic
regression trained on real digits. An autoencoder has no prior: its codes come from a normal fitted
to the training data's, the repair after training of Ghosh et al. (2020), arXiv:1903.12436, and from
N(0, I) for comparison. The VAE is judged by codes from N(0, I), its prior.

Pictures are means of p(x|z), and smooth: a kernel density favours them over real digits where they
are good. Hence the share that is less plausible than 99 % of real digits.

Writes experiments/results/autoencoder_vs_vae.json and .png.
"""

from __future__ import annotations

import math
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import MLP, grey, markdown, mean_and_error, parser
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KernelDensity
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae import guides, likelihoods, objectives, priors
from pyrovae.data import DataSet
from pyrovae.plotting.images import show_grid
from pyrovae.plotting.panels import as_numpy, scatter_by_label
from pyrovae.runs import made_by, write_json

WAYS: dict[str, tuple[type[guides.Guide], objectives.ELBO]] = {
    "autoencoder": (guides.Delta, objectives.ELBO(beta=0.0)),
    "denoising": (guides.Delta, objectives.Denoising("flip", 0.1, beta=0.0)),
    "VAE": (guides.Normal, objectives.ELBO()),
}
LATENT_DIMS = (2, 10)
BANDWIDTHS = (0.05, 0.07, 0.1, 0.14, 0.2)
NUM_STEPS = 32


def train(way: str, dataset: DataSet, latent_dim: int, epochs: int) -> pyrovae.VAE:
    """A model of this many latents, with the weights of the last epoch."""
    guide, objective = WAYS[way]
    torch.manual_seed(0)
    shape = dataset.shape
    vae = pyrovae.VAE(
        priors.StandardNormal(latent_dim),
        likelihoods.Bernoulli(shape, latent_dim, net=MLP),
        guide(shape, latent_dim, net=MLP),
    )
    pyrovae.fit(vae, dataset.train, objective=objective, epochs=epochs, progress=False)
    return vae


class Judge:
    """Real digits' density and classifier.

    Args:
        x: Grey levels in [0, 1] of each split, shape `(N, *shape)`.
        y: Labels of the training split.
    """

    def __init__(self, x: dict[str, Tensor], y: Tensor):
        flat = {name: as_numpy(split.flatten(1)) for name, split in x.items()}
        densities = [KernelDensity(bandwidth=width).fit(flat["test"]) for width in BANDWIDTHS]
        self.density = max(densities, key=lambda one: one.score(flat["valid"]))
        self.classifier = LogisticRegression(max_iter=2000).fit(flat["train"], y.numpy())
        self.floor = torch.from_numpy(self.density.score_samples(flat["train"])).quantile(0.01)

    def __call__(self, pictures: Tensor) -> dict[str, float]:
        """Log density, share below that of 99 % of real digits, and entropy of the label."""
        flat = as_numpy(pictures.flatten(1))
        log_density = torch.from_numpy(self.density.score_samples(flat))
        entropy = torch.special.entr(torch.from_numpy(self.classifier.predict_proba(flat))).sum(1)
        return {
            **mean_and_error("log_density", log_density),
            **mean_and_error("entropy", entropy),
            "implausible": float((log_density < self.floor).double().mean()),
        }


def random_codes(vae: pyrovae.VAE, dataset: DataSet, num: int) -> dict[str, Tensor]:
    """Codes from a normal fitted to the training data's, and from N(0, I)."""
    torch.manual_seed(0)
    z = vae.encode(dataset.train[slice(0, 5000)])
    fitted = MultivariateNormal(z.mean(0), z.T.cov()).sample((num,))
    return {"fitted": fitted, "standard": vae.sample_latent(num)}


def measure(
    vae: pyrovae.VAE, dataset: DataSet, x: Tensor, judge: Judge, num: int
) -> dict[str, Any]:
    """Continuity on the paths between data x, and completeness; and the scale of the codes."""
    path = vae.interpolate(x, x.roll(1, 0), NUM_STEPS + 1).flatten(2)
    step = path.diff(dim=0).norm(dim=2)
    random = random_codes(vae, dataset, num)
    return {
        **mean_and_error("continuity", step.amax(0) / step.mean(0)),
        **{source: judge(vae.decode(z)) for source, z in random.items()},
        "code_std": float(vae.encode(x).std(0).mean()),
    }


def source_of(way: str) -> str:
    """Where the codes come from that a model is judged by."""
    return "standard" if way == "VAE" else "fitted"


def picture(
    vaes: dict[tuple[str, int], pyrovae.VAE], dataset: DataSet, rows: dict[str, Any]
) -> plt.Figure:
    """Codes of test data, paths between them, and pictures of random codes, for each way."""
    few, many = LATENT_DIMS
    x, y = dataset.test[slice(0, 1000)], dataset.test.y[:1000]
    figure, axes = plt.subplots(3, len(WAYS), figsize=(8.5, 8), layout="constrained")
    for way, (plane, paths, drawn) in zip(WAYS, axes.T, strict=True):
        flat, deep, source = vaes[way, few], vaes[way, many], source_of(way)
        scatter_by_label(plane, as_numpy(flat.encode(x)), y)
        plane.get_legend().remove()
        plane.set(xlabel="z1", ylabel="z2")
        show_grid(paths, flat.interpolate(x[:6], x[6:12], 9).transpose(0, 1), (0, 1), "")
        z = random_codes(deep, dataset, 49)[source]
        show_grid(drawn, deep.decode(z).unflatten(0, (7, 7)), (0, 1), "")
        ratio = rows[f"{way}, {few}"]["continuity"]
        share = rows[f"{way}, {many}"][source]["implausible"]
        words = "the prior" if way == "VAE" else "a fitted normal"
        plane.set_title(f"{way}:\ncodes of test data by label", size=10)
        paths.set_title(
            f"paths between two codes:\nlargest step {ratio:.1f} times the mean", size=10
        )
        drawn.set_title(f"{many} latents, from {words}:\n{share:.1%} implausible", size=10)
    return figure


def table(rows: dict[str, Any], real: dict[str, float]) -> str:
    """The rows as README shows them."""
    formats = {"log_density": ".1f", "implausible": ".1%", "entropy": ".2f"}
    header = ["model, latents", "largest / mean step"]
    for words in ("log density, nats", "implausible", "entropy of the label"):
        header += [f"{words}, codes from a fitted normal", "from N(0, I)"]
    lines = []
    for name, row in rows.items():
        lines.append([name, f"{row['continuity']:.2f} ± {row['continuity_std_error']:.2f}"])
        for key, how in formats.items():
            lines[-1] += [format(row[source][key], how) for source in ("fitted", "standard")]
    last = ["real digits", ""]
    for key, how in formats.items():
        last += [format(real[key], how), ""]
    return markdown(header, [*lines, last])


def above(one: dict[str, float], other: dict[str, float], name: str) -> str:
    """Whether a mean is above another by more than two standard errors, in words."""
    error = math.hypot(one[f"{name}_std_error"], other[f"{name}_std_error"])
    return "confirmed" if one[name] - other[name] > 2 * error else "not confirmed"


def verdict(rows: dict[str, Any], latent_dim: int) -> str:
    """What was expected beside what was found."""
    plain, vae = (rows[f"{way}, {latent_dim}"] for way in ("autoencoder", "VAE"))
    drawn, fitted = vae[source_of("VAE")], plain[source_of("autoencoder")]
    return (
        f"{latent_dim} latents, VAE against autoencoder: expected more continuous, found "
        f"{vae['continuity']:.2f} against {plain['continuity']:.2f} "
        f"({above(plain, vae, 'continuity')}); expected more complete, found "
        f"{drawn['log_density']:.1f} against {fitted['log_density']:.1f} nats "
        f"({above(drawn, fitted, 'log_density')})"
    )


def main() -> None:
    """Train each way with each number of latents, measure, draw."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "autoencoder_vs_vae.json"
    epochs = 2 if asked.smoke else {"digits": 200, "mnist": 20}[asked.data]
    num = 50 if asked.smoke else 1000
    dataset = pyrovae.data.load(asked.data, asked.data_root)
    x = {split.name: grey(split)[:5000] for split in (dataset.train, dataset.valid, dataset.test)}
    judge = Judge(x, dataset.train.y[:5000])
    rows, vaes = {}, {}
    for latent_dim in LATENT_DIMS:
        for way in WAYS:
            vae = train(way, dataset, latent_dim, epochs)
            found = measure(vae, dataset, dataset.test[slice(0, 1000)], judge, num)
            vaes[way, latent_dim], rows[f"{way}, {latent_dim}"] = vae, found
            print(way, latent_dim, found, flush=True)
    real = judge(x["train"])
    accuracy = judge.classifier.score(as_numpy(x["test"].flatten(1)), dataset.test.y[:5000])
    settings = {
        "data": dataset.test.description, "epochs": epochs, "num_codes": num, "seed": 0,
        "num_steps": NUM_STEPS, "bandwidth": judge.density.bandwidth,
        "classifier_accuracy": float(accuracy),
    }  # fmt: skip
    write_json(file, {"rows": rows, "real": real, "settings": settings, "made_by": made_by()})
    _results.save_figure(picture(vaes, dataset, rows), file.with_suffix(".png"))
    print(table(rows, real))
    print(*(verdict(rows, latent_dim) for latent_dim in LATENT_DIMS), sep="\n")


if __name__ == "__main__":
    main()
