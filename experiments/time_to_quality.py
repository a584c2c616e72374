"""How many minutes to which log p(x)?

Question: with one layer of 50 latents and networks of 200-200, how long until the test log p(x) of
          dynamically binarized MNIST is -88.0, -87.5 and -87.0; how long in plain Pyro?
Command:  python experiments/time_to_quality.py --data-root DATA
Hardware: two cores, no GPU; about half an hour, most of it plain Pyro's.
Expected: the same log p(x) in less than half of plain Pyro's time. After 3,280 epochs it is -86.8
          (Burda et al., 2016, Table 1, whose units are tanh).

A learning rate that falls to nothing is worth more than epochs at a high one, so each length is a
run of its own, from its first step to its end. Training is timed with all that belongs to it:
compiling, validation, the choice of the best epoch. Plain Pyro is `SVI` with `Trace_ELBO`, a loader
and the same network, optimizer, schedule and warm-up. K = 5,000, all test data; a target counts as
reached by the shortest run that is there. Writes experiments/results/time_to_quality.json and .png.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _swap import one
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import pyrovae
from pyrovae import data
from pyrovae.options import SCHEDULES
from pyrovae.runs import made_by, write_json

LENGTHS = (50, 100, 200)
TARGETS = (-88.0, -87.5, -87.0)
LATENTS, HIDDEN, BATCH, LR, WARM_UP = 50, 200, 128, 4e-3, 4
FLAGS = f"--data mnist --batch-size {BATCH} --lr {LR} --compile true"


class PlainPyro(nn.Module):
    """The model as one writes it with Pyro alone."""

    def __init__(self, mean: Tensor):
        super().__init__()
        self.encoder = _mlp(len(mean), 2 * LATENTS)
        self.decoder = _mlp(LATENTS, len(mean))
        self.decoder[-1].bias.data = torch.logit(mean.clamp(1e-3, 1 - 1e-3))

    def model(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """q(z | x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=kl_weight):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-4).to_event(1))


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, outputs),
    )  # fmt: skip


def plain_pyro(epochs: int, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Train with SVI and score."""
    dataset = data.load("digits" if asked.smoke else "mnist", asked.data_root)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    grey = dataset.train.data.flatten(1) / dataset.train.data.max()
    start = time.perf_counter()
    net = PlainPyro(grey.mean(0))
    rate = SCHEDULES["one-cycle"]
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LR},
            "lr_lambda": lambda epoch: rate(epoch / epochs),
        }
    )
    svi = pyro.infer.SVI(net.model, net.guide, optimizer, pyro.infer.Trace_ELBO())
    loader = DataLoader(TensorDataset(grey), BATCH, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        kl_weight = min(1.0, (epoch + 0.5) / (epochs // WARM_UP or 1))
        for (x,) in loader:
            svi.step(torch.bernoulli(x), kl_weight)
        optimizer.step()
    trained = time.perf_counter() - start
    test = dataset.test[slice(0, asked.num_test)].flatten(1)
    found = pyrovae.log_px(net.model, net.guide, test, asked.num_particles, seed=0).summary()
    return {"log_px": found["mean"], "train_seconds": trained, "made_by": made_by()}


def ours(epochs: int, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Train as `pyrovae train` does, and score."""
    flags = f"{FLAGS} --epochs {epochs} --kl-warmup {epochs // WARM_UP}"
    small = " --data digits --batch-size 50" if asked.smoke else ""
    return {"command": f"pyrovae train {flags}"} | one(flags + small, seed, asked)


WAYS = {"pyrovae": ours, "plain Pyro": plain_pyro}


def table(found: dict[str, Any]) -> str:
    """Minutes to each target as README shows them."""
    lines = ["| test log p(x) ≥ | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for target in TARGETS:
        cells = []
        for runs in found.values():
            there = [(int(n), run) for n, run in runs.items() if run["log_px"] >= target]
            if there:
                epochs, run = min(there)
                cells.append(
                    f"{run['train_seconds'] / 60:.1f} min ({epochs} epochs, {run['log_px']:.2f})"
                )
            else:
                cells.append(f"not in {max(map(int, runs))} epochs")
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> plt.Figure:
    """Log p(x) by minutes of training."""
    made, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for i, (way, runs) in enumerate(found.items()):
        minutes = [run["train_seconds"] / 60 for run in runs.values()]
        axis.plot(minutes, [run["log_px"] for run in runs.values()], f"C{1 - i}o-", label=way)
        for epochs, x, run in zip(runs, minutes, runs.values(), strict=True):
            axis.annotate(f"{epochs}", (x, run["log_px"]), (0, -12), textcoords="offset points")
    for target in TARGETS:
        axis.axhline(target, color="0.8", linewidth=0.7, zorder=0)
    axis.set(
        xlim=(0, None), xlabel="minutes of training (labels: epochs)", ylabel="test log p(x) ≥"
    )
    axis.margins(x=0.1)
    axis.legend(frameon=False)
    return made


def main() -> None:
    """Run each way and length that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with MNIST")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-test", type=int, default=10_000)
    parser.add_argument("--num-particles", type=int, default=5000)
    _results.add_flags(parser)
    asked = parser.parse_args()
    if asked.smoke:
        asked.lengths, asked.num_test, asked.num_particles = (1,), 10, 10
    file = _results.folder(asked) / "time_to_quality.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for way in asked.ways:
        runs = found.setdefault(way, {})
        for epochs in asked.lengths:
            if str(epochs) not in runs:
                runs[str(epochs)] = WAYS[way](epochs, asked.seed, asked)
                found[way] = runs = {n: runs[n] for n in sorted(runs, key=int)}
                print(way, epochs, runs[str(epochs)], flush=True)
                write_json(file, found)
    figure(found).savefig(file.with_suffix(".png"), dpi=150)
    print(table(found))


if __name__ == "__main__":
    main()
