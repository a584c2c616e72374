"""What does a particle of log p(x) cost, here and elsewhere?

Question: on one decoder, 50-200-200-784, what does log p(x) cost per datum and particle in pyrovae,
          in a plain Pyro loop, in NumPyro and in pythae, and what do its matrix products cost?
Command:  python experiments/benchmarks/log_px.py
Needs:    pip install -e ".[benchmarks]" for NumPyro and pythae; without them they are left out.
Hardware: two cores, no GPU; about three minutes.
Expected: 1.2 times torch's matrix products, 2.6 times oneDNN's, and a fifth of pythae's time.

Peers run interleaved in one process on the same weights; figures are medians. Each has as many data
as fill about a second; pyrovae has as many as it compiles for by itself, and the time includes that
of compiling from the cache. All give the same number up to their noise, which is checked.
Writes experiments/results/benchmark_log_px.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import _clock
import pyro
import pyro.distributions as dist
import torch
from _peers import Peer
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyrovae
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.runs import write_json

HIDDEN, LATENTS, PIXELS, PARTICLES = 200, 50, 784, 5000


def networks() -> tuple[nn.Module, nn.Module]:
    """Encoder to mean and scale, decoder to logits; weights small, so that all agree on K."""
    torch.manual_seed(0)
    sizes = [(PIXELS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * LATENTS)]
    back = [(LATENTS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, PIXELS)]
    made = []
    for each in (sizes, back):
        layers: list[nn.Module] = []
        for a, b in each:
            layers += [nn.Linear(a, b), nn.ReLU()]
        made.append(nn.Sequential(*layers[:-1]))
    return made[0], made[1]


def ours(x: Tensor, num_particles: int, compile: bool | None = True) -> Callable[[], float]:
    """`log_px`, with all its diagnostics."""
    encoder, decoder = networks()
    net = nets.MLP((HIDDEN, HIDDEN), activation="relu")
    vae = pyrovae.VAE(
        priors.StandardNormal(LATENTS),
        likelihoods.Bernoulli((PIXELS,), LATENTS, net),
        guides.Normal((PIXELS,), LATENTS, net),
    )
    for part, source in ((vae.encoder, encoder), (vae.likelihood, decoder)):
        own = [m for m in part.net.modules() if isinstance(m, nn.Linear)]
        for layer, given in zip(own, source[::2], strict=True):  # type: ignore[index]
            layer.weight.data = given.weight.data
            (layer.bias if layer.bias is not None else part.net.bias).data = given.bias.data
    estimate = partial(pyrovae.log_px, vae.model, vae.guide, x, num_particles, seed=0)
    return lambda: estimate(compile=compile).mean


def plain_pyro(x: Tensor, num_particles: int) -> Callable[[], float]:
    """A datum at a time, its copies as the rows of a trace, 500 at once."""
    encoder, decoder = networks()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-4).to_event(1))

    @torch.no_grad()
    def run() -> float:
        values = []
        for datum in x:
            log_w = []
            for _ in range(num_particles // 500):
                rows = datum.expand(500, -1)
                q = poutine.trace(guide).get_trace(rows)
                p = poutine.trace(poutine.replay(model, q)).get_trace(rows)
                for trace in (p, q):
                    trace.compute_log_prob()
                log_w.append(
                    p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"] - q.nodes["z"]["log_prob"]
                )
            values.append(torch.cat(log_w).logsumexp(0) - math.log(num_particles))
        return float(torch.stack(values).mean())

    return run


def numpyro_jitted(x: Tensor, num_particles: int) -> Callable[[], float]:
    """Log densities of NumPyro under `vmap` over particles, a datum at a time, jitted."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as npd

    encoder, decoder = networks()
    weights = [
        [(jnp.asarray(m.weight.detach().T.numpy()), jnp.asarray(m.bias.detach().numpy()))
         for m in net[::2]]  # type: ignore[index]
        for net in (encoder, decoder)
    ]  # fmt: skip

    def apply(layers: Any, h: Any) -> Any:
        for i, (weight, bias) in enumerate(layers):
            h = h @ weight + bias
            h = jax.nn.relu(h) if i < len(layers) - 1 else h
        return h

    @jax.jit
    def one(datum: Any, key: Any) -> Any:
        loc, raw = jnp.split(apply(weights[0], datum), 2)
        q = npd.Normal(loc, jax.nn.softplus(raw) + 1e-4).to_event(1)

        def block(key: Any) -> Any:
            z = q.sample(key, (500,))
            log_p = npd.Normal(jnp.zeros(LATENTS), 1.0).to_event(1).log_prob(z)
            log_x = npd.Bernoulli(logits=apply(weights[1], z)).to_event(1).log_prob(datum)
            return log_p + log_x - q.log_prob(z)

        log_w = jax.lax.map(block, jax.random.split(key, num_particles // 500))
        return jax.nn.logsumexp(log_w) - jnp.log(num_particles)

    data = jnp.asarray(x.numpy())

    def run() -> float:
        keys = jax.random.split(jax.random.PRNGKey(0), len(data))
        return float(jnp.stack([one(d, k) for d, k in zip(data, keys, strict=True)]).mean())

    return run


def pythae_nll(x: Tensor, num_particles: int) -> Callable[[], float]:
    """`get_nll` of pythae's VAE, whose encoder gives log variances, 100 particles at once."""
    from _peers import Setting, pythae_model

    encoder, decoder = networks()

    class Shared(nn.Module):
        """The same networks, by the names that the peer expects."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = encoder, decoder
            self.head = LogVariance()

    model = pythae_model(Setting(hidden=HIDDEN, latents=LATENTS), Shared())  # type: ignore[arg-type]
    return torch.no_grad()(lambda: float(model.eval().get_nll(x, num_particles)))


class LogVariance(nn.Module):
    """From mean and raw scale to mean and log variance."""

    def forward(self, h: Tensor) -> Tensor:
        """Shape kept."""
        loc, raw = h.chunk(2, -1)
        return torch.cat([loc, 2 * (softplus(raw) + 1e-4).log()], -1)


def products(x: Tensor, num_particles: int, onednn: bool = False) -> Peer:
    """The decoder's matrix products alone, 800 rows at once."""
    sizes = [(LATENTS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, PIXELS)]
    layers = [(torch.randn(800, a), torch.randn(a, b)) for a, b in sizes]

    def run() -> None:
        for _ in range(len(x) * num_particles // 800):
            for h, weight in layers:
                torch.ops.pyrovae.product(h, weight, None) if onednn else h @ weight

    return run


@dataclass(frozen=True)
class Peered:
    """How a peer is made, and how many data it gets."""

    make: Callable[[Tensor, int], Callable[[], Any]]
    count: int


PEERS = {
    "pyrovae": Peered(ours, 1000),
    "pyrovae, eager": Peered(partial(ours, compile=False), 40),
    "plain Pyro loop": Peered(plain_pyro, 10),
    "NumPyro, jitted": Peered(numpyro_jitted, 20),
    "pythae": Peered(pythae_nll, 4),
    "matrix products, torch's": Peered(products, 80),
    "matrix products, oneDNN's": Peered(partial(products, onednn=True), 80),
}
SIZES = ((100, 100), (100, 1000), (100, 10_000), (1000, 100), (10_000, 100))
"""Data and particles, with which the cost of a particle is measured."""


def scaling(x: Tensor, repetitions: int) -> dict[str, float]:
    """Microseconds per particle by data and particles, compiled or not as `log_px` decides."""
    peers = {
        f"N = {n:,}, K = {k:,}": ours(x.repeat(-(-n // len(x)), 1)[:n], k, compile=None)
        for n, k in SIZES
    }
    seconds = _clock.interleaved(peers, repetitions)
    return {name: 1e6 * s / n / k for (name, s), (n, k) in zip(seconds.items(), SIZES, strict=True)}


def table(found: dict[str, Any]) -> str:
    """Microseconds per particle as README shows them."""
    us = found["us_per_particle"]
    lines = ["| log p(x), 50-200-200-784 | us per particle | it / pyrovae |", "|---|---|---|"]
    lines += [f"| {name} | {us[name]:.1f} | {us[name] / us['pyrovae']:.2f} |" for name in us]
    lines += ["", "| pyrovae | us per particle |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in found["scaling"].items()]
    return "\n".join(lines)


def main() -> None:
    """Check that peers agree, then time them."""
    asked = _clock.parser(__doc__).parse_args()
    particles = PARTICLES
    if asked.smoke:
        particles, asked.repetitions = 1000, 1
    file = _clock.results_file(asked, "benchmark_log_px")
    x = (_clock.pixels(asked.data_root, 1000) > 127).float()
    peers = _clock.built(
        {name: lambda p=p: p.make(x[: p.count], particles) for name, p in PEERS.items()}
    )
    few = {n: PEERS[n].make(x[:4], particles)() for n in peers if "products" not in n}
    spread = max(few.values()) - min(few.values())
    assert spread < 5, f"the peers disagree: {few}"  # nats; the normals' constant alone is 46
    seconds = _clock.interleaved(peers, asked.repetitions)
    us = {n: 1e6 * s / PEERS[n].count / particles for n, s in seconds.items()}
    sizes = {} if asked.smoke else scaling(x, min(3, asked.repetitions))
    found = {"us_per_particle": us, "scaling": sizes, "num_particles": particles, "mean": few}
    write_json(file, found | {"made_by": _clock.environment()})
    print(table(found))


if __name__ == "__main__":
    main()
