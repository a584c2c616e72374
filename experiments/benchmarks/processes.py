"""What do two processes with one thread each give beside one with two?

Question: at the same global batch, what is the throughput of two processes?
Command:  python experiments/benchmarks/processes.py --data-root DATA
Hardware: two cores, no GPU; about four minutes.
Expected: a quarter with batches of 128: 2.9 MB of gradients take gloo longer than the step; nine
          tenths with 4,096.

Runs `pyrovae train` in turns with one process and with two, and takes the median over all epochs
but each run's first. Writes experiments/results/benchmark_processes.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import _clock

from pyrovae.runs import Run, write_json

BATCHES = (128, 1024, 4096)
FLAGS = (
    "--data mnist --net MLP --net.hidden 400 --net.activation relu --num-particles 1 "
    "--compile true --accelerator cpu"
)


def seconds_per_epoch(devices: int, flags: list[str]) -> list[float]:
    """Of one run with so many processes, and two threads in all."""
    env = {**os.environ, "OMP_NUM_THREADS": str(2 // devices)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*FLAGS.split(), *flags, "--devices", str(devices), "--out", str(out)]
        command = [sys.executable, "-m", "pyrovae.cli", "train", *words]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        return [row["seconds"] for row in Run.open(out).metrics()][1:]


def table(found: dict[str, Any]) -> str:
    """Throughput as README shows it."""
    lines = [
        "| MNIST, 784-400-50 | one process, s / epoch | two processes, s / epoch | throughput |",
        "|---|---|---|---|",
    ]
    for batch, seconds in found["seconds_per_epoch"].items():
        one, two = seconds["1"], seconds["2"]
        lines.append(f"| batch {int(batch):,} | {one:.2f} | {two:.2f} | {one / two:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Take turns."""
    asked = _clock.parser(__doc__).parse_args()
    root = ["--data-root", asked.data_root] if asked.data_root else []
    epochs, turns, batches = (2, 1, (64,)) if asked.smoke else (6, 2, BATCHES)
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        flags = ["--epochs", str(epochs), "--batch-size", str(batch), *root]
        flags += ["--data", "digits"] if asked.smoke else []
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(turns):
            for devices, seconds in times.items():
                seconds += seconds_per_epoch(devices, flags)
        found[str(batch)] = {str(n): median(each) for n, each in times.items()}
        print(batch, found[str(batch)], flush=True)
    results = {"seconds_per_epoch": found, "command": FLAGS, "made_by": _clock.environment()}
    write_json(_clock.results_file(asked, "benchmark_processes"), results)
    print(table(results))


if __name__ == "__main__":
    main()
