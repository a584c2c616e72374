"""What the latents carry: against closed forms, and programs by hand."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from torch import nn

import pyrovae
from pyrovae import guides, likelihoods, priors
from pyrovae.evidence import elbo, latents
from pyrovae.evidence.latents import count_active


@pytest.fixture(scope="module")
def ppca():
    model = PPCA(width=1.5, shift=0.3).double()
    return model, model.sample(600).double()


def test_rate_and_distortion_are_those_of_ppca(ppca):
    model, x = ppca
    found = latents(model.model, model.guide, x, num_particles=50, seed=0)
    q, zero = model.posterior(x), torch.zeros(2).double()
    prior = dist.MultivariateNormal(zero, torch.eye(2).double())
    rate = torch.distributions.kl_divergence(q, prior)
    missed = (x - q.mean @ model.weight.T - model.bias).square().sum(1)
    spread = (model.weight @ q.covariance_matrix @ model.weight.T).diagonal(dim1=1, dim2=2).sum(1)
    distortion = (missed + spread) / (2 * model.noise**2)
    distortion += 5 * math.log(model.noise * (2 * math.pi) ** 0.5)
    assert found.rate.mean() == pytest.approx(rate.mean().item(), abs=0.02)
    assert found.distortion.mean() == pytest.approx(distortion.mean().item(), abs=0.03)
    bound = elbo(model.model, model.guide, x, 50, seed=1).mean().item()
    assert found.elbo == pytest.approx(bound, abs=0.05)
    assert torch.allclose(found.layers["z"].variance, q.mean.var(0))
    assert found.active_units == found.num_latents == 2
    assert found.layers["z"].kl_per_latent.isnan().all()  # a full covariance does not factorise


def test_information_is_that_of_jointly_normal_x_and_z():
    """With the exact posterior q(z) is the prior, so all of the rate is information."""
    model = PPCA(noise=1.5).double()
    x = model.sample(1000).double()
    found = latents(model.model, model.guide, x, seed=0)
    w = model.weight.detach()
    exact = 0.5 * torch.logdet(torch.eye(2) + w.T @ w / model.noise**2).item()
    assert exact < found.ceiling - 3
    assert not found.saturated
    assert found.mutual_information == pytest.approx(exact, abs=0.15)
    assert found.marginal_kl == pytest.approx(0, abs=0.1)
    assert found.rate.mean().item() == pytest.approx(
        found.mutual_information + found.marginal_kl, abs=0.2
    )
    assert "Mutual information of x and z 1." in str(found)


def one_latent(loc, scale):
    """A model with a Normal latent, and q(z|x) = N(loc(x), scale)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = torch.stack([loc(x), torch.zeros(len(x))], -1)
            scales = torch.tensor([scale, 1.0])
            pyro.sample("z", dist.Normal(mean, scales).to_event(1))

    return model, guide


def test_a_shifted_code_has_marginal_kl_and_one_latent_of_two():
    """x ~ N(0, 1) coded as N(x + 2, 0.5^2): q(z) is N(2, 1.25)."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = latents(*one_latent(lambda x: x + 2, 0.5), x, num_particles=8, seed=0)
    per_datum = 0.5 * ((x + 2).square() + 0.25 - 1) - math.log(0.5)
    layer = found.layers["z"]
    assert layer.kl_per_latent[0].item() == pytest.approx(per_datum.mean().item(), abs=0.05)
    assert layer.kl_per_latent[1] == 0
    assert layer.active.tolist() == [True, False]
    assert found.mutual_information == pytest.approx(
        0.5 * math.log(1.25 / 0.25), abs=3 * found.information_std_error
    )
    assert found.information_std_error < 0.05
    marginal = 0.5 * (1.25 + 4 - 1 - math.log(1.25))
    assert found.marginal_kl == pytest.approx(marginal, abs=0.25)
    assert found.num_paired == 1000
    assert [row["active"] for row in found.rows()] == [1, 0]
    assert found.summary()["layers"]["z"]["active_units"] == 1


def test_standard_errors_are_the_spread_over_data_sets():
    """Of 40 sets, whose spread is known to 11 %: each number under an error of its own."""
    found = []
    for seed in range(40):
        x = torch.randn(150, generator=torch.Generator().manual_seed(seed))
        carried = latents(*one_latent(lambda x: x + 2, 0.5), x, num_particles=1, seed=seed)
        found.append(carried.summary())
    errors = {
        "rate": "rate_std_error",
        "mutual_information": "information_std_error",
        "marginal_kl": "marginal_std_error",
    }
    for name, error in errors.items():
        spread = torch.tensor([one[name] for one in found]).std()
        stated = torch.tensor([one[error] for one in found]).mean()
        assert 0.7 < spread / stated < 1.4, name
    shown = [f"{found[-1][n]:.2f} ({found[-1][e]:.2f})" for n, e in errors.items()]
    rate, shared, rest = shown
    assert f"Rate {rate} and distortion " in str(carried)
    assert f"x and z {shared} nats, KL(q(z) || p(z)) {rest}, from 150 data." in str(carried)


def test_a_collapsed_guide_carries_nothing():
    found = latents(*one_latent(lambda x: 0 * x, 1.0), torch.randn(50), seed=0)
    assert found.rate.abs().max() == 0
    assert found.mutual_information == pytest.approx(0, abs=1e-6)
    assert found.marginal_kl == pytest.approx(0, abs=1e-6)
    assert found.active_units == 0
    assert str(found).startswith("Rate 0.00 (0.00) and distortion ")
    assert "; 0 of 2 latents active." in str(found)


def test_information_stays_below_its_ceiling():
    """Codes far from each other: everything is told apart, and no more than log N can be."""
    x = torch.arange(40) * 10.0
    found = latents(*one_latent(lambda x: x, 0.01), x, seed=0)
    assert found.mutual_information <= math.log(40) + 1e-6
    assert found.mutual_information == pytest.approx(math.log(40), abs=1e-4)
    assert found.saturated
    assert "at least 3.69 (0.00) nats, near the ceiling log N = 3.69 of the 40 data" in str(found)


class Layers(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1), and a guide from the data up."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1[:, 0], 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x[:, None] / 3, (2 / 3) ** 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(z1 / 2, 0.5**0.5).to_event(1))


def test_layers_by_hand():
    """The guide is the exact posterior: the rate is E KL(p(z1, z2|x) || p(z1, z2)), I(x; z1)."""
    x = 3**0.5 * torch.randn(1500, generator=torch.Generator().manual_seed(1))
    found = latents(Layers().model, Layers().guide, x, num_particles=30, seed=0)
    assert list(found.layers) == ["z1", "z2"]
    information = 0.5 * math.log(3)
    assert found.rate.mean().item() == pytest.approx(information, abs=0.05)
    total = sum(layer.kl for layer in found.layers.values())
    assert torch.allclose(total, found.rate)
    # E log q(z2|z1) - log p(z2) by hand: z1 has variance 2, z2 given it 1/2.
    assert found.layers["z2"].kl.mean().item() == pytest.approx(0.5 * math.log(2), abs=0.05)
    assert found.layers["z1"].variance.item() == pytest.approx(4 / 3, rel=0.1)
    assert found.layers["z2"].variance.item() == pytest.approx(1 / 3, rel=0.15)
    assert found.num_paired == 300
    assert found.mutual_information == pytest.approx(information, abs=0.15)
    assert "By layer: z1 " in str(found)
    assert "with 1 of 1 active" in str(found)


def test_pairs_by_rows_are_those_of_the_distribution(ppca):
    """Two ways to one matrix: the distribution broadcast, and the guide run on every pair."""
    from pyrovae import program
    from pyrovae.evidence.latents import _pairs, _pairs_by_rows

    model, x = ppca[0], ppca[1][:17]
    drawn = program.draw(model.guide, (x,))
    rows = torch.cat([_pairs_by_rows(model.guide, (x,), drawn, i, 5) for i in (0, 5, 10, 15)])
    assert torch.allclose(_pairs(model.guide, (x,), drawn), rows)


def vae(name):
    torch.manual_seed(0)
    shape = (6,)
    return pyrovae.VAE(
        priors.StandardNormal(3),
        likelihoods.Bernoulli(shape, 3),
        getattr(guides, name)(shape, 3),
    )


X = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def test_draws_in_place_of_means_find_the_same_units(monkeypatch):
    """A posterior whose mean has no formula: what chance adds to the variance is taken out."""
    import sys

    module = sys.modules["pyrovae.evidence.latents"]
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    program = one_latent(lambda x: 0.3 * x, 0.9)
    known = latents(*program, x, seed=0).layers["z"].variance
    assert count_active(program[1], (x,)) == 1
    monkeypatch.setattr(module, "_has_mean", lambda fn: False)
    drawn = latents(*program, x, seed=0).layers["z"].variance
    assert torch.allclose(known, drawn, atol=0.01)
    assert count_active(program[1], (x,)) == 1


@pytest.mark.parametrize("name", ["IAF", "FullRankNormal", "NormalMixture"])
def test_guides_that_score_any_code(name):
    q = vae(name)
    found = latents(q.model, q.guide, X, seed=0)
    assert -3 * found.information_std_error <= found.mutual_information <= found.ceiling
    assert found.unknown == ""
    bound = elbo(q.model, q.guide, X, 200, seed=1).mean().item()
    assert found.elbo == pytest.approx(bound, abs=0.1)


def test_a_guide_that_scores_only_its_draws_leaves_information_unknown():
    q = vae("Planar")
    found = latents(q.model, q.guide, X, seed=0)
    assert math.isnan(found.mutual_information)
    assert found.rate.isfinite().all()
    assert "mutual information of x and z is unknown: " in str(found)
    assert "scores only the last draw" in found.unknown


def test_a_point_has_codes_and_distortion_alone():
    q = vae("Delta")
    found = latents(q.model, q.guide, X, seed=0)
    assert found.rate.isnan().all()
    assert found.distortion.isfinite().all()
    code = q.encode(X)
    assert torch.allclose(found.layers["z"].variance.float(), code.var(0), rtol=1e-3)
    assert "Rate unknown and distortion" in str(found)
    assert "unknown: the guide has no density." in str(found)


def test_nothing_of_the_callers_changes():
    q = vae("Normal")
    state = torch.get_rng_state()
    one, two = (latents(q.model, q.guide, X, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert q.training
    assert torch.equal(one.rate, two.rate)
    assert one.mutual_information == two.mutual_information


def test_one_datum():
    q = vae("Normal")
    found = latents(q.model, q.guide, X[:1], seed=0)
    assert math.isnan(found.mutual_information)
    assert math.isnan(found.marginal_kl)
    assert not found.saturated
    assert found.active_units == 0
    assert "0 of 3 latents active" in str(found)
    assert "x and z is unknown: it takes two data or more." in str(found)
    assert "nan" not in str(found)
    assert latents(q.model, q.guide, X[:2], seed=0).unknown == ""


def test_whole_numbers_of_numpy_are_whole_numbers():
    q = vae("Normal")
    found = latents(q.model, q.guide, X, num_particles=np.int64(2), seed=np.int32(3))
    assert found.mutual_information == latents(q.model, q.guide, X, seed=3).mutual_information
    assert json.loads(json.dumps(found.summary()))["num_particles"] == 2


def test_latents_that_are_summed_out_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.Bernoulli(torch.full((len(x),), 0.5))
            pyro.sample("z", q, infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="'z'"):
        latents(model, guide, torch.randn(5))
    assert count_active(guide, (torch.randn(5),)) is None


def test_training_counts_active_latents():
    q = vae("Normal")
    history = pyrovae.fit(q, X, valid=X, epochs=1, batch_size=20, seed=0, progress=False)
    assert history[0]["valid_active_units"] in range(4)


class Clusters(nn.Module):
    """A label of three, drawn as a whole number, and data around the label's place."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.tensor([-3.0, 0.0, 3.0]))
        self.net = nn.Linear(1, 3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(self.places[z], 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.net(x[:, None])))


def test_training_counts_whole_numbers():
    program = Clusters()
    with torch.no_grad():  # the label follows the data
        program.net.weight.copy_(torch.tensor([[-9.0], [0.0], [9.0]]))
        program.net.bias.zero_()
    x = torch.tensor([-3.0, 0.0, 3.0]).repeat(20)
    goal = pyrovae.objectives.ScoreFunction()
    history = pyrovae.fit(
        program, x, valid=x, objective=goal, epochs=1, batch_size=30, seed=0, progress=False
    )
    assert history[0]["valid_active_units"] == 1
    assert latents(program.model, program.guide, x, seed=0).active_units == 1


def test_distortion_is_in_the_units_of_the_data():
    test = pyrovae.data.load("digits", binarize="none").test.subset(slice(0, 20))
    assert test.log_det.any()
    shape = (1, 8, 8)
    q = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(shape, 2), guides.Normal(shape, 2))
    found = latents(q.model, q.guide, test, seed=0)
    assert found.elbo == pytest.approx(
        elbo(q.model, q.guide, test, 50, seed=0).mean().item(), rel=0.01
    )
