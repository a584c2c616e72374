"""Gradient truth: every estimator against a gradient known exactly, eager and traced.

Parameters are arguments with a value for each row, as data have: so every row is a repetition of
its own, and one call gives the mean and the standard error of an estimator's gradient.
"""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import compiled
from pyrovae.objectives import (
    ELBO,
    IWAE,
    MIWAE,
    DReG,
    ReweightedWakeSleep,
    ScoreFunction,
    StickingTheLanding,
)
from pyrovae.program import validation

X = 2.4
PARAMS = {"a": -1.1, "b": 0.5, "c": 1.2, "log_s": 0.3, "u": 0.2, "v": -0.3, "w": -0.8, "log_t": 0.4}
"""Such that no gradient is small beside its noise."""

ORDERS = {"one layer": ("z1",), "z1 then z2": ("z1", "z2"), "z2 then z1": ("z2", "z1")}
FACTOR = 4.5
"""Standard errors that noise keeps within: 7e-6 of tail for each of some two hundred numbers."""


class Linear:
    """z1 ~ N(a, 1), z2 ~ N(c z1, 0.8), x ~ N(b z, s) for the last z; the guide uses b, too.

    Args:
        order: The latents as the guide draws them, one or two.
    """

    def __init__(self, order):
        self.order, self.layers = order, sorted(order)

    @property
    def names(self):
        absent = () if len(self.order) == 2 else ("c", "v", "w")
        return [name for name in PARAMS if name not in absent]

    def p(self, name, z, t):
        if name == "x":
            return dist.Normal(t["b"] * z[self.layers[-1]], t["log_s"].exp())
        return dist.Normal(t["a"], 1.0) if name == "z1" else dist.Normal(t["c"] * z["z1"], 0.8)

    def q(self, name, z, x, t):
        if name == self.order[0]:
            return dist.Normal(t["u"] * t["b"] * x, t["log_t"].exp())
        return dist.Normal(t["v"] * z[self.order[0]] + t["w"] * x, 0.9)

    def model(self, x, *values):
        t, z = dict(zip(self.names, values, strict=True)), {}
        with pyro.plate("data", len(x)):
            for name in self.layers:
                z[name] = pyro.sample(name, self.p(name, z, t))
            pyro.sample("x", self.p("x", z, t), obs=x)

    def guide(self, x, *values):
        t, z = dict(zip(self.names, values, strict=True)), {}
        with pyro.plate("data", len(x)):
            for name in self.order:
                z[name] = pyro.sample(name, self.q(name, z, x, t))

    def densities(self, x, t, noise, detach=False):
        """Log p(x|z), log p(z) and log q(z|x) at z made of standard normal noise."""
        z, log_q = {}, 0.0
        for name, eps in zip(self.order, noise, strict=True):
            q = self.q(name, z, x, t)
            z[name] = q.loc + q.scale * eps
            z[name] = z[name].detach() if detach else z[name]
            log_q = log_q + q.log_prob(z[name])
        log_pz = sum(self.p(name, z, t).log_prob(z[name]) for name in self.layers)
        return self.p("x", z, t).log_prob(x), log_pz, log_q

    def parameters(self):
        values = {name: torch.tensor(PARAMS[name], dtype=torch.float64) for name in self.names}
        return {name: value.requires_grad_() for name, value in values.items()}

    def args(self, count):
        """One datum so many times over, with parameters of its own for each."""
        values = [torch.full((count,), PARAMS[name], dtype=torch.float64) for name in self.names]
        x = torch.full((count,), X, dtype=torch.float64)
        return (x, *(value.requires_grad_() for value in values))


def normal_grid(dims, points):
    """Nodes `(dims, points^dims)` and weights of a quadrature over standard normal noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = torch.tensor(np.array(list(itertools.product(nodes, repeat=dims)))).T
    weight = torch.tensor(np.array(list(itertools.product(weights, repeat=dims)))).prod(1)
    return grid, weight / weight.sum()


def exact(program, k, points, loss):
    """The gradient of an expectation over K draws, by quadrature.

    Args:
        loss: A function of log p(x|z), log p(z), log q(z|x), each `(K, nodes)`.
    """
    layers = len(program.order)
    grid, weight = normal_grid(k * layers, points)
    t = program.parameters()
    noise = grid.unflatten(0, (layers, k))
    value = (weight * loss(program, torch.tensor(X, dtype=torch.float64), t, noise)).sum()
    return torch.stack(torch.autograd.grad(value, list(t.values())))


def bound(weight=1.0):
    """The negative bound on log p(x) of K draws."""

    def loss(program, x, t, noise):
        rest, log_pz, log_qz = program.densities(x, t, noise)
        log_w = rest + weight * (log_pz - log_qz)
        return math.log(len(log_w)) - log_w.logsumexp(0)

    return loss


def wake(weight=1.0, insomnia=1.0):
    """What the reweighted wake phases descend on, importance weights and draws held still."""

    def loss(program, x, t, noise):
        rest, log_pz, log_qz = program.densities(x, t, noise, detach=True)
        w = (rest + weight * (log_pz - log_qz)).detach().softmax(0)
        return -(w * (rest + weight * log_pz + insomnia * log_qz)).sum(0)

    return loss


def asleep(program):
    """The gradient of E[-log q(z|x)] over the model's own z and x, by quadrature."""
    t, z = program.parameters(), {}
    noise, weight = normal_grid(1 + len(program.layers), 5)
    for name, eps in zip((*program.layers, "x"), noise, strict=True):
        p = program.p(name, z, t)
        z[name] = (p.loc + p.scale * eps).detach()
    log_q = sum(program.q(name, z, z["x"], t).log_prob(z[name]) for name in program.order)
    value = -(weight * log_q).sum()
    return torch.stack(torch.autograd.grad(value, list(t.values()), materialize_grads=True))


def truth(program, k, loss):
    return exact(program, k, {1: 5, 2: 40, 4: 18}[k * len(program.order)] if k > 1 else 20, loss)


def estimate(objective, program, count, kl_weight=1.0, seed=1):
    """Gradients of the loss, one row for each repetition."""
    args = program.args(count)
    torch.manual_seed(seed)
    loss, _ = objective.surrogate(program.model, program.guide, args, kl_weight)
    return torch.stack(torch.autograd.grad(loss, args[1:]), -1)


def check_unbiased(grads, expected):
    """The mean agrees, and is known well enough for a constant wrong by 5 % to be seen."""
    mean, error = grads.mean(0), grads.std(0) / math.sqrt(len(grads))
    seen = FACTOR * error < 0.05 * expected.abs()
    assert seen.double().mean() > 0.6, FACTOR * error / expected.abs()
    assert ((mean - expected).abs() <= FACTOR * error + 1e-12).all(), (mean - expected) / error


UNBIASED = {  # objective, K of its bound, repetitions
    "ELBO": (ELBO(), 1, 160_000),
    "ELBO, analytic": (ELBO(analytic_kl=True), 1, 160_000),
    "StickingTheLanding": (StickingTheLanding(), 1, 160_000),
    "StickingTheLanding, 3": (StickingTheLanding(3), 1, 60_000),
    "IWAE": (IWAE(2), 2, 180_000),
    "MIWAE": (MIWAE(2, 3), 2, 60_000),
    "DReG": (DReG(2), 2, 150_000),
    "ScoreFunction, none": (ScoreFunction(1, "none"), 1, 500_000),
    "ScoreFunction": (ScoreFunction(4), 1, 100_000),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", UNBIASED)
def test_gradients_are_exact_in_the_mean(name, order):
    objective, k, count = UNBIASED[name]
    program = Linear(ORDERS[order])
    check_unbiased(estimate(objective, program, count), truth(program, k, bound()))


@pytest.mark.parametrize("order", ["one layer", "z2 then z1"])
@pytest.mark.parametrize("name", ["StickingTheLanding", "DReG", "IWAE", "ScoreFunction"])
def test_gradients_are_exact_under_a_weight_of_the_kl(name, order):
    objective, k, count = UNBIASED[name]
    program, weight = Linear(ORDERS[order]), 0.6
    grads = estimate(objective, program, count, kl_weight=torch.tensor(weight))
    check_unbiased(grads, truth(program, k, bound(weight)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_truth_for_one_particle_is_the_closed_form(order):
    """All is linear in independent unit noises: values at none and at each give the moments."""
    program, x = Linear(ORDERS[order]), torch.tensor(X, dtype=torch.float64)
    t, layers = program.parameters(), len(program.order)
    units = torch.cat([torch.zeros(layers, 1), torch.eye(layers)], 1).double()
    z, prior = {}, {}
    for name, eps in zip(program.order, units, strict=True):
        q = program.q(name, z, x, t)
        z[name] = q.loc + q.scale * eps
    for name, eps in zip(program.layers, units, strict=True):
        p = program.p(name, prior, t)
        prior[name] = p.loc + p.scale * eps
    px = program.p("x", z, t)
    log_px = px.log_prob(x)[0] - (px.loc[1:] - px.loc[0]).square().sum() / (
        2 * t["log_s"].exp() ** 2
    )
    kl = dist.kl.kl_divergence(normal_of(z, program.layers), normal_of(prior, program.layers))
    closed = torch.autograd.grad(kl - log_px, list(t.values()))
    torch.testing.assert_close(truth(program, 1, bound()), torch.stack(closed))


@pytest.mark.parametrize("order", ORDERS)
def test_the_truth_for_two_particles_has_converged(order):
    program = Linear(ORDERS[order])
    points = 14 if len(program.order) == 2 else 30
    fewer = exact(program, 2, points, bound())
    torch.testing.assert_close(truth(program, 2, bound()), fewer, rtol=5e-3, atol=0)


def normal_of(z, names):
    """The joint distribution of linear functions of independent unit noises."""
    values = torch.stack([z[name].expand(1 + len(names)) for name in names])
    factor = values[:, 1:] - values[:, :1]
    return dist.MultivariateNormal(values[:, 0], factor @ factor.T)


@pytest.mark.parametrize("objective", [DReG(2), ReweightedWakeSleep(2, insomnia=0.4)])
def test_traced_gradients_are_the_eager_ones(objective):
    program = Linear(ORDERS["z2 then z1"])
    x, *params = program.args(5)

    def loss(x):
        return objective.surrogate(program.model, program.guide, (x, *params))

    step = compiled.with_gradients(loss, params)
    torch.manual_seed(1)
    value, grads = step(x)
    with validation(False):
        graph = torch.no_grad()(make_fx(step)(x))
    torch.manual_seed(1)
    again, traced = graph(x)
    torch.testing.assert_close(again, value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(traced, grads, rtol=1e-10, atol=1e-10)
    assert sum(grad.abs().sum() for grad in grads) > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("weight", "insomnia"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.4)])
def test_wake_and_sleep_gradients_of_two_particles_are_exact(order, weight, insomnia):
    program = Linear(ORDERS[order])
    expected = truth(program, 2, wake(weight, insomnia)) + (1 - insomnia) * asleep(program)
    objective = ReweightedWakeSleep(2, insomnia)
    grads = estimate(objective, program, 200_000, kl_weight=torch.tensor(weight))
    check_unbiased(grads, expected)


def test_the_wake_gradient_of_the_guide_becomes_that_of_the_inclusive_kl():
    """KL(p(z|x) || q(z|x)) of one layer, in closed form."""
    program = Linear(("z1",))
    t = program.parameters()
    precision = 1 + t["b"] ** 2 / torch.exp(2 * t["log_s"])
    loc = (t["a"] + t["b"] * X / torch.exp(2 * t["log_s"])) / precision
    posterior = dist.Normal(loc.detach(), precision.detach().rsqrt())
    kl = dist.kl.kl_divergence(posterior, program.q("z1", {}, X, t))
    guides = [t["u"], t["log_t"]]
    expected = torch.stack(torch.autograd.grad(kl, guides))
    at = [program.names.index(name) for name in ("u", "log_t")]
    far, near = (
        (estimate(ReweightedWakeSleep(k), program, 4000)[:, at].mean(0) - expected).abs()
        for k in (2, 300)
    )
    assert (near < 0.02 * expected.abs()).all()
    assert (far > 3 * near).all()


def test_asleep_the_guide_learns_from_what_the_model_dreams(monkeypatch):
    """E log q(z|x) over p(x, z), one layer: only second moments of z and x count."""
    monkeypatch.setitem(PARAMS, "log_t", -0.2)
    program = Linear(("z1",))
    t = program.parameters()
    a, b, s = t["a"].detach(), t["b"].detach(), t["log_s"].detach().exp()
    slope = t["u"] * t["b"]
    square = (a * (1 - slope * b)).square() + (1 - slope * b).square() + (slope * s).square()
    loss = t["log_t"] + square / 2 / torch.exp(2 * t["log_t"])
    expected = torch.stack(torch.autograd.grad(loss, [t["u"], t["log_t"]]))
    at = [program.names.index(name) for name in ("u", "log_t")]
    torch.testing.assert_close(asleep(program)[at], expected)
    grads = estimate(ReweightedWakeSleep(2, insomnia=0.0), program, 200_000)[:, at]
    check_unbiased(grads, expected)


class Switch:
    """z ~ Bernoulli(a), x ~ N(b z, 1), and a guide whose draws cannot be differentiated through."""

    values = {"a": 0.3, "b": 1.5, "u": -0.4}  # noqa: RUF012

    def model(self, x, a, b, u):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a))
            pyro.sample("x", dist.Normal(b * z, 1.0), obs=x)

    def guide(self, x, a, b, u):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=u * x))

    def args(self, count):
        values = [torch.full((count,), v, dtype=torch.float64) for v in self.values.values()]
        x = torch.full((count,), 1.7, dtype=torch.float64)
        return (x, *(value.requires_grad_() for value in values))

    def exact(self, k, loss):
        """The gradient of the expectation of a loss over all draws of K particles."""
        x, a, b, u = (value[0] for value in self.args(1))
        z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * k).reshape(-1, k).T
        log_q = dist.Bernoulli(logits=u * x).log_prob(z)
        log_p = dist.Bernoulli(logits=a).log_prob(z) + dist.Normal(b * z, 1.0).log_prob(x)
        value = (log_q.sum(0).exp().detach() * loss(log_p, log_q)).sum()
        return torch.stack(torch.autograd.grad(value, [a, b, u]))


def test_discrete_draws_need_no_enumeration():
    switch = Switch()

    def score(log_p, log_q):
        return -(log_p + (log_p - log_q).detach() * log_q)[0]

    def awake(log_p, log_q):
        return -((log_p - log_q).detach().softmax(0) * (log_p + log_q)).sum(0)

    for objective, expected in [
        (ScoreFunction(1, "none"), switch.exact(1, score)),
        (ScoreFunction(3), switch.exact(1, score)),
        (ReweightedWakeSleep(2), switch.exact(2, awake)),
    ]:
        check_unbiased(estimate(objective, switch, 150_000), expected)


# What the papers promise --------------------------------------------------------------------------


def guide_noise(objective, program, count=4000):
    """Mean and standard deviation of the gradient for the guide's own mean."""
    grads = estimate(objective, program, count)[:, program.names.index("u")]
    return grads.mean().item(), grads.std().item()


def test_sticking_the_landing_has_no_noise_at_the_posterior(monkeypatch):
    program = Linear(("z1",))
    precision = 1 + math.exp(2 * (math.log(PARAMS["b"]) - PARAMS["log_s"]))
    monkeypatch.setitem(PARAMS, "a", 0.0)
    monkeypatch.setitem(PARAMS, "u", math.exp(-2 * PARAMS["log_s"]) / precision)
    monkeypatch.setitem(PARAMS, "log_t", -0.5 * math.log(precision))
    assert guide_noise(StickingTheLanding(2), program) == pytest.approx((0, 0), abs=1e-12)
    assert guide_noise(ELBO(2), program)[1] > 0.1


def test_more_particles_drown_the_gradient_of_one_bound_and_not_of_dreg():
    """Signal to noise falls like 1 / sqrt(K) for IWAE, and rises like sqrt(K) for DReG."""
    program = Linear(("z1",))

    def signal_to_noise(kind, k):
        mean, deviation = guide_noise(kind(k), program, 16_000)
        return abs(mean) / deviation

    assert signal_to_noise(IWAE, 32) < 0.6 * signal_to_noise(IWAE, 4)
    assert signal_to_noise(DReG, 32) > 1.7 * signal_to_noise(DReG, 4)


def test_leaving_one_out_takes_noise_away():
    program = Linear(("z1",))
    without = guide_noise(ScoreFunction(4, "none"), program)[1]
    assert guide_noise(ScoreFunction(4), program)[1] < 0.8 * without
