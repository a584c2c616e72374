"""What the swap experiments share: train each row with each seed, score it, tabulate, draw.

A row is a handful of `pyrovae train` flags. Each (row, seed) is written as soon as it is there, and
one that is there already is left out, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import pyrovae
from pyrovae import _flags, evidence
from pyrovae._train import Settings, build, load_data, options
from pyrovae.runs import made_by, write_json

RESULTS = Path(__file__).parent / "results"
SMOKE = "--data digits --epochs 1 --latent-dim 4"


def main(
    script: str,
    rows: dict[str, str],
    common: str,
    *,
    baseline: str | None = None,
    once: Sequence[str] = (),
    num_particles: int = 1000,
) -> None:
    """Run a swap experiment from the command line.

    Args:
        script: `__file__` of the experiment; the results have its name.
        rows: Flags of each row, by label.
        common: Flags of all rows.
        baseline: Label of the row that the figure draws a line at.
        once: Labels of the slow rows, which are run with the first seed only.
        num_particles: Particles of log p(x) unless asked otherwise.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=f"See the docstring of {name}.py.")
    parser.add_argument("--data-root", help="folder with the data sets' files")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-test", type=int, default=2000, help="test data scored")
    parser.add_argument("--num-particles", type=int, default=num_particles)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--smoke", action="store_true", help="seconds, offline: two rows")
    asked = parser.parse_args()
    if asked.smoke:
        asked.rows, asked.seeds, asked.num_test, asked.num_particles = asked.rows[:2], 1, 20, 10
    asked.results.mkdir(exist_ok=True)
    file = asked.results / f"{name}.json"
    found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for label in asked.rows:
        flags = " ".join([common, rows[label], *[SMOKE] * asked.smoke])
        entry = found.setdefault(label, {"command": f"pyrovae train {flags}", "runs": {}})
        for seed in range(1 if label in once else asked.seeds):
            if str(seed) in entry["runs"]:
                continue
            entry["runs"][str(seed)] = one(flags, seed, asked)
            write_json(file, {k: found[k] for k in rows if k in found})
            print(label, seed, entry["runs"][str(seed)], flush=True)
    figure(found, baseline).savefig(asked.results / f"{name}.png", dpi=150)
    print(table(found))


def one(flags: str, seed: int, asked: argparse.Namespace) -> dict:
    """Train and score one row with one seed."""
    start = time.perf_counter()
    settings = Settings(**_flags.parse("train", Settings, shlex.split(flags)))
    settings = replace(settings, seed=seed, data_root=asked.data_root)
    dataset = load_data(settings)
    vae, objective = build(settings, dataset)
    history = pyrovae.fit(
        vae, dataset.train, valid=dataset.valid, objective=objective, progress=False,
        **asdict(options(settings)),
    )  # fmt: skip
    trained = time.perf_counter() - start
    test = dataset.test.subset(slice(0, asked.num_test))
    bound = pyrovae.elbo(vae.model, vae.guide, test, num_particles=10, seed=0) + test.log_det
    result = pyrovae.log_px(vae.model, vae.guide, test, asked.num_particles, seed=0).summary()
    latents = evidence.latents(vae.model, vae.guide, test, seed=0).summary()
    seconds = [row["seconds"] for row in history]
    return {
        "log_px": result["mean"],
        "mean_std_error": result["mean_std_error"],
        "test_std_error": result["test_std_error"],
        "bits_per_dim": result["bits_per_dim"],
        "khat_above_0.7": result["khat_above_0.7"] / result["num_data"],
        "num_particles": result["num_particles"],
        "num_data": result["num_data"],
        "data": result["data"],
        "elbo": float(bound.mean()),
        "latents": latents,
        "weights": sum(p.numel() for p in vae.parameters()),
        "seconds_per_epoch": statistics.median(seconds[1:] or seconds),
        "train_seconds": trained,
        "seconds": time.perf_counter() - start,
        "made_by": made_by(),
    }


def table(found: dict[str, dict]) -> str:
    """The rows as README shows them: means over seeds, with the seeds' standard error."""
    lines = [
        "| | log p(x) ≥ | over seeds | ELBO | active units | k-hat > 0.7 | s / epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, entry in found.items():
        runs = list(entry["runs"].values())
        lines.append(
            f"| `{label}` | {_mean(runs, 'log_px'):.2f} | {_spread(runs)} "
            f"| {_mean(runs, 'elbo'):.2f} | {_active(runs)} "
            f"| {_mean(runs, 'khat_above_0.7'):.0%} | {_quickest(runs):.1f} |"
        )
    return "\n".join(lines)


def figure(found: dict[str, dict], baseline: str | None) -> plt.Figure:
    """Log p(x) and ELBO of each row and seed; beside it, seconds per epoch."""
    labels = list(found)
    size = (9, 1.2 + 0.35 * len(labels))
    made, (left, right) = plt.subplots(
        1, 2, figsize=size, sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    for y, label in enumerate(labels):
        runs = list(found[label]["runs"].values())
        values, bounds = [r["log_px"] for r in runs], [r["elbo"] for r in runs]
        left.plot([_mean(runs, "elbo"), _mean(runs, "log_px")], [y, y], color="0.8", zorder=1)
        left.scatter(bounds, [y] * len(runs), color="C0", marker="|", label="ELBO" * (y == 0))
        left.scatter(values, [y] * len(runs), color="C1", s=14, label="log p(x) ≥" * (y == 0))
        right.barh(y, _quickest(runs), color="0.7")
    if baseline in found:
        runs = list(found[baseline]["runs"].values())
        left.axvline(_mean(runs, "log_px"), color="C1", linewidth=0.7, linestyle=":")
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.set_xlabel("nats per test datum")
    right.set_xlabel("seconds per epoch")
    left.legend(loc="lower left", frameon=False)
    return made


def _mean(runs: list[dict], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _quickest(runs: list[dict]) -> float:
    """Seconds per epoch of the seed that had the machine most to itself."""
    return min(run["seconds_per_epoch"] for run in runs)


def _spread(runs: list[dict]) -> str:
    if len(runs) < 2:
        return "one seed"
    values = torch.tensor([run["log_px"] for run in runs], dtype=torch.float64)
    return f"± {float(values.std()) / len(runs) ** 0.5:.2f} ({len(runs)})"


def _active(runs: list[dict]) -> str:
    active = [run["latents"]["active_units"] for run in runs]
    return f"{statistics.fmean(active):.0f}" if None not in active else "-"
