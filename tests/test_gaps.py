"""Where the nats go: gaps in closed form, and which latents have collapsed."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from torch import nn

import pyrovae
from pyrovae import cli, data, guides, likelihoods, priors
from pyrovae.evidence import Annealed, elbo, gaps, latents


class Diagonal(nn.Module):
    """PPCA whose guide is a diagonal normal: the best one, widened and shifted by datum."""

    def __init__(self, width=1.4, shift=0.4):
        super().__init__()
        self.ppca = PPCA(noise=1.2, seed=7).double()
        self.width, self.shift = width, shift

    def model(self, x):
        return self.ppca.model(x)

    def best(self, x):
        posterior = self.ppca.posterior(x)
        scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return dist.Normal(posterior.mean, scale).to_event(1)

    def q(self, x):
        best = self.best(x)
        loc = best.mean + self.shift * torch.tanh(x[:, :2])
        return dist.Normal(loc, self.width * best.stddev).to_event(1)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))

    def kl(self, q, x):
        covariance = torch.diag_embed(q.variance)
        return torch.distributions.kl_divergence(
            dist.MultivariateNormal(q.mean, covariance), self.ppca.posterior(x)
        )


@pytest.fixture(scope="module")
def split_up():
    program = Diagonal()
    x = program.ppca.sample(150).double()
    how = {"method": "importance", "num_particles": 1000, "elbo_particles": 400}
    return program, x, gaps(program.model, program.guide, x, seed=0, **how)


def test_gaps_are_those_in_closed_form(split_up):
    """Datum by datum, and the errors are those that there are."""
    program, x, found = split_up
    price = program.kl(program.best(x), x)
    whole = program.kl(program.q(x), x)
    exact = {"approximation": price, "amortization": whole - price, "inference": whole}
    assert price.mean() > 0.05
    assert (whole - price).mean() > 0.2
    for name, truth in exact.items():
        gap = getattr(found, name)
        z = (gap.values - truth) / gap.std_error
        assert abs(z.mean()) < 3.5 / len(x) ** 0.5, name
        assert 0.8 < z.std() < 1.25, name
        assert abs(gap.mean - truth.mean()) < 3 * gap.mean_std_error, name
    assert abs(found.log_px.mean - program.ppca.log_px(x).mean()) < 3 * found.log_px.mean_std_error


def test_q_and_the_best_q_share_their_noise():
    """Near each other, they differ with far less noise than either has."""
    program = Diagonal(width=1.1, shift=0.0)
    x = program.ppca.sample(100).double()
    how = {"method": "importance", "num_particles": 20, "elbo_particles": 100, "seed": 0}
    found = gaps(program.model, program.guide, x, **how)
    apart = torch.hypot(found.elbo.std_error, found.refined_elbo.std_error)
    assert found.amortization.std_error.mean() < 0.5 * apart.mean()
    truth = program.kl(program.q(x), x) - program.kl(program.best(x), x)
    z = (found.amortization.values - truth) / found.amortization.std_error
    assert 0.75 < z.std() < 1.3
    assert abs(z.mean()) < 0.5


def test_parts_add_up(split_up):
    program, x, found = split_up
    parts = found.approximation.values + found.amortization.values
    assert torch.allclose(parts, found.inference.values, atol=1e-12)
    bound = elbo(program.model, program.guide, x, 400, seed=1)
    z = (found.elbo.values - bound) / (2**0.5 * found.elbo.std_error)
    assert 0.8 < z.std() < 1.25
    noise = found.inference.std_error.square().mean().sqrt()
    assert found.inference.mean_std_error == pytest.approx(float(noise) / 150**0.5)
    assert found.inference.test_std_error == pytest.approx(
        float(found.inference.values.std()) / 150**0.5
    )


def test_a_family_that_holds_the_posterior_has_no_approximation_gap():
    model = PPCA(width=1.5, shift=0.3).double()
    x = model.sample(10).double()
    found = gaps(model.model, model.guide, x, method=Annealed(5), num_particles=4, seed=0)
    assert found.log_px.method == "annealed"
    assert found.approximation.values.abs().max() < 1e-3
    error = (found.amortization.values - model.kl(x)) / found.amortization.std_error
    assert error.abs().max() < 4
    assert found.seed == 0


class Chain(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1 + c, 1), so x ~ N(c, 3); a guide of independent z."""

    def model(self, x, c):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1 + c, 1.0), obs=x)

    def guide(self, x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("z1", dist.Normal(x - c, 1.0))


@pytest.mark.parametrize("method", ["importance", Annealed(num_distributions=10)])
def test_several_latents_and_arguments(method):
    """z1 and z2 have correlation 1/2 given x, and the best product loses log(4/3) / 2."""
    x, c = torch.tensor([0.5, -1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    how = {"num_particles": 200, "elbo_particles": 4000, "seed": 0}
    found = gaps(Chain().model, Chain().guide, (x, c), method=method, **how)
    price = 0.5 * math.log(4 / 3)
    error = found.approximation.values - price
    assert (error.abs() < 3.5 * found.approximation.std_error + 0.01).all()
    assert found.approximation.std_error.max() < 0.1
    exact = dist.Normal(c, 3**0.5).log_prob(x)
    assert torch.allclose(found.log_px.values.float(), exact, atol=0.1)
    kl = exact - elbo(Chain().model, Chain().guide, (x, c), 20_000, seed=1).float()
    assert torch.allclose(found.inference.values.float(), kl, atol=0.15)
    assert "as they are" in found.data


def test_numbers_are_in_the_units_of_the_data():
    """Standardized data: what is lost does not know of units, log p(x) and both ELBOs do."""
    program = PPCA(data_dim=3, width=1.5)
    split = data.load(5 + 3 * program.sample(60), kind="real").test
    how = {"method": "importance", "num_particles": 100, "steps": 50, "seed": 0}
    found = gaps(program.model, program.guide, split, **how)
    plain = gaps(program.model, program.guide, split[slice(0, len(split))], **how)
    moved = split.log_det.double()
    assert moved.abs().min() > 1
    assert torch.allclose(found.inference.values, plain.inference.values, atol=1e-5)
    for name in ("elbo", "refined_elbo"):
        one, two = getattr(found, name).values, getattr(plain, name).values
        assert torch.allclose(one, two + moved, atol=1e-5)
    assert found.data == split.description


def test_what_is_drawn_afresh_is_drawn_once():
    """Both bounds and log p(x) are of the same draw of data that come with noise."""
    drawn = data.load(torch.rand(60, 6, 6), kind="grey", binarize="dynamic").train
    torch.manual_seed(0)
    vae = make()
    how = {"method": "importance", "num_particles": 300, "steps": 40, "seed": 0}
    found = gaps(vae.model, vae.guide, drawn.subset(range(8)), **how)
    for gap in (found.approximation, found.amortization):
        assert (gap.values > -4 * gap.std_error - 0.02).all()
    assert found.inference.values.max() < 2


def make(shape=(1, 6, 6)):
    torch.manual_seed(0)
    return pyrovae.VAE(
        priors.StandardNormal(3), likelihoods.Bernoulli(shape, 3), guides.Normal(shape, 3)
    )


X = (torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def test_nothing_of_the_callers_changes():
    vae = make()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in vae.state_dict().items()}
    how = {"method": "importance", "num_particles": 20, "elbo_particles": 20, "steps": 3}
    one, two = (gaps(vae.model, vae.guide, X, seed=3, **how) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert all(torch.equal(p, before[n]) for n, p in vae.state_dict().items())
    assert one.rows() == two.rows()
    assert one.seed == 3


def test_a_paragraph_to_quote(split_up):
    _, _, found = split_up
    told = str(found)
    assert told.startswith(f"log p(x) >= {found.log_px.mean:.2f} nats per datum, ELBO ")
    gap = found.amortization
    assert (
        f"amortization gap {gap.mean:.2f} ({gap.mean_std_error:.3f}, {gap.test_std_error:.2f})"
        in told
    )
    assert "The inference and the approximation gap are lower bounds, as log p(x) is." in told
    value = dataclasses.replace(found, log_px=dataclasses.replace(found.log_px, claim="the value"))
    assert "lower bound" not in str(value)
    heavy = dataclasses.replace(found.log_px, khat=torch.full((150,), 0.9))
    told = str(dataclasses.replace(found, log_px=heavy))
    assert "k-hat is above 0.7 for 150 of 150 data: there they may be larger" in told
    summary = json.loads(json.dumps(found.summary()))
    assert summary["amortization_gap"] == gap.mean
    assert summary["estimate"]["method"] == "importance"
    row = found.rows()[3]
    assert row["index"] == 3
    assert row["approximation_gap"] == found.approximation.values[3].item()


def test_one_datum_has_one_kind_of_error():
    vae = make()
    how = {"method": "importance", "num_particles": 20, "elbo_particles": 20, "steps": 3}
    told = str(gaps(vae.model, vae.guide, X[:1], seed=0, **how))
    assert "nan" not in told
    assert "mean over 1 data" in told


def test_refusals():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x))))

    vae = make()
    with pytest.raises(ValueError, match="elbo_particles must be at least 2, got 1"):
        gaps(vae.model, vae.guide, X, elbo_particles=1)
    with pytest.raises(ValueError, match="method must be one of importance, "):
        gaps(vae.model, vae.guide, X, method="guess", steps=1)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        gaps(vae.model, vae.guide, X, steps=-1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z' \(Poisson\) cannot be differentiated"):
        gaps(model, guide, torch.ones(3))


# Collapse -----------------------------------------------------------------------------------------


def collapsed(loc, scale, names=("z",)):
    """Three latents in each of some layers, with q(z|x) = N(loc(x), scale)."""

    def model(x):
        with pyro.plate("data", len(x)):
            for name in names:
                z = pyro.sample(name, dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for i, name in enumerate(names):
                q = dist.Normal(loc(x) * (i == 0), torch.tensor(scale) if i == 0 else torch.ones(3))
                pyro.sample(name, q.to_event(1))

    return latents(model, guide, torch.randn(500, generator=X_SEED()), num_particles=4, seed=0)


def X_SEED():
    return torch.Generator().manual_seed(0)


def stacked(*columns):
    return torch.stack(columns, -1)


def test_collapsed_latents_are_counted_and_named():
    """One latent that tells of x, one at the prior, one that is narrow whatever x is."""
    found = collapsed(lambda x: stacked(x, 0 * x, 0 * x), [0.5, 1.0, 0.3])
    layer = found.layers["z"]
    assert layer.active.tolist() == [True, False, False]
    assert layer.collapsed.tolist() == [False, True, False]
    assert found.collapsed_units == found.summary()["collapsed_units"] == 1
    assert [row["collapsed"] for row in found.rows()] == [0, 1, 0]
    total = layer.kl_per_latent[[0, 2]].sum().item()
    narrow = 0.5 * (0.3**2 - 1) - math.log(0.3)
    assert found.collapse == (
        "Collapsed: 1 of 3 latents carry nothing (less than 0.01 nats each, posterior means that "
        f"vary by less than 0.01). The other 2 carry {total:.2f} nats, {total / 2:.2f} each. 1 are "
        f"not active, but cost {layer.kl_per_latent[2]:.2f} nats."
    )
    assert layer.kl_per_latent[2].item() == pytest.approx(narrow, abs=0.05)


def test_a_layer_that_collapsed_is_named():
    found = collapsed(lambda x: stacked(x, x, x), [0.5, 0.5, 0.5], ("z1", "z2"))
    assert found.collapse.startswith("Collapsed: 3 of 6 latents carry nothing")
    assert ": 0 of 3 in z1, 3 of 3 in z2. The other 3 carry " in found.collapse
    assert found.summary()["layers"]["z2"]["collapsed_units"] == 3


def test_all_and_none():
    all_gone = collapsed(lambda x: stacked(0 * x, 0 * x, 0 * x), [1.0, 1.0, 1.0])
    assert all_gone.collapse.endswith("The guide is the prior, and x is modelled without latents.")
    none = collapsed(lambda x: stacked(x, x, x), [0.5, 0.5, 0.5])
    assert none.collapse == "Not collapsed: each of the 3 latents carries something."


def test_without_a_kl_per_latent_the_means_decide():
    vae = make()
    vae.encoder = guides.FullRankNormal((1, 6, 6), 3)
    found = latents(vae.model, vae.guide, X, seed=0)
    assert found.layers["z"].kl_per_latent.isnan().all()
    if found.collapsed_units:
        assert "nats each, posterior" not in found.collapse
    assert "nan" not in found.collapse
    alone = latents(vae.model, vae.guide, X[:1], seed=0)
    assert alone.collapse == "One datum does not tell whether latents have collapsed."


# The command --------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.plotting.figures", lambda *_: {})
    np.save("real.npy", np.random.default_rng(0).normal(3, 2, (60, 4)).astype(np.float32))
    fast = ("--epochs", "2", "--num-particles", "3", "--latent-dim", "2", "--net.hidden", "5")
    assert cli.main(["train", *fast, "--data", "real.npy", "--out", "run"]) == 0
    capsys.readouterr()
    words = ("gaps", "run", "--num-data", "3", "--steps", "5", "--method", "importance")
    assert cli.main([*words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("log p(x) >= ")
    assert "Approximation gap " in out
    assert "ollapsed: " in out
    assert out.endswith("Per datum: run/gaps.csv\n")
    found = json.loads(Path("run/gaps.json").read_text())
    assert (found["num_data"], found["steps"]) == (3, 5)
    rows = Path("run/gaps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows] == ["index", "0", "2", "4"]
    assert cli.main([*words, "--data", "real.npy"]) == 0
    assert Path("run/gaps-real.csv").exists()
    assert cli.main(["gaps", "run", "--num-data", "0"]) == 2
    assert "--num-data must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main([*words[:-1], "bidirectional"]) == 2
    assert "bidirectional" in capsys.readouterr().err
