"""How long is a training step on a GPU, and a particle of log p(x)?

Question: with data on the device and the same network, what does a step cost in pyrovae, whose step
          is one CUDA graph, and in torch by hand (eager, compiled, compiled with CUDA graphs); how
          many particles of log p(x) come in a second, and what memory does each take?
Command:  python experiments/benchmarks/gpu.py --data-root DATA
Hardware: a GPU; about ten minutes.
Expected: a step at most that of torch by hand with CUDA graphs.

Peers run interleaved in one process; figures are medians. Writes
experiments/results/benchmark_gpu.json.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import _clock
import torch
from _peers import Peer, Setting, by_hand, ours, vae
from torch import Tensor

import pyrovae
from pyrovae.runs import write_json

SETTINGS = {
    "standard": Setting(),
    "small": Setting(batch=16, hidden=100),
    "large batch": Setting(batch=4096),
    "wide": Setting(hidden=4000),
}
PEERS = {
    "torch by hand, compiled, CUDA graphs": partial(by_hand, mode="reduce-overhead"),
    "torch by hand, compiled": by_hand,
    "torch by hand, eager": partial(by_hand, compile=False),
    "pyrovae": ours,
    "pyrovae, eager": partial(ours, compile=False),
    "torch by hand, compiled, CUDA graphs, bf16": partial(
        by_hand, mode="reduce-overhead", bf16=True
    ),
    "pyrovae, bf16": partial(ours, precision="bf16-mixed"),
}
BASELINE = next(iter(PEERS))
PARTICLES = (100, 5000)


def compare(setting: Setting, x: Tensor, repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds per step and peak MiB of every peer."""
    makers: dict[str, Any] = {peer: partial(make, setting, x) for peer, make in PEERS.items()}
    peers: dict[str, Peer] = _clock.built(makers)
    seconds = _clock.interleaved(peers, repetitions)
    steps, mb = len(x) // setting.batch, {}
    for name, peer in peers.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer()
        mb[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms_per_step": {n: 1000 * s / steps for n, s in seconds.items()}, "mb": mb}


def log_px(x: Tensor, num_particles: int) -> dict[str, float]:
    """Microseconds per particle, and peak MiB."""
    made, seen = vae(Setting(hidden=200)).to(x.device), (x[:1000] > 127).float()
    run = partial(pyrovae.log_px, made.model, made.guide, seen, num_particles, seed=0)
    run()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    us = 1e6 * (time.perf_counter() - start) / len(seen) / num_particles
    return {"us_per_particle": us, "mb": torch.cuda.max_memory_allocated() / 2**20}


def table(found: dict[str, Any]) -> str:
    """Steps as README shows them."""
    kinds = list(found["steps"])
    lines = [
        "| ms per step | " + " | ".join(found["steps"][k]["title"] for k in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for peer in PEERS:
        cells = []
        for kind in kinds:
            ms = found["steps"][kind]["ms_per_step"]
            cells.append(f"{ms[peer]:.3f} ({ms[peer] / ms[BASELINE]:.2f})")
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    lines += ["", "| log p(x), 1,000 data | us per particle | MB |", "|---|---|---|"]
    lines += [
        f"| K = {k} | {row['us_per_particle']:.3f} | {row['mb']:.0f} |"
        for k, row in found["log_px"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Time every setting, then log p(x)."""
    asked = _clock.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here that torch can use")
    settings = {"standard": SETTINGS["standard"]} if asked.smoke else SETTINGS
    file = _clock.results_file(asked, "benchmark_gpu")
    x = _clock.pixels(asked.data_root, 50_000).cuda()
    found: dict[str, Any] = {"steps": {}, "made_by": _clock.environment()}
    for name, setting in settings.items():
        found["steps"][name] = {
            "title": str(setting),
            **compare(setting, x, asked.repetitions),
        }
        print(name, found["steps"][name]["ms_per_step"], flush=True)
        write_json(file, found)
    found["log_px"] = {str(k): log_px(x, k) for k in PARTICLES}
    write_json(file, found | {"gpu": torch.cuda.get_device_name()})
    print(table(found))


if __name__ == "__main__":
    main()
