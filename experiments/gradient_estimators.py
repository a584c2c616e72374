r"""How much noise does each estimator of the ELBO's gradient have, as training goes on?

Question: at the same weights, data and number of particles, how large is the variance of the
          guide's gradient by the reparameterization trick, by path derivatives alone, and by the
          score function with and without a baseline? Are their means the same?
Command:  python experiments/gradient_estimators.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 35 seconds.
Expected: the score function is noisier by orders of magnitude: that is why VAEs are trained by the
          reparameterization trick (Kingma & Welling, 2014, arXiv:1312.6114, section 2.2; Ranganath
          et al., 2014, arXiv:1401.0118). A leave-one-out baseline takes most of that back (Kool et
          al., 2019), the more the less log p(x, z) - log q(z|x) varies over the guide's draws. Path
          derivatives lose noise as the guide nears the posterior, and beat the reparameterization
          trick late in training (Roeder et al., 2017, arXiv:1703.09194). Means agree: their
          differences in 21 directions, in standard errors, spread like a standard normal, and none
          is above 4.

One VAE of 20 latents is trained by the ELBO and copied along the way. Each copy's gradient in the
parameters of the guide, of the mean ELBO of 64 training images with 10 particles, is taken 200
times by each estimator; the variance is summed over parameters. Writes
experiments/results/gradient_estimators.json and .png.
"""

from __future__ import annotations

import copy
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import bernoulli_vae, markdown, parser
from torch import Tensor

import pyrovae
from pyrovae.objectives import ELBO, Objective, ScoreFunction, StickingTheLanding
from pyrovae.runs import made_by, write_json

K = 10
ESTIMATORS: dict[str, Objective] = {
    "reparameterized": ELBO(K),
    "reparameterized, analytic KL": ELBO(K, analytic_kl=True),
    "sticking the landing": StickingTheLanding(K),
    "score function, leave-one-out": ScoreFunction(K),
    "score function": ScoreFunction(K, baseline="none"),
}
REFERENCE = "reparameterized"
LATENTS, BATCH, DIRECTIONS = 20, 64, 20
SNAPSHOTS = (0, 2, 5, 10, 30, 100)
"""Epochs after which gradients are looked at."""
Found = dict[int, dict[str, dict[str, Any]]]
"""By epoch and estimator."""


def snapshots(dataset: pyrovae.data.DataSet, epochs: int) -> dict[int, pyrovae.VAE]:
    """Copies of a VAE as it is trained, by epoch."""
    torch.manual_seed(0)
    vae = bernoulli_vae(dataset.shape, LATENTS)
    vae.initialize(dataset.train[:])
    kept = {0: copy.deepcopy(vae)}

    def keep(vae: pyrovae.VAE, row: dict[str, Any]) -> None:
        if row["epoch"] in SNAPSHOTS:
            kept[row["epoch"]] = copy.deepcopy(vae)

    pyrovae.fit(vae, dataset.train, epochs=epochs, on_epoch=keep, progress=False)
    return kept


def gradients(vae: pyrovae.VAE, x: Tensor, objective: Objective, repeats: int, seed: int) -> Tensor:
    """Gradients of the mean ELBO in the guide's parameters, shape `(repeats, parameters)`."""
    torch.manual_seed(seed)
    params = list(vae.encoder.parameters())
    drawn = []
    for _ in range(repeats):
        loss, _ = objective.surrogate(vae.model, vae.guide, (x,))
        grads = torch.autograd.grad(-loss / len(x), params)
        drawn.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(drawn)


def directions(grads: Tensor) -> Tensor:
    """The direction of the mean gradient, and random ones, shape `(parameters, 1 + n)`."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(grads.shape[1], DIRECTIONS, generator=generator)
    found = torch.cat([grads.mean(0)[:, None], random], 1)
    return found / found.norm(dim=0)


def compared(vae: pyrovae.VAE, x: Tensor, repeats: int, seed: int) -> dict[str, dict[str, Any]]:
    """Variance of each estimator at these weights, and how its mean differs from the reference's.

    Each has noise of its own, and so has the direction of the gradient.
    """
    along = directions(gradients(vae, x, ELBO(10 * K), max(2, repeats // 10), seed))
    rows, projected = {}, {}
    for i, (name, objective) in enumerate(ESTIMATORS.items(), 1):
        grads = gradients(vae, x, objective, repeats, seed + i)
        parts = projected[name] = (grads @ along).double()
        rows[name] = {"variance": float(grads.double().var(0).sum())}
        if name == REFERENCE:
            square = float(grads.double().mean(0).square().sum())
            rows[name]["signal"] = square - rows[name]["variance"] / repeats
        else:
            of_both = (parts, projected[REFERENCE])
            std_error = sum(p.var(0) / repeats for p in of_both).sqrt()
            rows[name]["z"] = ((parts - projected[REFERENCE]).mean(0) / std_error).tolist()
    return rows


def z_scores(found: Found, name: str) -> Tensor:
    """Differences from the reference in standard errors, over all snapshots and directions."""
    return torch.tensor([z for rows in found.values() for z in rows[name].get("z", [])])


def variances(axis: plt.Axes, found: Found) -> None:
    """Variance of each estimator over training."""
    epochs = list(found)
    for name, marker in zip(ESTIMATORS, "os^Dv", strict=True):
        values = [rows[name]["variance"] for rows in found.values()]
        axis.plot(epochs, values, f"{marker}-", ms=4, label=name)
    signal = [rows[REFERENCE]["signal"] for rows in found.values()]
    axis.plot(epochs, signal, "k--", lw=1, label="squared norm of the mean gradient")
    axis.set(xlabel="epoch", ylabel="variance, summed over parameters (nats$^2$)", yscale="log")
    axis.set_xscale("symlog", linthresh=2)
    axis.set_xlim(left=-0.1)
    axis.set_xticks(epochs, [str(epoch) for epoch in epochs])
    axis.minorticks_off()
    axis.set_title(f"Gradient in the guide's parameters, K = {K}")


def agreement(axis: plt.Axes, found: Found) -> None:
    """Shares of z-scores below each value."""
    for i, name in enumerate(ESTIMATORS):
        z = z_scores(found, name).sort().values
        axis.plot(z, (torch.arange(len(z)) + 0.5) / len(z), color=f"C{i}", lw=1.2)
    line = torch.linspace(-3.5, 3.5, 200)
    axis.plot(line, torch.distributions.Normal(0.0, 1.0).cdf(line), "k:", lw=1.5)
    axis.set(xlabel="difference of means, standard errors", ylabel="share below")
    axis.set_title("Means against the first estimator's\n(dotted: standard normal)", fontsize=10)


def figure(found: Found) -> plt.Figure:
    """Variance of each estimator over training, and the agreement of their means."""
    drawn, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.9), layout="constrained", width_ratios=(1.6, 1)
    )
    variances(left, found)
    agreement(right, found)
    drawn.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawn


def table(found: Found) -> str:
    """Variances relative to the reference, and z-scores."""
    header = ["variance / reparameterized", *(f"epoch {epoch}" for epoch in found)]
    lines = []
    for name in ESTIMATORS:
        of = [rows[name]["variance"] / rows[REFERENCE]["variance"] for rows in found.values()]
        z = z_scores(found, name)
        last = [f"{z.std():.2f}", f"{len(z)}: {z.abs().max():.1f}"] if len(z) else ["", ""]
        lines.append([name, *(f"{ratio:.3g}" for ratio in of), *last])
    return markdown([*header, "z: standard deviation", "largest of"], lines)


def main() -> None:
    """Train, take gradients at each snapshot, compare, draw."""
    asked = parser(__doc__, data=None).parse_args()
    file = _results.folder(asked) / "gradient_estimators.json"
    epochs, repeats = (1, 5) if asked.smoke else (100 if asked.data == "digits" else 20, 200)
    dataset = pyrovae.data.load(asked.data, asked.data_root)
    torch.manual_seed(1)
    x = dataset.train[slice(0, BATCH)]
    found = {}
    for epoch, vae in snapshots(dataset, epochs).items():
        found[epoch] = compared(vae, x, repeats, 10 * epoch)
        print(epoch, {n: f"{row['variance']:.3g}" for n, row in found[epoch].items()}, flush=True)
    settings = {
        "num_particles": K, "repeats": repeats, "batch": BATCH, "latent_dim": LATENTS,
        "epochs": epochs, "seed": 0, "data": dataset.train.description, "made_by": made_by(),
    }  # fmt: skip
    write_json(file, {"snapshots": found} | settings)
    _results.save_figure(figure(found), file.with_suffix(".png"))
    print(table(found))
    print("expected: score function 100 and more, sticking the landing below 1 late; z 1, below 4")


if __name__ == "__main__":
    main()
