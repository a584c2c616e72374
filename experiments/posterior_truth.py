r"""How close does each guide come to a posterior that is known?

Question: what is KL(q(z|x) || p(z|x)), exactly, for each guide, on a posterior that is curved and
          has two modes?
Command:  python experiments/posterior_truth.py
Hardware: two cores, no GPU; about six minutes.
Expected: the KL falls from Normal, which sees one mode and no curve, to FullRankNormal, to each
          flow; a mixture takes both modes. A guide that keeps to one of two equal modes pays log 2.

The model is fixed: z ~ N(0, I) in two dimensions, x_1 ~ N(z_1^2, 1/2), x_2 ~ N(z_2 + z_1^2, 1/2).
Its two values of z_1 explain x_1 equally well, and z_2 lies on a parabola over z_1. Each guide is
trained by the ELBO on data from the model; log p(x) comes from a grid over z.

Writes experiments/results/posterior_truth.json and .png.
"""

from __future__ import annotations

import argparse
import math
import time

import _results
import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae import guides, nets, priors
from pyrovae.runs import made_by, write_json

ROWS: dict[str, dict] = {
    "Normal": {},
    "LowRankNormal": {"rank": 1},
    "FullRankNormal": {},
    "NormalMixture": {"num_components": 4},
    "Planar": {"transforms": 16},
    "OrthogonalSylvester": {"transforms": 8, "num_ortho": 2},
    "HouseholderSylvester": {"transforms": 8},
    "IAF": {"transforms": 8},
    "NeuralSpline": {"transforms": 3},
    "NeuralSplineCoupling": {"transforms": 4},
}
NOISE = 0.5


class Parabola(nn.Module):
    """p(x|z) = N(x; (z_1^2, z_2 + z_1^2), 1/4)."""

    shape, latent_dim = (2,), 2

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """The likelihood of z, shape `(*, 2)`."""
        squared = z[..., 0].square()
        return dist.Normal(torch.stack([squared, z[..., 1] + squared], -1), NOISE).to_event(1)


def grid(size: int = 801, bound: float = 6.0) -> tuple[Tensor, float]:
    """Points `(size^2, 2)` and the logarithm of the area of each."""
    line = torch.linspace(-bound, bound, size, dtype=torch.float64)
    return torch.cartesian_prod(line, line), 2 * math.log(float(line[1] - line[0]))


def exact_log_px(x: Tensor) -> Tensor:
    """Log p(x) by quadrature, nats, shape `(N,)`."""
    z, log_area = grid()
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    likelihood = Parabola()(z)
    each = [(log_prior + likelihood.log_prob(datum)).logsumexp(0) for datum in x.double()]
    return torch.stack(each) + log_area


def train(name: str, x: Tensor, epochs: int) -> pyrovae.VAE:
    """A VAE with this guide, the guide trained."""
    torch.manual_seed(0)
    net = nets.MLP(hidden=(64, 64))
    guide = getattr(guides, name)((2,), 2, net=net, **ROWS[name])
    vae = pyrovae.VAE(priors.StandardNormal(2), Parabola(), guide)
    objective = pyrovae.objectives.ELBO(num_particles=4)
    pyrovae.fit(
        vae, x, objective=objective, epochs=epochs, batch_size=len(x), lr=3e-3, clip_norm=100,
        compile=epochs > 1000, progress=False,
    )  # fmt: skip
    return vae


def gap(vae: pyrovae.VAE, x: Tensor, exact: Tensor, num_particles: int) -> tuple[float, float]:
    """Mean KL(q || p) over the data, and its Monte Carlo error."""
    elbo = pyrovae.elbo(vae.model, vae.guide, x, num_particles, seed=1)
    again = pyrovae.elbo(vae.model, vae.guide, x, num_particles, seed=2)
    difference = (elbo - again).double()
    kl = exact - (elbo + again).double() / 2
    return float(kl.mean()), float(difference.std() / 2 / math.sqrt(len(x)))


def picture(vaes: dict[str, pyrovae.VAE], datum: Tensor, kls: dict[str, float]) -> plt.Figure:
    """Draws of each guide over the contours of the posterior of one datum."""
    z, _ = grid(301, 3.0)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + Parabola()(z).log_prob(datum.double())
    p = (log_p - log_p.logsumexp(0)).exp().reshape(301, 301).T
    columns = 4
    rows = -(-len(vaes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    line = torch.linspace(-3, 3, 301)
    for axis in axes.flat[len(vaes) :]:
        axis.set_visible(False)
    for axis, (name, vae) in zip(axes.flat, vaes.items(), strict=False):
        with torch.no_grad():
            draws = vae.posterior(datum[None]).sample((1000,))[:, 0]
        axis.scatter(*draws.T, s=2, alpha=0.3, color="C1", linewidths=0)
        axis.contour(line, line, p, levels=5, colors="C0", linewidths=0.7)
        axis.set(title=f"{name}: {kls[name]:.2f}", xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
    figure.suptitle("One posterior (contours), draws of each guide, mean KL(q || p) in nats")
    return figure


def table(rows: dict[str, dict]) -> str:
    """The rows as README shows them."""
    lines = ["| guide | KL(q ‖ p), nats | Monte Carlo error | training |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {row['kl']:.3f} | {row['std_error']:.3f} | {row['seconds']:.0f} s |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Train every guide and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guides", nargs="+", default=list(ROWS), choices=list(ROWS))
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "posterior_truth.json"
    names, epochs, draws = (asked.guides[:2], 3, 10) if asked.smoke else (asked.guides, 4000, 5000)
    torch.manual_seed(0)
    x = Parabola()(torch.randn(128, 2)).sample()
    exact = exact_log_px(x)
    rows, vaes = {}, {}
    for name in names:
        start = time.perf_counter()
        vaes[name] = train(name, x, epochs)
        seconds = time.perf_counter() - start
        kl, error = gap(vaes[name], x, exact, draws)
        rows[name] = {
            "kl": kl, "std_error": error, "seconds": seconds, "settings": ROWS[name],
            "epochs": epochs, "num_particles": 2 * draws, "num_data": len(x), "seed": 0,
            "made_by": made_by(),
        }  # fmt: skip
        print(name, rows[name], flush=True)
    write_json(file, rows)
    datum = x[x[:, 0].argsort()[len(x) * 9 // 10]]
    kls = {name: row["kl"] for name, row in rows.items()}
    picture(vaes, datum, kls).savefig(file.with_suffix(".png"), dpi=150)
    print(table(rows))


if __name__ == "__main__":
    main()
