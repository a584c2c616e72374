"""What do two processes with one thread each give beside one with two?

Question: at the same global batch, what is the throughput of two processes?
Command:  python experiments/benchmarks/processes.py --data-root DATA
Hardware: two cores, no GPU; about three minutes.
Expected: at least 0.85 of that of one process with two threads.

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

FLAGS = (
    "--data mnist --net MLP --net.hidden 400 --net.activation relu --num-particles 1 "
    "--compile true --accelerator cpu"
)


def seconds_per_epoch(devices: int, epochs: int, root: list[str], smoke: bool) -> list[float]:
    """Of one run with so many processes, and two threads in all."""
    env = {**os.environ, "OMP_NUM_THREADS": str(2 // devices)}
    data = ["--data", "digits"] if smoke else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*FLAGS.split(), *data, *root, "--epochs", str(epochs), "--devices", str(devices)]
        command = [sys.executable, "-m", "pyrovae.cli", "train", *words, "--out", str(out)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        return [row["seconds"] for row in Run.open(out).metrics()][1:]


def table(found: dict[str, Any]) -> str:
    """Throughput as README shows it."""
    one, two = found["seconds_per_epoch"]["1"], found["seconds_per_epoch"]["2"]
    return "\n".join(
        [
            "| MNIST, 784-400-50, batch 128 | s / epoch | throughput |",
            "|---|---|---|",
            f"| one process, two threads | {one:.2f} | 1 |",
            f"| two processes, one thread each | {two:.2f} | {one / two:.2f} |",
        ]
    )


def main() -> None:
    """Take turns."""
    asked = _clock.parser(__doc__).parse_args()
    root = ["--data-root", asked.data_root] if asked.data_root else []
    epochs, turns = (2, 1) if asked.smoke else (6, 4)
    times: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(turns):
        for devices in (1, 2):
            times[str(devices)] += seconds_per_epoch(devices, epochs, root, asked.smoke)
    found = {"seconds_per_epoch": {n: median(each) for n, each in times.items()}}
    file = _clock.results_file(asked, "benchmark_processes")
    write_json(file, found | {"command": FLAGS, "made_by": _clock.environment()})
    print(table(found))


if __name__ == "__main__":
    main()
