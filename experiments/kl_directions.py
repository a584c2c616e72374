r"""What do the two directions of the KL choose, where one guide cannot have it all?

Question: fitted to a target with two modes by KL(q || p) and by KL(p || q), where do a normal and a
          flow put their mass? And is the KL between normals what the textbook says?
Command:  python experiments/kl_directions.py
Hardware: two cores, no GPU; 35 seconds; no data needed.
Expected: KL(q || p) takes one mode of a target that has a weight of w on it, at a cost of -log w
          (0.511 for w = 0.6); KL(p || q) blurs over both: the best normal has the target's mean and
          covariance (Bishop, 2006, section 10.1), which the fit should come within 5 % of. A flow
          comes near the target in both directions. The closed form of the KL between normals is
          torch's to rounding and within three standard errors of Monte Carlo.

One program, whose model draws z from the target and observes what says nothing of it, so that the
ELBO is -KL(q || p); only the objective changes. `ELBO` minimises KL(q || p), the wake phase of
`ReweightedWakeSleep` KL(p || q), by importance sampling from the guide. Both KLs of each fit are
sums over a grid. Writes experiments/results/kl_directions.json and .png.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import _results
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _gallery import markdown
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import pyrovae
from pyrovae import guides, nets
from pyrovae.objectives import ELBO, Objective, ReweightedWakeSleep
from pyrovae.runs import made_by, write_json

WEIGHTS = torch.tensor([0.6, 0.4])
LOCS = torch.tensor([[-1.7, -0.4], [1.7, 0.5]])
COVS = torch.tensor([[[0.40, 0.24], [0.24, 0.30]], [[0.25, -0.15], [-0.15, 0.45]]])

FAMILIES: dict[str, dict[str, Any]] = {
    "FullRankNormal": {},
    "NeuralSplineCoupling": {"transforms": 3},
}
STEPS = {"FullRankNormal": 2000, "NeuralSplineCoupling": 600}
DIRECTIONS: dict[str, Objective] = {
    "KL(q || p)": ELBO(num_particles=256),
    "KL(p || q)": ReweightedWakeSleep(num_particles=512),
}


def target(dtype: torch.dtype = torch.float32) -> dist.TorchDistribution:
    """The mixture of two normals."""
    components = dist.MultivariateNormal(LOCS.to(dtype), COVS.to(dtype))
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS.to(dtype)), components)


class Fit(nn.Module):
    """The target as a model, and a guide for it."""

    def __init__(self, family: str):
        super().__init__()
        net = nets.MLP(hidden=())  # of an input that is zero: its bias alone
        self.family = getattr(guides, family)((1,), 2, net=net, **FAMILIES[family])

    def model(self, x: Tensor) -> None:
        """p(z), and an x that says nothing of z: p(x) is 1 at x = 0."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", target())
            nothing = dist.Normal(torch.zeros_like(x), (2 * math.pi) ** -0.5)
            pyro.sample("x", nothing.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(x))

    def q(self) -> dist.TorchDistribution:
        """The guide's distribution, batch shape `(1,)`."""
        return self.family(torch.zeros(1, 1))


def fitted(family: str, objective: Objective, steps: int) -> Fit:
    """A guide of this family, trained by this objective."""
    torch.manual_seed(0)
    fit = Fit(family)
    pyrovae.fit(
        fit, torch.zeros(1, 1), objective=objective, epochs=steps, batch_size=1, lr=1e-2,
        kl_warmup=0, clip_norm=10, progress=False,
    )  # fmt: skip
    return fit


@torch.no_grad()
def log_densities(fit: Fit, line: Tensor) -> tuple[Tensor, Tensor]:
    """Log p and log q on the grid, shape `(len(line), len(line))`, z1 first."""
    z, size = torch.cartesian_prod(line, line), (len(line), len(line))
    log_q = torch.cat([fit.q().log_prob(part[:, None])[:, 0] for part in z.float().split(20_000)])
    return target(line.dtype).log_prob(z).reshape(size), log_q.double().reshape(size)


def kls(fit: Fit, line: Tensor) -> dict[str, float]:
    """Both KLs by sums over the grid, nats, and what the guide has of its mass there."""
    log_p, log_q = log_densities(fit, line)
    area = float(line[1] - line[0]) ** 2
    p, q = log_p.exp() * area, log_q.exp() * area
    return {
        "KL(q || p)": float((q * (log_q - log_p)).sum()),
        "KL(p || q)": float((p * (log_p - log_q)).sum()),
        "mass": float(q.sum()),
        "left_of_0": float(q[line < 0].sum()),
    }


def best_kl(line: Tensor) -> float:
    """KL(p || q) of the normal that has the target's moments: no normal has a smaller one."""
    mean, cov = moments()
    z, area = torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2
    log_p = target(line.dtype).log_prob(z)
    log_q = MultivariateNormal(mean.double(), cov.double()).log_prob(z)
    return float((log_p.exp() * (log_p - log_q)).sum()) * area


def moments() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the target."""
    mean = WEIGHTS @ LOCS
    away = LOCS - mean
    between = away[:, :, None] * away[:, None, :]
    return mean, (WEIGHTS[:, None, None] * (COVS + between)).sum(0)


def kl_normals(q: MultivariateNormal, p: MultivariateNormal) -> Tensor:
    r"""KL(q || p) between normals, written out.

    .. math:: \tfrac12 \left( \operatorname{tr} S_p^{-1} S_q + (m_p - m_q)^\top S_p^{-1}
        (m_p - m_q) - D + \log \frac{|S_p|}{|S_q|} \right)
    """
    inverse, away = torch.linalg.inv(p.covariance_matrix), p.loc - q.loc
    trace = (inverse @ q.covariance_matrix).trace()
    log_det = torch.logdet(p.covariance_matrix) - torch.logdet(q.covariance_matrix)
    return (trace + away @ inverse @ away - len(away) + log_det) / 2


def closed_form(draws: int, dim: int = 5) -> list[dict[str, float]]:
    """The KL between two random normals in both directions, three times over."""
    torch.manual_seed(0)
    a, b = torch.randn(2, dim, dim, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    one = MultivariateNormal(torch.randn(dim, dtype=torch.float64), a @ a.T / dim + eye / 2)
    other = MultivariateNormal(torch.randn(dim, dtype=torch.float64), b @ b.T / dim + eye / 2)
    rows = []
    for q, p in ((one, other), (other, one)):
        z = q.sample((draws,))
        log_ratio = q.log_prob(z) - p.log_prob(z)
        rows.append({
            "closed_form": float(kl_normals(q, p)), "torch": float(kl_divergence(q, p)),
            "monte_carlo": float(log_ratio.mean()),
            "std_error": float(log_ratio.std()) / math.sqrt(draws),
        })  # fmt: skip
    return rows


def figure(fits: dict[tuple[str, str], Fit], rows: dict[str, Any]) -> plt.Figure:
    """The target (filled) and each fit (lines), a row per family."""
    drawn, axes = plt.subplots(2, 2, figsize=(5.8, 4.8), layout="constrained", sharex=True)
    line = torch.linspace(-4, 4, 161, dtype=torch.float64)
    for ax, ((family, direction), fit) in zip(axes.flat, fits.items(), strict=True):
        p, q = (log.exp().T for log in log_densities(fit, line))
        levels = torch.tensor([0.01, 0.05, 0.2, 0.5, 0.9])
        ax.contourf(line, line, p, [*(levels * p.max()), p.max()], cmap="Blues", vmin=-p.max() / 2)
        ax.contour(line, line, q, levels * q.max(), colors="C1", linewidths=1)
        nats = rows[family][direction]
        ax.set_title(f"{family} by {direction}\n= {nats[direction]:.3f} nats", fontsize=9)
        ax.set(xlim=(-4, 4), ylim=(-3, 3), aspect="equal")
    for ax in axes[-1]:
        ax.set_xlabel("$z_1$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$z_2$")
    handles = [
        Patch(color="C0", alpha=0.6, label="target p(z)"),
        Line2D([], [], color="C1", label="fit q(z)"),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def report(found: dict[str, Any]) -> str:
    """Each number beside the one expected."""
    keys = "KL(q || p)", "KL(p || q)", "left_of_0"
    fits = [
        [family, direction, *(f"{row[key]:.3f}" for key in keys)]
        for family, by in found["fits"].items()
        for direction, row in by.items()
    ]
    lines = [
        markdown(["q", "fitted by", *keys[:2], "mass at z1 < 0 (target 0.6)"], fits),
        f"\none mode costs -log w = {found['minus_log_weight']:.3f}",
        f"the normal with the target's moments has KL(p || q) = {found['best_normal']:.3f}",
    ]
    for name in ("mean", "covariance"):
        values = (torch.tensor(found[key]).flatten().tolist() for key in (name, f"target_{name}"))
        fitted, expected = ([round(v, 3) for v in each] for each in values)
        lines.append(f"{name} by KL(p || q): {fitted} (target: {expected})")
    lines += [
        f"KL between normals: {row['closed_form']:.4f}, torch's {row['torch']:.4f}, "
        f"Monte Carlo {row['monte_carlo']:.4f} ({row['std_error']:.4f})"
        for row in found["closed_form"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Fit each family in each direction, measure both KLs, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "kl_directions.json"
    draws = 1000 if asked.smoke else 1_000_000
    line = torch.linspace(-8, 8, 81 if asked.smoke else 321, dtype=torch.float64)
    fits = {
        (family, direction): fitted(family, objective, 20 if asked.smoke else STEPS[family])
        for family in FAMILIES
        for direction, objective in DIRECTIONS.items()
    }
    rows: dict[str, Any] = {family: {} for family in FAMILIES}
    for (family, direction), fit in fits.items():
        rows[family][direction] = kls(fit, line)
        print(family, direction, rows[family][direction], flush=True)
    mean, cov = moments()
    q = fits["FullRankNormal", "KL(p || q)"].q()
    found = {
        "fits": rows, "minus_log_weight": -math.log(float(WEIGHTS.max())),
        "best_normal": best_kl(line), "mean": q.mean[0].tolist(), "target_mean": mean.tolist(),
        "covariance": q.covariance_matrix[0].tolist(), "target_covariance": cov.tolist(),
        "closed_form": closed_form(draws), "draws": draws, "steps": STEPS,
        "num_particles": {name: o.num_particles for name, o in DIRECTIONS.items()}, "seed": 0,
        "made_by": made_by(),
    }  # fmt: skip
    write_json(file, found)
    _results.save_figure(figure(fits, rows), file.with_suffix(".png"))
    print(report(found))


if __name__ == "__main__":
    main()
