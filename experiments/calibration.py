"""Are the stated errors of log p(x) right, and is p(x) without bias?

Question: over 200 repetitions, by how many of its standard errors is each estimate off?
Command:  python experiments/calibration.py
Hardware: two cores, no GPU; about two minutes; no data needed.
Expected: z-scores with standard deviation 0.8 to 1.25 where k-hat is below 0.5, but for Sobol
          points (to 1.4 from a k-hat of 0.4 on); a mean weight that is p(x) within four errors.

Two programs whose log p(x) is known: probabilistic PCA with two latents and a guide that is off by
0.3 and 1.2 times too wide, and a VAE with two latents, trained for 20 epochs on the digits, by
quadrature. Five data each, 200 repetitions, about 2,000 evaluations a time. Writes
experiments/results/calibration.json.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import _results
import torch
from _training import fitted
from brackets import Linear
from torch import Tensor

import pyrovae
from pyrovae import evidence
from pyrovae.evidence import Annealed, Importance, Method
from pyrovae.runs import made_by, write_json

METHODS: dict[str, tuple[Method, int]] = {
    "importance": (Importance(), 2000),
    "importance, widened 1.2": (Importance(widen=1.2), 2000),
    "importance, a tenth from the prior": (Importance(defensive=0.1), 2000),
    "importance, Sobol points": (Importance(sobol=True), 2048),
    "annealed from the guide": (Annealed(20), 50),
    "annealed from the prior": (Annealed(20, "prior"), 50),
}

NUM_DATA = 5


def judged(program: Any, x: Tensor, truth: Tensor, name: str, repetitions: int) -> dict[str, Any]:
    """Z-scores, and by how many errors the mean weight is off, over repetitions of each datum."""
    method, k = METHODS[name]
    copies = x.repeat(repetitions, *[1] * (x.dim() - 1))
    result = pyrovae.log_px(program.model, program.guide, copies, k, method=method, seed=0)
    off = result.values.reshape(repetitions, -1) - truth
    z = off / result.std_error.reshape(repetitions, -1)
    ratio = off.exp()
    t = (ratio.mean(0) - 1) / ratio.std(0) * math.sqrt(repetitions)
    return {
        "num_particles": k,
        "mean_error": float(off.mean()),
        "std_error": float(result.std_error.mean()),
        "z_std": z.std(0).tolist(),
        "z_mean": float(z.mean()),
        "t": t.tolist(),
        "khat": result.khat.reshape(repetitions, -1).nanmedian(0).values.tolist(),
    }


def table(found: dict[str, Any]) -> str:
    """Rows as README shows them."""
    lines = [
        "| | | standard error | z: standard deviation | bias of p(x), in its errors | k-hat |",
        "|---|---|---|---|---|---|",
    ]
    for problem, rows in found["rows"].items():
        for i, (name, row) in enumerate(rows.items()):
            low, high, worst = min(row["z_std"]), max(row["z_std"]), max(map(abs, row["t"]))
            lines.append(
                f"| {'' if i else problem} | {name} | {row['std_error']:.4f} "
                f"| {low:.2f} to {high:.2f} | at most {worst:.1f} "
                f"| {min(row['khat']):.2f} to {max(row['khat']):.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Judge every method on both programs, tabulate."""
    parser = argparse.ArgumentParser(description="See the docstring of calibration.py.")
    _results.add_flags(parser)
    asked = parser.parse_args()
    repetitions = 10 if asked.smoke else 200
    file = _results.folder(asked) / "calibration.json"
    epochs = 1 if asked.smoke else 20
    vae, dataset, _ = fitted(f"--data digits --latent-dim 2 --epochs {epochs}", None)
    linear = Linear(data_dim=5, latent_dim=2)
    torch.manual_seed(0)
    problems = {
        "linear-Gaussian": (linear, 1.5 * torch.randn(NUM_DATA, 5)),
        "VAE of the digits": (vae, dataset.test[slice(0, NUM_DATA)]),
    }
    found: dict[str, Any] = {"rows": {}, "repetitions": repetitions, "made_by": made_by()}
    for problem, (program, x) in problems.items():
        truth = evidence.exact(program.model, program.guide, x).values
        found["rows"][problem] = {
            name: judged(program, x, truth, name, repetitions) for name in METHODS
        }
        write_json(file, found)
    print(table(found))


if __name__ == "__main__":
    main()
