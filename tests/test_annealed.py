"""Annealed importance sampling: p(x) without bias from both ends of the path, for any program."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from torch import nn

from pyrovae import VAE, evidence, guides, likelihoods, log_px, nets, priors, program
from pyrovae.evidence import Annealed, annealed
from pyrovae.evidence.target import Target
from pyrovae.evidence.walk import Walk

OFF = PPCA(width=1.2, shift=0.3)
X = OFF.sample(3)
TRUTH = OFF.log_px(X)

SHORT = Annealed(num_distributions=5, num_leapfrog=3)


def unbiased(model, guide, x, truth, method, count=1500, chains=2, seed=0, **kwargs):
    """A t-test that mean weights of copies of a datum have the mean p(x), known to 4 %."""
    copies = tuple(arg[:1].expand(count, *arg.shape[1:]) for arg in evidence_args(x))
    result = log_px(model, guide, copies, chains, method=method, seed=seed, **kwargs)
    ratio = (result.values - truth).exp()
    error = float(ratio.std()) / math.sqrt(count)
    assert error < 0.04, f"the test is too weak: {error}"
    assert abs(float(ratio.mean()) - 1) < 4 * error, f"{float(ratio.mean())} +- {error}"


def evidence_args(x):
    return x if isinstance(x, tuple) else (x,)


# Truth.


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("schedule", ["sigmoid", "linear", "adapted"])
def test_weights_have_the_mean_px(start, schedule):
    vae = PPCA(data_dim=3, noise=1.5, width=1.2, shift=0.4)
    x = vae.sample(1)
    method = Annealed(5, start, schedule, num_leapfrog=3)
    unbiased(vae.model, vae.guide, x, vae.log_px(x), method)


@pytest.mark.parametrize("acceptance", [0.2, 0.95])
def test_weights_have_the_mean_px_however_far_moves_go(acceptance):
    vae = PPCA(data_dim=3, noise=1.5, width=1.2, shift=0.4)
    x = vae.sample(1)
    method = Annealed(5, num_leapfrog=3, acceptance=acceptance)
    unbiased(vae.model, vae.guide, x, vae.log_px(x), method, chains=4)


def test_in_one_step_it_is_importance_sampling():
    result = log_px(OFF.model, OFF.guide, X, 2000, method=Annealed(1), seed=0)
    assert ((result.values - TRUTH).abs() < 4 * result.std_error).all()
    with torch.no_grad():
        plain = log_px(OFF.model, OFF.guide, X, 2000, seed=0)
    assert result.ess.mean() == pytest.approx(float(plain.ess.mean()), rel=0.3)


def test_it_is_nearer_than_importance_sampling_at_the_same_price():
    vae = PPCA(data_dim=20, latent_dim=10, width=0.6, shift=0.3)
    x = vae.sample(40)
    method = Annealed(num_distributions=40, num_leapfrog=5)
    near = log_px(vae.model, vae.guide, x, 8, method=method, seed=0)
    plain = log_px(vae.model, vae.guide, x, 8 * 40 * 5, seed=0)
    off = [float((vae.log_px(x) - result.values).mean()) for result in (near, plain)]
    assert off[0] < 0.3 * off[1]
    assert off[1] > 0.3


def test_standard_errors_are_calibrated():
    x = X[:1].expand(200, -1)
    result = log_px(OFF.model, OFF.guide, x, 50, method=SHORT, seed=0)
    z = (result.values - TRUTH[0]) / result.std_error
    assert 0.8 < float(z.std()) < 1.25
    assert abs(float(z.mean())) < 0.3


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def log_normal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.LogNormal(torch.log((x + 2) / 2), 0.7))


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_latents_with_bounds(start):
    x = torch.tensor([4.0])
    truth = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x).double()
    unbiased(gamma_poisson, log_normal, x, truth, Annealed(5, start, num_leapfrog=3))


def test_latents_with_bounds_in_an_inner_plate():
    def model(x):
        with pyro.plate("data", len(x)), pyro.plate("entries", 2, dim=-2):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.plate("entries", 2, dim=-2):
            pyro.sample("rate", dist.LogNormal(torch.log((x.T + 2) / 2), 0.7))

    x = torch.tensor([[4.0, 0.0]])
    truth = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x).sum(1).double()
    unbiased(model, guide, x, truth, Annealed(5, num_leapfrog=3), chains=4)
    with torch.no_grad():
        exact = log_px(model, guide, x.repeat(2, 1), method="exact")
    torch.testing.assert_close(exact.values, truth.expand(2), rtol=0, atol=1e-6)


def labelled(enumerate_in_guide):
    """A mixture of two, its label summed out; the label is in the guide too, or is not."""
    label = {"enumerate": "parallel"}

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer=label)
            z = pyro.sample("z", dist.Normal(4.0 * y - 2, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if enumerate_in_guide:
                logits = torch.stack([-x, x], -1)
                y = pyro.sample("y", dist.Categorical(logits=logits), infer=label)
                pyro.sample("z", dist.Normal(0.5 * x + 0.5 * (4.0 * y - 2), 1.0))
            else:
                pyro.sample("z", dist.Normal(x, 1.5))

    return model, guide


@pytest.mark.parametrize("enumerate_in_guide", [False, True])
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_a_label_summed_out(enumerate_in_guide, start):
    x = torch.tensor([0.7])
    parts = dist.Normal(torch.tensor([-2.0, 2.0], dtype=torch.float64), math.sqrt(2.0))
    truth = (parts.log_prob(x) + torch.tensor([0.3, 0.7]).double().log()).logsumexp(0)
    model, guide = labelled(enumerate_in_guide)
    unbiased(model, guide, x, truth, Annealed(8, start, num_leapfrog=3))


class Chain(nn.Module):
    """z2 -> z1 -> x, linear and Gaussian, with a guide that draws z1 first, in an inner plate."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]]))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            with pyro.plate("entries", 2, dim=-2):
                z1 = pyro.sample("z1", dist.Normal(z2, 0.8))
            pyro.sample("x", dist.Normal(z1.T @ self.weight.T, 0.9).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            with pyro.plate("entries", 2, dim=-2):
                z1 = pyro.sample("z1", dist.Normal(0.5 * x[:, :2].T, 1.0))
            pyro.sample("z2", dist.Normal(z1.mean(0), 0.7))

    def log_px(self, x):
        cov = torch.ones(2, 2) + 0.8**2 * torch.eye(2)
        full = self.weight @ cov @ self.weight.T + 0.9**2 * torch.eye(3)
        return dist.MultivariateNormal(torch.zeros(3), full.double()).log_prob(x.double()).detach()


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_layers_of_latents_and_an_inner_plate(start):
    program = Chain()
    x = torch.tensor([[1.0, -0.5, 0.3]])
    method = Annealed(6, start, num_leapfrog=3)
    unbiased(program.model, program.guide, x, program.log_px(x), method)


# Backwards.


def test_backwards_inverse_weights_have_the_mean_one_over_px():
    vae = PPCA(data_dim=3, noise=1.5, width=1.2, shift=0.3)
    bracket = evidence.validate(vae.model, vae.guide, vae.sample(1), 2, method=SHORT, num_data=1500)
    truth = vae.log_px(bracket.x[0])
    for ratio in ((bracket.lower.values - truth).exp(), (truth - bracket.upper).exp()):
        error = float(ratio.std()) / math.sqrt(len(ratio))
        assert error < 0.04
        assert abs(float(ratio.mean()) - 1) < 4 * error


def bracketed(runs, **kwargs):
    """How often the bounds hold the exact mean, with two standard errors at each end."""
    held = 0
    for seed in range(runs):
        bracket = evidence.validate(OFF.model, OFF.guide, X, method=SHORT, seed=seed, **kwargs)
        found, exact = bracket.summary(), float(OFF.log_px(bracket.x[0]).mean())
        low = found["lower"] - 2 * found["lower_std_error"]
        held += low <= exact <= found["upper"] + 2 * found["upper_std_error"]
        assert len(bracket.gap) == 100
    return held


def test_bounds_hold_the_truth():
    assert bracketed(4) == 4


@pytest.mark.slow
def test_bounds_hold_the_truth_in_99_of_100_runs():
    assert bracketed(100) >= 99


def test_the_gap_falls_with_the_number_of_distributions():
    gaps = [
        evidence.validate(OFF.model, OFF.guide, X, method=Annealed(count, num_leapfrog=3), seed=0)
        for count in (1, 4, 16)
    ]
    means = [float(bracket.gap.mean()) for bracket in gaps]
    assert means[0] > 3 * means[1] > 9 * means[2]
    assert abs(means[2]) < 4 * gaps[2].gap_std_error + 0.02


def test_the_data_of_a_bracket_are_the_models_own():
    bracket = evidence.validate(OFF.model, OFF.guide, X, num_data=500, method=Annealed(2), seed=0)
    (x,) = bracket.x
    assert x.shape == (500, 5)
    spread = (x.double().mean(0) - OFF.marginal().mean) / (OFF.marginal().stddev / math.sqrt(500))
    assert float(spread.abs().max()) < 4
    again = evidence.validate(OFF.model, OFF.guide, X, num_data=500, method=Annealed(2), seed=0)
    assert torch.equal(again.x[0], x)
    assert torch.equal(again.gap, bracket.gap)
    assert len(bracket.rows()) == 500
    assert bracket.rows()[3]["gap"] == float(bracket.gap[3])
    assert "data drawn from the model" in str(bracket)


def test_bounds_from_below_and_above_have_their_own_noise():
    bracket = evidence.validate(
        OFF.model, OFF.guide, X, 1, num_data=800, method=Annealed(1), seed=0
    )
    truth = OFF.log_px(bracket.x[0])
    pair = torch.stack([bracket.lower.values - truth, bracket.upper - truth])
    assert abs(float(pair.corrcoef()[0, 1])) < 0.14  # four of its standard errors


def test_another_estimator_is_judged_beside_annealing():
    vae = PPCA(data_dim=20, latent_dim=10, width=0.6, shift=0.3)
    bracket = evidence.validate(
        vae.model, vae.guide, vae.sample(1), 10, method="importance", seed=0
    )
    off = float((vae.log_px(bracket.x[0]) - bracket.lower.values).mean())
    assert off > 5
    assert abs(float(bracket.gap.mean()) - off) < 0.5
    assert bracket.lower.num_particles == 10
    assert "importance sampling" in str(bracket)
    assert "16 chains" in str(bracket)


# Every part.


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (partial(priors.VampPrior, (6,), 2, num_components=5), guides.Normal),
        pytest.param(partial(priors.Flow, 2), guides.NeuralSplineCoupling, marks=pytest.mark.slow),
        (partial(priors.GaussianMixture, 2, num_components=3), guides.FullRankNormal),
    ],
    ids=lambda part: getattr(part, "func", part).__name__,
)
def test_vaes_of_all_kinds(prior, guide):
    net = nets.MLP(hidden=(8,))
    vae = VAE(prior(), likelihoods.Bernoulli((6,), 2, net), guide((6,), 2, net))
    x = (torch.rand(4, 6) < 0.5).float()
    result = log_px(vae.model, vae.guide, x, 400, method=Annealed(10, num_leapfrog=3), seed=0)
    truth = log_px(vae.model, vae.guide, x, method="exact")
    assert (result.std_error < 0.15).all()
    assert ((result.values - truth.values).abs() < 4 * result.std_error).all()


def test_the_encoder_runs_once_for_a_block():
    net = nets.MLP(hidden=(8,))
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli((6,), 2, net), guides.Normal((6,), 2, net)
    )
    x = torch.ones(3, 6)
    target = Target(Walk(vae.model, vae.guide, x, 4))
    u = torch.randn(3, 2)
    with torch.no_grad(), program.validation(False):
        point = target.at((x,))(u)
    leaf = u.clone().requires_grad_()
    base, joint = target.densities((x,), leaf)
    torch.testing.assert_close(point.log_base, base)
    torch.testing.assert_close(point.log_joint, joint)
    for grad, density in ((point.grad_base, base), (point.grad_joint, joint)):
        torch.testing.assert_close(
            grad, torch.autograd.grad(density.sum(), leaf, retain_graph=True)[0]
        )
    halves = target._graphs[3]
    products = [node for node in halves.rest.__wrapped__.graph.nodes if "mm" in str(node.target)]
    assert len(products) == 4  # two layers of the decoder, there and back


# What it is given.


def test_blocks_are_filled_up_and_keyed():
    x = OFF.sample(7)
    method = Annealed(4, num_leapfrog=2)
    whole = log_px(OFF.model, OFF.guide, x, 4, method=method, seed=0, block_size=3)
    parts = [
        log_px(OFF.model, OFF.guide, x, 4, method=method, seed=0, block_size=3, blocks=[i])
        for i in range(3)
    ]
    assert len(whole.values) == 7
    assert torch.equal(evidence.LogPx.join(parts).values, whole.values)


@pytest.mark.slow
def test_compiled_it_gives_the_same_numbers():
    vae = PPCA(width=0.8)
    x = vae.sample(6)
    results = [
        log_px(vae.model, vae.guide, x, 8, method=SHORT, seed=0, compile=compile)
        for compile in (False, True)
    ]
    torch.testing.assert_close(results[0].values, results[1].values, rtol=0, atol=2e-3)


def test_float64():
    result = log_px(OFF.model, OFF.guide, X, 50, method=SHORT, seed=0, dtype=torch.float64)
    assert ((result.values - TRUTH).abs() < 4 * result.std_error).all()


def planar():
    net = nets.MLP(hidden=(8,))
    return VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli((6,), 2, net),
        guides.Planar((6,), 2, net=net),
    )


def test_a_guide_that_scores_only_its_draws_starts_from_the_prior():
    vae, x = planar(), torch.ones(2, 6)
    with pytest.raises(ValueError, match="start='prior'"):
        log_px(vae.model, vae.guide, x, 4, method="annealed")
    result = log_px(vae.model, vae.guide, x, 4, method=Annealed(4, "prior"))
    assert result.values.isfinite().all()


def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x))))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(len(x))))


def half(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Uniform(torch.zeros(len(x)), 1.0))


def moving(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Uniform(torch.zeros(len(x)), 1 + x))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def moving_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Uniform(torch.zeros(len(x)), 1 + x))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (discrete, discrete_guide, "'z' is discrete"),
        (gamma_poisson, half, "cannot draw all that the model's 'rate' may be"),
        (moving, moving_guide, "not the same for every datum"),
    ],
)
def test_programs_that_cannot_be_annealed(model, guide, message):
    with pytest.raises(ValueError, match=message):
        log_px(model, guide, torch.tensor([0.0, 1.0, 2.0]), method="annealed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_distributions": 0}, "num_distributions must be at least 1"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1"),
        ({"start": "posterior"}, "start must be one of"),
        ({"schedule": "cubic"}, "schedule must be one of"),
        ({"acceptance": 1.0}, "acceptance must be between"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Annealed(**settings)


def test_what_has_no_upper_bound_says_so():
    with pytest.raises(ValueError, match="take evidence"):
        log_px(OFF.model, OFF.guide, X, method=evidence.Bidirectional())
    with pytest.raises(ValueError, match="num_data must be at least 1"):
        evidence.validate(OFF.model, OFF.guide, X, num_data=0)


# Schedules.


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_schedules_rise_from_zero_to_one(name):
    betas = annealed._schedule(name, torch.linspace(0, 1, 11, dtype=torch.float64))
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()


def test_an_adapted_schedule_dwells_where_weights_vary():
    betas = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None].expand(-1, 2)
    spread = torch.stack([torch.ones(21), torch.where(betas[:, 0] < 0.2, 50.0, 1.0)], 1)
    found = annealed._adapted(betas, spread, 40)
    assert found.shape == (41, 2)
    assert (found.diff(dim=0) > 0).all()
    torch.testing.assert_close(found[:, 0], torch.linspace(0, 1, 41, dtype=torch.float64))
    assert int((found[:, 1] < 0.25).sum()) > 30
