"""How long is a step that sums a label out, here and elsewhere?

Question: for a semi-supervised VAE whose batch has no labels, what does a step cost that sums ten
          classes: in pyrovae, in torch by hand (eager and compiled), in Pyro's TraceEnum_ELBO under
          SVI, on a program as one writes it and on pyrovae's own?
Command:  python experiments/benchmarks/labels.py --data-root DATA
Hardware: two cores, no GPU; about two minutes.
Expected: three times as fast as Pyro, and as torch by hand, compiled. Products take most of the
          time where the processor has no AVX-512: there it is a quarter faster.

The networks are 784-500-50 with ReLU, one hidden layer each for q(y|x), q(z|x, y) and p(x|y, z).
Peers run interleaved in one process; figures are medians. Writes
experiments/results/benchmark_labels.json, or benchmark_labels-avx2.json where AVX2 is all there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import _clock
import pyro
import pyro.distributions as dist
import torch
from _peers import LR, Peer, fitting
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, softplus

from pyrovae import Classifier, SemiSupervisedVAE, guides, likelihoods, nets, priors
from pyrovae.objectives import SemiSupervised
from pyrovae.runs import write_json

BATCH, HIDDEN, LATENTS, CLASSES, PIXELS = 128, 500, 50, 10, 784
BASELINE = "torch by hand, compiled"


def vae() -> SemiSupervisedVAE:
    """Ours."""
    net = nets.MLP((HIDDEN,), activation="relu")
    return SemiSupervisedVAE(
        priors.StandardNormal(LATENTS),
        likelihoods.Bernoulli((PIXELS,), LATENTS + CLASSES, net),
        guides.Normal((PIXELS + CLASSES,), LATENTS, net),
        Classifier((PIXELS,), CLASSES, net),
    )


def ours(x: Tensor, compile: bool = True, top_k: int | None = None) -> Peer:
    """`fit`, an epoch at a time."""
    return fitting(vae(), SemiSupervised(top_k=top_k), x, BATCH, compile)


class ByHand(nn.Module):
    """Networks and bound, as one writes them without a library."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = network(PIXELS, CLASSES)
        self.encoder = network(PIXELS + CLASSES, 2 * LATENTS)
        self.decoder = network(LATENTS + CLASSES, PIXELS)

    def forward(self, x8: Tensor) -> Tensor:
        """Negative U(x) per datum, nats."""
        x = (torch.rand(x8.shape) < x8 / 255).float()
        log_q = log_softmax(self.classifier(x), -1)
        y = torch.eye(CLASSES)[:, None].expand(-1, len(x), -1)
        rows = x.expand(CLASSES, -1, -1)
        loc, raw = self.encoder(torch.cat([rows, y], -1)).chunk(2, -1)
        scale = softplus(raw)
        z = loc + scale * torch.randn_like(scale)
        logits = self.decoder(torch.cat([z, y], -1))
        log_px = -binary_cross_entropy_with_logits(logits, rows, reduction="none").sum(-1)
        kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
        log_w = (log_px - kl - torch.tensor(CLASSES).log()).T
        return -(log_q.exp() * (log_w - log_q)).sum() / len(x)


def by_hand(x: Tensor, compile: bool = True) -> Peer:
    """A loop over a permutation of data in memory, a fused optimizer."""
    model = ByHand()
    loss: Any = torch.compile(model) if compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def epoch() -> None:
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(x[index]).backward()
            optimizer.step()

    return epoch


class Written(nn.Module):
    """The same in Pyro, as its documentation has it: a one-hot label, enumerated."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = ByHand()

    def model(self, x: Tensor) -> None:
        """p(y) p(z) p(x|y, z)."""
        pyro.module("written", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(CLASSES)))
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            logits = self.networks.decoder(joined(z, y))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    @config_enumerate(expand=True)
    def guide(self, x: Tensor) -> None:
        """q(y|x) q(z|x, y)."""
        pyro.module("written", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.networks.classifier(x)))
            loc, raw = self.networks.encoder(joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))


def by_pyro(x: Tensor, make: Peer) -> Peer:
    """Pyro's SVI with TraceEnum_ELBO on data in memory."""
    made = make()
    svi = SVI(
        made.model, made.guide, pyro.optim.Adam({"lr": LR}), TraceEnum_ELBO(max_plate_nesting=1)
    )

    def epoch() -> None:
        with pyro.validation_enabled(False):
            for index in torch.randperm(len(x)).split(BATCH):
                pixels = x[index]
                svi.step((torch.rand(pixels.shape) < pixels / 255).float())

    return epoch


def network(inputs: int, outputs: int) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Side by side, broadcast."""
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*lead, -1), b.expand(*lead, -1)], -1)


PEERS: dict[str, Callable[[Tensor], Peer]] = {
    BASELINE: by_hand,
    "torch by hand, eager": partial(by_hand, compile=False),
    "pyrovae": ours,
    "pyrovae, eager": partial(ours, compile=False),
    "pyrovae, the two most probable classes": partial(ours, top_k=2),
    "Pyro's TraceEnum_ELBO": partial(by_pyro, make=Written),
    "Pyro's TraceEnum_ELBO on pyrovae's program": partial(by_pyro, make=vae),
}


def table(found: dict[str, Any]) -> str:
    """The figures as README shows them."""
    ms = found["ms_per_step"]
    lines = ["| a label of ten classes summed out | ms per step | pyrovae / it |", "|---|---|---|"]
    lines += [f"| {name} | {t:.1f} | {ms['pyrovae'] / t:.2f} |" for name, t in ms.items()]
    return "\n".join(lines)


def main() -> None:
    """Time all peers."""
    asked = _clock.parser(__doc__).parse_args()
    if asked.smoke:
        asked.repetitions = 1
    torch.manual_seed(0)
    count = BATCH * (2 if asked.smoke else 40)
    x = _clock.pixels(asked.data_root, count)
    peers = _clock.built({name: partial(make, x) for name, make in PEERS.items()})
    seconds = _clock.interleaved(peers, asked.repetitions)
    steps = count // BATCH
    found = {
        "ms_per_step": {name: 1000 * value / steps for name, value in seconds.items()},
        "setting": {"batch": BATCH, "hidden": HIDDEN, "latents": LATENTS, "classes": CLASSES},
        "repetitions": asked.repetitions,
        "environment": _clock.environment(),
    }
    suffix = "-avx2" if found["environment"]["instructions"] == "AVX2" else ""
    write_json(_clock.results_file(asked, f"benchmark_labels{suffix}"), found)
    print(json.dumps(found["ms_per_step"], indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
