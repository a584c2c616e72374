"""How much memory does training take, and log p(x)?

Question: what is the peak memory of a process that trains, beside one that does the same in torch
          by hand; does that of log p(x) grow with the particles or the data?
Command:  python experiments/benchmarks/memory.py
Hardware: two cores, no GPU; about one minute.
Expected: training within 1.2 of torch by hand; log p(x) flat in K, and a few times the data in N.

Each figure is the peak resident memory of a process of its own, on 12,800 random images, less that
of one that only imports what it needs and makes the images. Writes
experiments/results/benchmark_memory.json.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import _clock
from _peers import Peer, Setting, by_hand, ours, vae
from torch import Tensor

import pyrovae
from pyrovae._train import peak_memory_mb
from pyrovae.runs import write_json

COUNT = 12_800


def nothing(x: Tensor) -> Peer:
    """What every process needs."""
    import torch._inductor.compile_fx  # noqa: F401  (what compiling imports)

    return lambda: None


def log_px(x: Tensor, num_data: int, num_particles: int) -> Peer:
    """An estimate on binary data."""
    made, seen = vae(Setting(hidden=200)), (x[:num_data] > 127).float()
    return lambda: pyrovae.log_px(made.model, made.guide, seen, num_particles, seed=0)


TASKS = {
    "imports and data": nothing,
    "training, torch by hand, compiled": partial(by_hand, Setting()),
    "training, pyrovae": partial(ours, Setting()),
    "log p(x), 100 data, K = 100": partial(log_px, num_data=100, num_particles=100),
    "log p(x), 100 data, K = 10,000": partial(log_px, num_data=100, num_particles=10_000),
    "log p(x), 10,000 data, K = 100": partial(log_px, num_data=10_000, num_particles=100),
}


def table(found: dict[str, Any]) -> str:
    """Megabytes as README shows them."""
    (start, base), *rows = found["mb"].items()
    lines = [
        "| | peak, MB | beyond imports and data |",
        "|---|---|---|",
        f"| {start} | {base:.0f} | |",
    ]
    lines += [f"| {task} | {base + mb:.0f} | {mb:.0f} |" for task, mb in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure each task in a process of its own."""
    parser = _clock.parser(__doc__)
    parser.add_argument("--task", choices=list(TASKS), help="measure one here, and print it")
    asked = parser.parse_args()
    if asked.task:
        x = _clock.pixels(None, COUNT)
        TASKS[asked.task](x)()
        print(peak_memory_mb())
        return
    mb: dict[str, float] = {}
    for task in list(TASKS)[: 2 if asked.smoke else None]:
        command = [sys.executable, __file__, "--task", task]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        mb[task] = float(done.stdout.split()[-1]) - next(iter(mb.values()), 0.0)
        print(task, f"{mb[task]:.0f} MB", flush=True)
    file = _clock.results_file(asked, "benchmark_memory")
    write_json(file, {"mb": mb, "made_by": _clock.environment()})
    print(table({"mb": mb}))


if __name__ == "__main__":
    main()
