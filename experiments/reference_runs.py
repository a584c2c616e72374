"""What do the defaults reach on each data set?

Question: which test log p(x) does `pyrovae train --data NAME` end at, in what time and memory?
Command:  python experiments/reference_runs.py --data-root DATA
Hardware: two cores, no GPU; about eight minutes for all, half of it log p(x).
Expected: on MNIST (dynamic binarization, 50,000 / 10,000 / 10,000) -89.5 nats or better after 50
          epochs. One stochastic layer of the same size reaches -86.8 after 3,280 epochs (Burda et
          al., 2016, Table 1).

Writes experiments/results/reference_runs.json, a row per run as soon as it is there, and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import _results

from pyrovae.runs import write_json

FIGURES = ("reconstructions", "samples")
ROWS = {
    "digits": "",
    "mnist": "--epochs 50",
    "binarized-mnist": "--epochs 50 --num-particles 1000",
    "fashion-mnist": "--epochs 50 --num-particles 1000",
    "omniglot": "--epochs 50 --num-particles 1000",
    "frey-faces": "--likelihood Normal --likelihood.scale per-pixel --clip-norm 100",
}
SMOKE = "--epochs 2 --num-particles 10"


def run(name: str, data_root: str | None, smoke: bool, results: Path) -> dict:
    """Run the command, as a user would; read its run folder, and keep its first figures."""
    flags = ["--data", name, *(SMOKE if smoke else ROWS[name]).split()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        root = ["--data-root", data_root] if data_root else []
        command = [sys.executable, "-m", "pyrovae.cli", "train", *flags]
        cold = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}  # compiling counts
        subprocess.run([*command, *root, "--out", str(out)], check=True, env=cold)
        summary = json.loads((out / "summary.json").read_text())
        log_px = json.loads((out / "log_px.json").read_text())
        settings = json.loads((out / "config.json").read_text())["settings"] | {"data_root": None}
        for figure in FIGURES:
            shutil.copy(out / "figures" / f"{figure}.png", results / f"{name}-{figure}.png")
    return {
        "command": " ".join(["pyrovae train", *flags]),
        **log_px,
        **summary,
        "settings": settings,
    }


def table(rows: dict[str, dict]) -> str:
    """The rows as README shows them."""
    lines = [
        "| command | log p(x) ≥ | K | Monte Carlo error | test-set error | bits/dim | k-hat > 0.7 "
        "| training | in all | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['command']}` | {row['mean']:.2f} | {row['num_particles']:,} "
        f"| {row['mean_std_error']:.3f} "
        f"| {row['test_std_error']:.2f} | {row['bits_per_dim']:.3f} "
        f"| {row['khat_above_0.7'] / row['num_data']:.0%} | {row['train_seconds']:.0f} s "
        f"| {row['seconds']:.0f} s | {row['peak_memory_mb']:.0f} MB |"
        for row in (rows[name] for name in ROWS if name in rows)
    ]
    return "\n".join(lines)


def main() -> None:
    """Run each data set asked for, and keep the rows of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--data-root", help="folder with the data sets' files")
    _results.add_flags(parser)
    asked = parser.parse_args()
    file = _results.folder(asked) / "reference_runs.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name in ["digits"] if asked.smoke else asked.data:
        rows[name] = run(name, asked.data_root, asked.smoke, file.parent)
        write_json(file, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
