"""How long is a training step, and an epoch, here and elsewhere?

Question: with the same network, data, batch and optimizer, what does a step cost in pyrovae, in
          torch by hand (eager and compiled), Pyro's SVI, NumPyro's jitted loop and pythae; what an
          epoch with the data path that each documents?
Command:  python experiments/benchmarks/train.py --data-root DATA
Needs:    pip install -e ".[benchmarks]" for NumPyro and pythae; without them they are left out.
Hardware: two cores, no GPU; about eight minutes.
Expected: a step in 0.7 of the time of torch by hand, compiled, or less; an epoch in 1.2 times that
          of NumPyro, a quarter of Pyro's SVI with its loader, a third of torch's example.

Peers run interleaved in one process; figures are medians. "Matrix products" is what the network's
products alone cost, forward and backward. Writes experiments/results/benchmark_train.json and .png.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import _clock
import matplotlib.pyplot as plt
import torch
from _peers import EPOCHS, STEPS, Peer, Setting

from pyrovae.runs import write_json

COUNT = 12_800
SETTINGS = {
    "standard": Setting(),
    "small": Setting(batch=16, hidden=100, latents=50),
    "large batch": Setting(batch=1024),
    "wide": Setting(hidden=2000),
    "many latents": Setting(latents=200),
}
BASELINE = "torch by hand, compiled"
PRODUCTS = "matrix products"


def products(setting: Setting, steps: int) -> Peer:
    """The matrix products of a step, so many times."""
    sizes = [
        (setting.pixels, setting.hidden),
        (setting.hidden, 2 * setting.latents),
        (setting.latents, setting.hidden),
        (setting.hidden, setting.pixels),
    ]
    layers = [
        (torch.randn(setting.batch, a), torch.randn(b, a), torch.randn(setting.batch, b))
        for a, b in sizes
    ]

    def run() -> None:
        for _ in range(steps):
            for i, (x, weight, grad) in enumerate(layers):
                x @ weight.T
                grad.T @ x
                if i:
                    grad @ weight

    return run


def compare(name: str, asked: Any, x: torch.Tensor) -> dict[str, Any]:
    """Milliseconds per step of every peer at one setting."""
    setting, steps = SETTINGS[name], len(x) // SETTINGS[name].batch
    peers = _clock.built({peer: partial(make, setting, x) for peer, make in STEPS.items()})
    peers[PRODUCTS] = products(setting, steps)
    seconds = _clock.interleaved(peers, asked.repetitions)
    ms = {peer: 1000 * value / steps for peer, value in seconds.items()}
    return {"setting": asdict(setting), "steps": steps, "ms_per_step": ms}


def compare_epochs(asked: Any, x: torch.Tensor) -> dict[str, Any]:
    """Seconds per epoch of every peer with its own data path."""
    setting = Setting()
    peers = _clock.built({peer: partial(make, setting, x) for peer, make in EPOCHS.items()})
    seconds = _clock.interleaved(peers, min(3, asked.repetitions))
    return {"setting": asdict(setting), "num_data": len(x), "seconds_per_epoch": seconds}


def table(found: dict[str, Any]) -> str:
    """Steps and epochs as README shows them."""
    kinds = list(found["steps"])
    lines = [
        "| ms per step | " + " | ".join(found["steps"][k]["title"] for k in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for peer in [*STEPS, PRODUCTS]:
        cells = []
        for kind in kinds:
            ms = found["steps"][kind]["ms_per_step"]
            ratio = f" ({ms[peer] / ms[BASELINE]:.2f})" if peer in ms else ""
            cells.append(f"{ms[peer]:.2f}{ratio}" if peer in ms else "-")
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    lines += ["", "| epoch of 12,800 images | seconds | pyrovae / it |", "|---|---|---|"]
    epochs = found["epochs"]["seconds_per_epoch"]
    lines += [
        f"| {peer} | {value:.2f} | {epochs['pyrovae'] / value:.2f} |"
        for peer, value in epochs.items()
    ]
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> plt.Figure:
    """A bar for each peer and setting, relative to torch by hand."""
    kinds = list(found["steps"])
    made, axes = plt.subplots(
        1, len(kinds), figsize=(2.2 * len(kinds) + 2, 3.2), sharey=True, layout="constrained"
    )
    peers = [*STEPS, PRODUCTS]
    axes = [axes] if len(kinds) == 1 else axes
    for axis, kind in zip(axes, kinds, strict=True):
        ms = found["steps"][kind]["ms_per_step"]
        there = [peer for peer in peers if peer in ms]
        colors = ["C1" if peer.startswith("pyrovae") else "0.7" for peer in there]
        at = [peers.index(peer) for peer in there]
        axis.barh(at, [ms[peer] / ms[BASELINE] for peer in there], color=colors)
        axis.axvline(1, color="0.3", linewidth=0.7, linestyle=":")
        axis.set_title(found["steps"][kind]["title"], fontsize=8)
    axes[0].set_yticks(range(len(peers)), peers)
    axes[0].invert_yaxis()
    made.supxlabel("time of a step, relative to torch by hand, compiled")
    return made


def main() -> None:
    """Time every setting, then the epochs."""
    parser = _clock.parser(__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    asked = parser.parse_args()
    count = COUNT
    if asked.smoke:
        asked.settings, asked.repetitions, count = asked.settings[:1], 1, 256
    file = _clock.results_file(asked, "benchmark_train")
    x = _clock.pixels(asked.data_root, count)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"steps": {}}
    for name in asked.settings:
        found["steps"][name] = {"title": str(SETTINGS[name]), **compare(name, asked, x)}
        found["made_by"] = _clock.environment()
        print(name, found["steps"][name]["ms_per_step"], flush=True)
    found["epochs"] = compare_epochs(asked, x)
    write_json(file, found)
    figure(found).savefig(file.with_suffix(".png"), dpi=150)
    print(table(found))


if __name__ == "__main__":
    main()
