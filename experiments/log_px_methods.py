"""Which estimate of log p(x) is nearest the truth, for the seconds that it takes?

Question: on one VAE of MNIST, how far below a long annealed run are importance sampling, with
          proposals of all kinds, and annealing from the guide or the prior?
Command:  python experiments/log_px_methods.py --data-root DATA
Hardware: two cores, no GPU; about an hour, ten minutes of it for the largest K.
Expected: annealing in 100 steps from the guide is nearer than 100,000 particles, as in table 1 of
          Wu et al. (2017), arXiv:1611.04273; within 0.1 nats in a tenth of the time in which
          importance sampling comes nearest.

The VAE is that of `pyrovae train --data mnist --epochs 50`, trained first; the 1,000 test images
are drawn by seed 0. The reference is annealing from the guide in 1,000 steps of
5 leapfrog steps with 16 chains. Each row is written to experiments/results/log_px_methods.json as
it is there; a run that was stopped goes on. Seconds include compiling and tuning.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _training import fitted

import pyrovae
from pyrovae import evidence
from pyrovae.evidence import Annealed, Importance, LogPx
from pyrovae.runs import made_by, write_json

TRAINING = "--data mnist --epochs 50 --compile true"
SMALL = "--data digits --epochs 1 --latent-dim 4"

REFERENCE = Annealed(1000, num_leapfrog=5)

ROWS: dict[str, dict[str, tuple[Any, int]]] = {
    "importance sampling": {
        f"K = {k:,}": (Importance(), k) for k in (1, 10, 100, 1000, 5000, 20_000, 100_000, 250_000)
    },
    "other proposals, K = 5,000": {
        "widened 1.1": (Importance(widen=1.1), 5000),
        "widened 1.2": (Importance(widen=1.2), 5000),
        "widened 1.3": (Importance(widen=1.3), 5000),
        "a tenth from the prior": (Importance(defensive=0.1), 5000),
        "Sobol points": (Importance(sobol=True), 5000),
        "Pareto-smoothed": (Importance(smooth=True), 5000),
        "guide refined": (Importance(), 5000),
    },
    "annealed from the guide": {
        f"{t:,} steps": (Annealed(t), 16) for t in (10, 30, 100, 300)
    },
    "as Wu et al., 10 leapfrog steps": {
        f"{t:,} steps": (Annealed(t, num_leapfrog=10), 16) for t in (10, 30, 100)
    },
    "annealed from the guide refined": {
        f"{t:,} steps": (Annealed(t), 16) for t in (10, 30, 100)
    },
    "annealed from the prior": {
        f"{t:,} steps": (Annealed(t, start="prior"), 16) for t in (100, 1000)
    },
}  # fmt: skip
"""Methods and K, by what kind they are."""

SMOKE = 50
"""By what a trial of seconds divides particles and steps."""


def estimate(vae: Any, x: Any, method: Any, k: int, refined: bool) -> tuple[LogPx, float]:
    """Estimate, and the seconds that it took."""
    start = time.perf_counter()
    program = (
        evidence.refine(vae.model, vae.guide, x, seed=0) if refined else (vae.model, vae.guide, x)
    )
    result = pyrovae.log_px(*program, k, method=method, seed=1)
    return result, time.perf_counter() - start


def compared(result: LogPx, seconds: float, reference: torch.Tensor) -> dict[str, Any]:
    """How far below the reference, datum by datum."""
    below = reference - result.values
    kept = ("mean", "mean_std_error", "num_particles", "method", "settings", "khat_above_0.7")
    return {
        "seconds": seconds,
        "below_reference": float(below.mean()),
        "below_std_error": float(below.std()) / len(below) ** 0.5,
        "below_95_percent": float(below.quantile(0.95)),
        **{name: result.summary()[name] for name in kept},
    }


def table(found: dict[str, Any]) -> str:
    """Rows as README shows them."""
    lines = [
        "| | | log p(x) ≥ | below the long run | its 95 % | k-hat > 0.7 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, rows in found["rows"].items():
        for i, (label, row) in enumerate(rows.items()):
            high = row["khat_above_0.7"] / found["num_data"]
            tail = (
                f"{high:.0%}" if row["method"] == "importance" and row["num_particles"] > 25 else ""
            )
            lines.append(
                f"| {'' if i else kind} | {label} | {row['mean']:.2f} "
                f"| {row['below_reference']:.3f} ({row['below_std_error']:.3f}) "
                f"| {row['below_95_percent']:.2f} | {tail} | {row['seconds']:.0f} |"
            )
    long = found["reference"]
    lines.append(
        f"| the long run | 1,000 steps of 5 | {long['mean']:.2f} | | | | {long['seconds']:.0f} |"
    )
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> plt.Figure:
    """Nats below the long run by seconds."""
    drawn, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for number, (kind, rows) in enumerate(found["rows"].items()):
        x = [row["seconds"] for row in rows.values()]
        y = [row["below_reference"] for row in rows.values()]
        errors = [2 * row["below_std_error"] for row in rows.values()]
        line = "" if "other" in kind else "-"
        axes.errorbar(x, y, errors, fmt=f"o{line}", ms=4, lw=1.2, label=kind, color=f"C{number}")
    axes.set(xscale="log", xlabel="seconds, two cores", ylabel="nats below the long annealed run")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return drawn


def main() -> None:
    """Train, estimate by every method, tabulate, draw."""
    parser = argparse.ArgumentParser(description="See the docstring of log_px_methods.py.")
    parser.add_argument("--data-root", help="folder with the data sets' files")
    parser.add_argument("--num-data", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=list(ROWS), choices=list(ROWS))
    _results.add_flags(parser)
    asked = parser.parse_args()
    if asked.smoke:
        asked.num_data = 10
    file = _results.folder(asked) / "log_px_methods.json"
    vae, dataset, _ = fitted(SMALL if asked.smoke else TRAINING, asked.data_root)
    test = dataset.test
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: asked.num_data]
    x = test.subset(index.sort().values)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not found:
        long = Annealed(1000 // SMOKE, num_leapfrog=2) if asked.smoke else REFERENCE
        result, seconds = estimate(vae, x, long, long.particles, refined=False)
        found = {"reference": result.summary() | {"seconds": seconds}, "rows": {}}
        found |= {"num_data": len(x), "made_by": made_by(), "values": result.values.tolist()}
        write_json(file, found)
    reference = torch.tensor(found["values"], dtype=torch.float64)
    for kind in asked.kinds:
        for label, (method, k) in ROWS[kind].items():
            if label in found["rows"].setdefault(kind, {}):
                continue
            if asked.smoke:
                method, k = shrunk(method, k)
            result, seconds = estimate(vae, x, method, k, "refined" in kind + label)
            found["rows"][kind][label] = compared(result, seconds, reference)
            write_json(file, found)
            print(kind, label, found["rows"][kind][label], flush=True)
    done = found["rows"]
    found["rows"] = {
        kind: {label: done[kind][label] for label in ROWS[kind] if label in done[kind]}
        for kind in ROWS
        if kind in done
    }
    write_json(file, found)
    figure(found).savefig(file.with_suffix(".png"), dpi=150)
    print(table(found))


def shrunk(method: Any, k: int) -> tuple[Any, int]:
    """The same with fewer particles or steps, for a trial of seconds."""
    if not isinstance(method, Annealed):
        return method, -(-k // SMOKE)
    steps = max(2, method.num_distributions // SMOKE)
    return type(method)(**method.settings | {"num_distributions": steps}), 4


if __name__ == "__main__":
    main()
