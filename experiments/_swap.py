"""What the swap experiments share: train each row with each seed, score it, tabulate, draw.

A row is a handful of `pyrovae train` flags. Each (row, seed) is written as soon as it is there, and
one that is there already is left out, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import _results
import matplotlib.pyplot as plt
from _training import fitted

import pyrovae
from pyrovae import evidence
from pyrovae.runs import made_by, write_json

SMOKE = "--data digits --epochs 1 --latent-dim 4"


def main(
    script: str,
    rows: dict[str, str],
    common: str,
    *,
    baseline: str | None = None,
    once: Sequence[str] = (),
    num_particles: int = 1000,
    bits: bool = False,
) -> None:
    """Run a swap experiment from the command line.

    Args:
        script: `__file__` of the experiment; the results have its name.
        rows: Flags of each row, by label.
        common: Flags of all rows.
        baseline: Label of the row that the figure draws a line at.
        once: Labels of the slow rows, which are run with the first seed only.
        num_particles: Particles of log p(x) unless asked otherwise.
        bits: Report bits per dimension; the first word of a label is the data set.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=f"See the docstring of {name}.py.")
    parser.add_argument("--data-root", help="folder with the data sets' files")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-test", type=int, default=2000, help="test data scored")
    parser.add_argument("--num-particles", type=int, default=num_particles)
    _results.add_flags(parser)
    asked = parser.parse_args()
    if asked.smoke:
        asked.rows, asked.seeds, asked.num_test, asked.num_particles = asked.rows[:2], 1, 20, 10
    file = _results.folder(asked) / f"{name}.json"
    found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for label in asked.rows:
        flags = " ".join([common, rows[label], *[SMOKE] * asked.smoke])
        entry = {"command": f"pyrovae train {flags}", "num_particles": asked.num_particles}
        entry |= {"num_test": asked.num_test, "runs": {}}
        if label in found and found[label] | {"runs": {}} == entry:
            entry = found[label]
        found[label] = entry
        for seed in range(1 if label in once else asked.seeds):
            if str(seed) in entry["runs"]:
                continue
            entry["runs"][str(seed)] = one(flags, seed, asked)
            write_json(file, {k: found[k] for k in rows if k in found})
            print(label, seed, entry["runs"][str(seed)], flush=True)
    figure(found, baseline, bits).savefig(file.with_suffix(".png"), dpi=150)
    print(table(found, bits))


def one(flags: str, seed: int, asked: argparse.Namespace) -> dict:
    """Train and score one row with one seed."""
    start = time.perf_counter()
    vae, dataset, history = fitted(flags, asked.data_root, seed)
    trained = time.perf_counter() - start
    test = dataset.test.subset(slice(0, asked.num_test))
    bound = pyrovae.elbo(vae.model, vae.guide, test, num_particles=10, seed=0)
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


def table(found: dict[str, dict], bits: bool = False) -> str:
    """The rows as README shows them: means over seeds, with the seeds' standard error."""
    value, bound = ("bits / dim ≤", "by the ELBO") if bits else ("log p(x) ≥", "ELBO")
    lines = [
        f"| | {value} | over seeds | {bound} | active units | k-hat > 0.7 | s / epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, entry in found.items():
        runs = list(entry["runs"].values())
        values, bounds = zip(*(_values(run, bits) for run in runs), strict=True)
        lines.append(
            f"| `{label}` | {fmean(values):.2f} | {_spread(values)} | {fmean(bounds):.2f} "
            f"| {_active(runs)} | {fmean(run['khat_above_0.7'] for run in runs):.0%} "
            f"| {_quickest(runs):.1f} |"
        )
    return "\n".join(lines)


def figure(found: dict[str, dict], baseline: str | None, bits: bool) -> plt.Figure:
    """Log p(x) and ELBO of each row and seed, by data set; beside it, seconds per epoch."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for label, entry in found.items():
        group, name = label.split(", ", 1) if bits else ("", label)
        groups.setdefault(group, {})[name] = list(entry["runs"].values())
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    made, axes = plt.subplots(
        1, len(groups) + 1, figsize=(9, 1.5 + 0.35 * len(names)), sharey=True,
        width_ratios=(*[3 / len(groups)] * len(groups), 1), layout="constrained",
    )  # fmt: skip
    *panels, times = axes
    for axis, (group, rows) in zip(panels, groups.items(), strict=True):
        for name, runs in rows.items():
            y = names.index(name)
            values, bounds = zip(*(_values(run, bits) for run in runs), strict=True)
            axis.plot([fmean(bounds), fmean(values)], [y, y], color="0.8", zorder=1)
            axis.scatter(bounds, [y] * len(runs), color="C0", marker="|", label="ELBO")
            axis.scatter(values, [y] * len(runs), color="C1", s=14, label="log p(x) ≥")
        if baseline in rows:
            axis.axvline(
                fmean(_values(run, bits)[0] for run in rows[baseline]),
                color="C1", linewidth=0.7, linestyle=":",
            )  # fmt: skip
        axis.set_xlabel(f"{group}: bits per dimension" if bits else "nats per test datum")
    height = 0.8 / len(groups)
    for i, (group, rows) in enumerate(groups.items()):
        at = [names.index(name) + (i - (len(groups) - 1) / 2) * height for name in rows]
        seconds = [_quickest(runs) for runs in rows.values()]
        times.barh(at, seconds, height, color=f"{0.7 - 0.3 * i}", label=group or None)
    times.set_xlabel("seconds per epoch")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    more, groups_named = times.get_legend_handles_labels()
    made.legend(
        [*handles[:2], *more], [*labels[:2], *groups_named], loc="outside upper center", ncols=4,
        frameon=False,
    )  # fmt: skip
    return made


def _values(run: dict, bits: bool) -> tuple[float, float]:
    """The estimate and the ELBO, in nats per datum or bits per dimension."""
    unit = run["bits_per_dim"] / run["log_px"] if bits else 1
    return run["log_px"] * unit, run["elbo"] * unit


def _quickest(runs: list[dict]) -> float:
    """Seconds per epoch of the seed that had the machine most to itself."""
    return min(run["seconds_per_epoch"] for run in runs)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one seed"
    return f"± {statistics.stdev(values) / len(values) ** 0.5:.2f} ({len(values)})"


def _active(runs: list[dict]) -> str:
    return f"{fmean(run['latents']['active_units'] for run in runs):.0f}"
