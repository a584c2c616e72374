"""Hamiltonian Monte Carlo leaves a density invariant, and says how well it has sampled it."""

import dataclasses
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from exact import PPCA

from pyrovae import VAE, _train, cli, guides, likelihoods, nets, plotting, priors
from pyrovae.evidence import Posterior, hmc, posterior
from pyrovae.evidence.hmc import Moves
from pyrovae.evidence.posterior import _each
from pyrovae.evidence.target import Point
from pyrovae.plotting.posterior import most_different

FEW = {"num_samples": 20, "num_warmup": 20, "num_leapfrog": 2, "num_chains": 2}

BASE, JOINT = (-0.5, 1.5), (1.0, 0.4)
"""Mean and scale of each latent at the two ends of a path."""


def path(u):
    """A path between two normals, the second without its constant."""

    def log_density(loc, scale):
        return -((u - loc) / scale).square().sum(1) / 2, (loc - u) / scale**2

    (log_base, grad_base), (log_joint, grad_joint) = log_density(*BASE), log_density(*JOINT)
    return Point(u, log_base, log_joint - 3.0, grad_base, grad_joint)


def at(beta):
    """Mean and scale of the path at beta."""
    precision = (1 - beta) / BASE[1] ** 2 + beta / JOINT[1] ** 2
    loc = ((1 - beta) * BASE[0] / BASE[1] ** 2 + beta * JOINT[0] / JOINT[1] ** 2) / precision
    return loc, precision**-0.5


def means_are(values, expected, deviations=4.0):
    """Whether means of rows are as expected, by their own standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    return ((values.mean(0) - expected).abs() < deviations * error).all()


@pytest.mark.parametrize(("beta", "num_steps"), [(0.3, 1), (0.3, 3), (1.0, 3)])
def test_a_move_leaves_the_path_invariant(beta, num_steps):
    rows, dim = 50_000, 2
    loc, scale = at(beta)
    start = path(loc + scale * torch.randn(rows, dim, dtype=torch.float64))
    step = 1.3 + 0.2 * torch.rand(rows, dtype=torch.float64)
    stretch = torch.tensor([1.0, 0.7], dtype=torch.float64) * scale
    how = Moves(step, stretch.expand(rows, dim), num_steps)
    point, chance = hmc.move(path, start, torch.full_like(step, beta), how)
    assert 0.5 < chance.mean() < 0.9
    moved = (point.u != start.u).all(1)
    assert abs(float(moved.double().mean() - chance.mean())) < 0.01
    w = (point.u - loc) / scale
    powers = torch.cat([w, w.square(), w.prod(1, keepdim=True), w.pow(4)], 1)
    assert means_are(powers, torch.tensor([0, 0, 1, 1, 0, 3, 3], dtype=torch.float64))
    again = path(point.u)
    assert all(torch.equal(a, b) for a, b in zip(point, again, strict=True))


def test_betas_and_steps_are_each_rows_own():
    betas = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64).repeat(20_000)
    loc, scale = (torch.tensor(v)[:, None] for v in zip(*map(at, betas.tolist()), strict=True))
    start = path(loc.double() + scale.double() * torch.randn(len(betas), 1, dtype=torch.float64))
    step = torch.tensor([1.9, 0.5, 1.2], dtype=torch.float64).repeat(20_000)
    point, chance = hmc.move(path, start, betas, Moves(step, scale.double(), 3))
    assert (chance.reshape(-1, 3).mean(0) > torch.tensor([0.4, 0.95, 0.7])).all()
    assert (chance.reshape(-1, 3).mean(0) < torch.tensor([0.8, 1.0, 0.95])).all()
    w = ((point.u - loc) / scale).reshape(-1, 3)
    assert means_are(w, 0.0)
    assert means_are(w.square(), 1.0)


def test_leapfrog_is_reversible(monkeypatch):
    visited, target = [], torch.distributions.StudentT(3.0)

    def evaluate(u):
        visited.append(u)
        leaf = u.clone().requires_grad_()
        log_p = target.log_prob(leaf).sum(1) - (leaf[:, 0] * leaf[:, 1]).square() / 2
        grad = torch.autograd.grad(log_p.sum(), leaf)[0]
        return Point(u, log_p.detach(), log_p.detach(), grad, grad)

    def run(u, momentum):
        visited.clear()
        monkeypatch.setattr(torch, "randn_like", lambda _: momentum)
        monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.5))
        start = evaluate(u)
        hmc.move(evaluate, start, torch.ones(len(u)).double(), Moves(step, scale, 7))
        return torch.stack(visited)

    u, p, scale = (torch.randn(20, 2, dtype=torch.float64) for _ in range(3))
    step, scale = torch.full((20,), 0.3, dtype=torch.float64), scale.abs()
    there = run(u, p)
    stride = 0.3 * scale
    end = (there[-1] - there[-2]) / stride + stride / 2 * evaluate(there[-1]).grad(
        torch.ones(20).double()
    )
    back = run(there[-1], -end)
    assert (there[0] - there[-1]).abs().max() > 0.1
    assert torch.allclose(back.flip(0), there, atol=1e-11)


# Posteriors that are known


def z_scores(values, expected):
    """Of the means of draws `(chains, draws, ...)`, by their own effective sample sizes."""
    values = values.double().numpy()
    size = array_stats.ess(values, 0, 1, method="mean")
    return (values.mean((0, 1)) - np.asarray(expected)) / (values.std((0, 1)) / np.sqrt(size))


def calibrated(scores):
    """Whether z-scores are standard normal, as far as their number lets tell."""
    scores = np.concatenate([np.ravel(s) for s in scores])
    error = 4 / math.sqrt(len(scores))
    return abs(scores.mean()) < error and abs(scores.std() - 1) < error / math.sqrt(2)


def test_ppca_within_the_errors_that_its_own_ess_gives():
    model = PPCA(width=2.0, shift=0.5).double()
    x = model.sample(20).double()
    found = posterior(model.model, model.guide, x, num_warmup=100, num_leapfrog=3, seed=0)
    with torch.no_grad():
        exact = PPCA.posterior(model_of(model), x)
    assert found.samples["z"].shape == found.guide["z"].shape == (4, 1000, 20, 2)
    assert found.samples["z"].dtype == torch.float64
    inverse = torch.linalg.inv(exact.scale_tril)
    w = torch.einsum("nij,csnj->csni", inverse, found.samples["z"] - exact.mean)
    scores = [z_scores(w, 0.0), z_scores(w.square(), 1.0), z_scores(w.prod(-1), 0.0)]
    assert all(calibrated([score]) for score in scores)
    assert found.rhat["z"].shape == found.ess["z"].shape == found.tail_ess["z"].shape == (20, 2)
    assert found.max_rhat.max() < 1.01
    assert found.min_ess.min() > 1000
    assert found.converged.all()
    assert (found.acceptance - 0.8).abs().max() < 0.12
    assert not found.divergent.any()
    row = found.rows()[3]
    assert (row["datum"], row["latent"]) == (1, "z[1]")
    assert row["mean"] == pytest.approx(float(exact.mean[1, 1]), abs=0.05)
    assert row["guide_mean"] == pytest.approx(float(exact.mean[1, 1]) + 0.5, abs=0.05)
    assert row["guide_std"] == pytest.approx(2 * row["std"], rel=0.1)
    off = re.search(r"off by up to ([\d.]+) .* are ([\d.]+) to ([\d.]+) times", str(found))
    assert float(off[1]) == pytest.approx(float(0.5 / exact.stddev.min()), rel=0.1)
    assert 1.85 < float(off[2]) < 2 < float(off[3]) < 2.15
    assert "Converged." in str(found)
    assert "4 chains of 1,000 draws from p(z|x) of 20 data" in str(found)


def model_of(ppca):
    same = PPCA(noise=ppca.noise).to(ppca.weight.dtype)
    same.load_state_dict(ppca.state_dict())
    return same


def rates(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def guess_rates(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.LogNormal((x + 1).log(), 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_positive_latent(dtype):
    x = torch.arange(12, dtype=dtype)
    counts = {"num_samples": 250, "num_warmup": 100, "num_leapfrog": 3}
    found = posterior(rates, guess_rates, x, seed=0, dtype=dtype, **counts)
    rate = found.samples["rate"]
    assert rate.dtype == dtype
    assert (rate > 0).all()
    shape = x.double() + 2
    scores = [
        z_scores(rate / 1.0, shape / 1.5),
        z_scores(rate.log(), torch.digamma(shape) - math.log(1.5)),
    ]
    assert calibrated(scores)
    assert (found.acceptance - 0.8).abs().max() < 0.15
    assert found.min_ess.min() > 150
    assert found.names == ["rate"]


def test_layers_of_latents_and_several_arguments():
    def model(x, shift):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(shift, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                low = pyro.sample("low", dist.Normal(top, 0.5))
            pyro.sample("x", dist.Normal(low.T, 0.4).to_event(1), obs=x)

    def guide(x, shift):
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Normal(shift, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("low", dist.Normal(x.T, 0.4))

    x, shift = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    counts = {"num_samples": 400, "num_warmup": 100, "num_leapfrog": 4}
    found = posterior(model, guide, (x, shift), seed=0, **counts)
    assert found.samples["low"].shape == found.guide["low"].shape == (4, 400, 8, 3)
    assert found.names == ["top", "low[0]", "low[1]", "low[2]"]
    of_x = 0.5**2 + 0.4**2
    precision = 1 + 3 / of_x
    top = (shift + x.sum(1) / of_x) / precision
    share = 0.5**2 / of_x
    low = (1 - share) * top[:, None] + share * x
    scores = [z_scores(found.samples["top"], top), z_scores(found.samples["low"], low)]
    within = ((found.samples["top"] - top) * precision**0.5).square()
    assert calibrated([*scores, z_scores(within, 1.0)])
    drawn, guided = found.vectors(5)
    assert torch.equal(drawn[:, 0], found.samples["top"][:, :, 5].flatten())
    assert torch.equal(drawn[:, 2], found.samples["low"][:, :, 5, 1].flatten())
    assert abs(float(guided[:, 2].mean() - x[5, 1])) < 0.05


def test_a_label_is_summed_out():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5], dtype=x.dtype)))
            z = pyro.sample("z", dist.Normal(2.0 * y - 1, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, infer=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 2)), infer=infer)
            pyro.sample("z", dist.Normal(x / 2 + 0 * y, 1.0))

    def summing(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "y", dist.Categorical(torch.ones(len(x), 2)), infer={"enumerate": "parallel"}
            )
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.linspace(-2, 2, 24, dtype=torch.float64)
    found = posterior(model, summing, x, num_samples=200, num_leapfrog=3, num_warmup=80, seed=0)
    of_label = torch.softmax(-torch.stack([(x + 1).square(), (x - 1).square()]) / 4, 0)
    expected = (of_label * torch.stack([(x - 1) / 2, (x + 1) / 2])).sum(0)
    assert calibrated([z_scores(found.samples["z"], expected)])
    with pytest.raises(ValueError, match="site 'y' is discrete"):
        posterior(model, guide, x, seed=0)


# What is not to be believed


def far_apart(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.2), obs=x)


def both(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 3.0).expand([len(x)]))


def test_chains_in_different_modes_are_noticed():
    x = torch.full((20,), 3.0)
    counts = {"num_samples": 100, "num_warmup": 60, "num_leapfrog": 5}
    found = posterior(far_apart, both, x, seed=0, **counts)
    split = (found.samples["z"].mean(1).sign().sum(0).abs() < 4).numpy()
    assert split.sum() > 10
    assert (found.rhat["z"].numpy()[split] > 1.5).all()
    assert not found.converged[torch.as_tensor(split)].any()
    assert "the chains are in different places" in str(found)


@pytest.mark.slow
def test_errors_are_calibrated():
    model = PPCA(width=0.5, shift=0.3).double()
    x = model.sample(400).double()
    found = posterior(model.model, model.guide, x, num_leapfrog=5, seed=0)
    with torch.no_grad():
        exact = PPCA.posterior(model_of(model), x)
    w = (found.samples["z"] - exact.mean) / exact.stddev
    for scores in (z_scores(w, 0.0), z_scores(w.square(), 1.0)):
        assert abs(scores.mean()) < 0.15
        assert 0.9 < scores.std() < 1.1
    assert found.converged.double().mean() > 0.99


def test_too_few_draws_are_not_called_converged():
    model = PPCA().double()
    counts = {"num_samples": 50, "num_warmup": 50, "num_leapfrog": 3}
    found = posterior(model.model, model.guide, model.sample(1).double(), seed=0, **counts)
    assert not found.converged.any()
    assert "Not converged: take more draws" in str(found)


def test_entries_that_cannot_change_have_no_r_hat():
    def model(x):
        with pyro.plate("data", len(x)):
            tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("tril", dist.LKJCholesky(2, torch.ones(len(x))))

    found = posterior(model, guide, torch.tensor([[1.0, 1.0]]), seed=0, **FEW)
    assert found.rhat["tril"].isnan().flatten().tolist() == [True, True, False, False]
    assert found.max_rhat.isfinite().all()
    assert "nan" not in str(found)


def test_chains_that_do_not_move_have_not_converged():
    stuck = torch.arange(4.0)[:, None, None, None].expand(4, 50, 1, 1)
    still = {"z": torch.cat([stuck, 0 * stuck], -1)}
    rhat = _each(still, lambda v: array_stats.rhat(v, 0, 1))
    found = dataclasses.replace(drawn(still["z"][:, :, 0], still["z"][:, :, 0]), rhat=rhat)
    assert found.max_rhat == math.inf
    assert not found.converged


# Any program, nothing changed


def flow_vae():
    shape, net = (1, 2, 3), nets.MLP((4,))
    guide = guides.Planar(shape, 2, net)
    return VAE(priors.StandardNormal(2), likelihoods.Bernoulli(shape, 2, net), guide)


def test_a_guide_that_scores_nothing_and_nothing_changed():
    vae, x = flow_vae().train(), torch.rand(3, 1, 2, 3).round()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    found = posterior(vae.model, vae.guide, x, seed=3, **FEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert vae.training
    again = posterior(vae.model, vae.guide, x, seed=3, **FEW)
    assert torch.equal(found.samples["z"], again.samples["z"])
    assert torch.equal(found.guide["z"], again.guide["z"])
    other = posterior(vae.model, vae.guide, x, **FEW)
    assert other.seed != 3
    assert not torch.equal(found.samples["z"], other.samples["z"])


@pytest.mark.parametrize(
    ("argument", "least"),
    [("num_samples", 10), ("num_chains", 2), ("num_warmup", 20), ("num_leapfrog", 1)],
)
def test_arguments_are_checked(argument, least):
    with pytest.raises(ValueError, match=f"{argument} must be at least {least}"):
        posterior(rates, guess_rates, torch.ones(1), **{argument: least - 1})


def test_nowhere_to_start():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z / 0.0, 1.0).to_event(0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="nowhere to start"):
        posterior(model, guide, torch.ones(1), **FEW)


# Pictures and the command


def drawn(samples, guide):
    """A result of one datum from draws `(chains, draws, D)`."""
    of = {"z": torch.as_tensor(samples)[:, :, None]}, {"z": torch.as_tensor(guide)[:, :, None]}
    one = torch.ones(1, samples.shape[-1])
    kinds = ({"z": one}, {"z": 1000 * one}, {"z": 1000 * one})
    return Posterior(*of, *kinds, torch.ones(1), torch.zeros(1), 10, 10, 0)


def test_latents_that_differ_come_first():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 2000, 7))
    left[:, 2] += 1.5
    left[:, 4] *= 3.0
    left[:, 6] = 0.3 * left[:, 6] + 0.95 * left[:, 5]
    assert most_different(left, right, 1) == [2]
    assert set(most_different(left, right, 4)) == {2, 4, 5, 6}
    assert len(most_different(left, right, 20)) == 7


@pytest.mark.parametrize(("latents", "num"), [(1, 2), (6, 2), (6, 4)])
def test_the_figure(latents, num):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 2, 100, latents)).astype(np.float32)
    found = drawn(left, right)
    shown = min(num, latents)
    plain = plotting.posterior(found, num=num)
    assert len(plain.axes) == shown * (shown + 1) // 2
    shape = (1, 4, 4)
    vae = VAE(
        priors.StandardNormal(latents),
        likelihoods.Bernoulli(shape, latents, nets.MLP((4,))),
        guides.Normal(shape, latents, nets.MLP((4,))),
    )
    x = torch.rand(1, *shape).round()
    figure = plotting.posterior(found, num=num, vae=vae, x=x)
    images = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title().split("\n")[-1] for ax in images] == [
        "datum",
        "under q(z|x)",
        "under p(z|x)",
    ]
    assert np.allclose(np.asarray(images[0].get_images()[0].get_array())[..., 0], x[0, 0])
    again = vae.decode(torch.as_tensor(left).flatten(0, 1)).mean(0)[0]
    assert np.allclose(np.asarray(images[2].get_images()[0].get_array())[..., 0], again, atol=1e-5)
    assert "converged" in figure.get_suptitle()
    figure.draw_without_rendering()


def test_the_figure_of_nothing_that_changes():
    found = drawn(np.zeros((2, 50, 2)), np.zeros((2, 50, 2)))
    plotting.posterior(found).draw_without_rendering()
    with pytest.raises(ValueError, match="index must be from 0 to 0, got 1"):
        plotting.posterior(found, 1)
    with pytest.raises(ValueError, match="num must be at least 1"):
        plotting.posterior(found, num=0)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_train, "draw", lambda *_: [])
    monkeypatch.setitem(posterior.__kwdefaults__, "num_warmup", 20)
    np.save("x.npy", np.random.default_rng(0).integers(0, 2, (40, 4)).astype(np.uint8))
    small = ["--latent-dim", "2", "--net.hidden", "5", "--num-particles", "3"]
    assert cli.main(["train", "--data", "x.npy", "--out", "run", "--epochs", "1", *small]) == 0
    few = ["--num-samples", "20", "--num-chains", "2"]
    assert cli.main(["posterior", "run", "--index", "1", *few]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 chains of 20 draws from p(z|x) of 1 datum" in said
    assert "Draws: run/posterior-1.npz Figure: run/figures/posterior-1.png" in said
    assert (tmp_path / "run/figures/posterior-1.png").stat().st_size > 1000
    with np.load("run/posterior-1.npz") as kept:
        assert kept["z"].shape == kept["guide_z"].shape == (2, 20, 2)
        assert kept["rhat_z"].shape == kept["ess_z"].shape == kept["tail_ess_z"].shape == (2,)
    capsys.readouterr()
    for words, reason in {
        ("--index", "4"): "--index must be from 0 to 3, got 4",
        ("--index", "40", "--data", "x.npy"): "--index must be from 0 to 39, got 40",
        ("--index", "-1"): "--index must be from 0 to",
        ("--num-chains", "1"): "num_chains must be at least 2, got 1",
    }.items():
        assert cli.main(["posterior", "run", *words]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
