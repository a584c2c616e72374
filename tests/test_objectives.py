"""Objectives: their values, what weighs them, what is reported and what is refused."""

import logging
import math

import exact
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from table import OBJECTIVES
from torch import nn
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import VAE, compiled, fit, guides, likelihoods, nets, objectives, priors
from pyrovae.objectives import (
    ELBO,
    IWAE,
    MIWAE,
    MMD,
    Denoising,
    DReG,
    ReweightedWakeSleep,
    ScoreFunction,
    StickingTheLanding,
    report,
)
from pyrovae.objectives.mmd import mmd
from pyrovae.program import Program, draw, log_weights, simulate, validation

LATENTS, PIXELS, BATCH = 2, 4, 6


def make_vae(prior=None):
    net = nets.MLP((5,))
    return VAE(
        prior or priors.StandardNormal(LATENTS),
        likelihoods.Bernoulli((PIXELS,), LATENTS, net),
        guides.Normal((PIXELS,), LATENTS, net),
    ).double()


@pytest.fixture
def x():
    return torch.rand(BATCH, PIXELS, dtype=torch.float64).round()


class HeavyTailed(priors.Prior):
    """A prior from which the normal has no registered KL."""

    def forward(self):
        return dist.StudentT(torch.full((self.latent_dim,), 3.0).double()).to_event(1)


def surrogate(objective, vae, x, seed=1, **kwargs):
    torch.manual_seed(seed)
    return objective.surrogate(vae.model, vae.guide, (x,), **kwargs)


def grads(loss, params):
    return torch.autograd.grad(loss, params)


def mean_and_error(samples):
    samples = torch.stack(samples).detach()
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def test_terms_sum_to_the_bound_and_the_loss_is_its_negative(x):
    loss, terms = surrogate(ELBO(), make_vae(), x)
    torch.testing.assert_close(terms["elbo"], terms["reconstruction"] - terms["kl"])
    torch.testing.assert_close(loss.detach(), -terms["elbo"])
    assert not any(term.requires_grad for term in terms.values())


def test_analytic_kl_is_the_closed_form(x):
    vae = make_vae()
    _, terms = surrogate(ELBO(analytic_kl=True), vae, x)
    closed = kl_divergence(vae.posterior(x), vae.prior().expand([BATCH]))
    assert terms["kl"].item() == closed.sum().item()


@pytest.mark.parametrize("num_particles", [1, 5])
def test_analytic_and_sampled_kl_agree_in_the_mean(x, num_particles):
    vae = make_vae()
    _, closed = surrogate(ELBO(num_particles, analytic_kl=True), vae, x)
    draws = [surrogate(ELBO(num_particles), vae, x, seed)[1]["kl"] for seed in range(300)]
    mean, error = mean_and_error(draws)
    assert abs(mean - closed["kl"]) < 4 * error
    assert error > 0


def test_a_kl_without_closed_form_is_sampled_and_logged_once(x, caplog):
    vae, objective = make_vae(HeavyTailed(LATENTS)), ELBO(analytic_kl=True)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        loss, _ = surrogate(objective, vae, x)
        surrogate(objective, vae, x)
    torch.testing.assert_close(loss, surrogate(ELBO(), vae, x)[0])
    (record,) = caplog.records
    assert "'z' has no closed form" in record.message
    assert "Normal from StudentT" in record.message


class TwoLatents(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(0.8 z1, 1); the guide draws them in one order or the other."""

    def __init__(self, reverse):
        super().__init__()
        self.reverse = reverse
        self.weight = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.8 * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)

    def guide(self, x):
        first, second = ("z2", "z1") if self.reverse else ("z1", "z2")
        with pyro.plate("data", len(x)):
            z = pyro.sample(first, dist.Normal(0.5 * x, 0.6))
            pyro.sample(second, dist.Normal(self.weight * z, 0.5))

    def exact_kl(self, x):
        w = self.weight.item()
        order = [1, 0] if self.reverse else [0, 1]
        mean = torch.stack([0.5 * x, 0.5 * w * x], -1)[:, order]
        cov = torch.tensor([[0.36, 0.36 * w], [0.36 * w, 0.36 * w**2 + 0.25]]).double()
        q = dist.MultivariateNormal(mean, cov[order][:, order])
        p_cov = torch.tensor([[1, 0.8], [0.8, 1.64]], dtype=torch.float64)
        return kl_divergence(q, dist.MultivariateNormal(torch.zeros(2).double(), p_cov)).sum()


@pytest.mark.parametrize("reverse", [False, True])
def test_two_latents_are_integrated_in_closed_form_only_in_the_order_of_the_model(reverse, caplog):
    program, x = TwoLatents(reverse), torch.tensor([1.0, -2.0, 0.3]).double()
    objective = ELBO(num_particles=20, analytic_kl=True)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        draws = [surrogate(objective, program, x, seed)[1]["kl"] for seed in range(300)]
    mean, error = mean_and_error(draws)
    assert abs(mean - program.exact_kl(x)) < 4 * error
    assert ("another order" in caplog.text) == reverse


def test_beta_and_the_weight_of_training_multiply_the_kl_in_the_loss_alone(x):
    vae = make_vae()
    _, plain = surrogate(ELBO(), vae, x)
    loss, terms = surrogate(ELBO(beta=3.0), vae, x, kl_weight=torch.tensor(0.5))
    torch.testing.assert_close(loss.detach(), 1.5 * plain["kl"] - plain["reconstruction"])
    torch.testing.assert_close(terms, plain)


@pytest.mark.parametrize("analytic_kl", [False, True])
def test_a_scale_weighs_the_loss_and_not_the_report(x, analytic_kl):
    vae, objective = make_vae(), ELBO(analytic_kl=analytic_kl)
    plain, plain_terms = surrogate(objective, vae, x)
    scaled = VAEOf(poutine.scale(vae.model, 3.0), poutine.scale(vae.guide, 3.0))
    loss, terms = surrogate(objective, scaled, x)
    torch.testing.assert_close(loss, 3 * plain)
    torch.testing.assert_close(terms, plain_terms)


class VAEOf:
    def __init__(self, model, guide):
        self.model, self.guide = model, guide


def test_a_subsampling_plate_weighs_the_loss_and_not_the_report(x):
    def model(x, size=BATCH):
        with pyro.plate("data", size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x, size=BATCH):
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x[:, 1], 1.0))

    plain, plain_terms = surrogate(ELBO(), VAEOf(model, guide), x)
    large = VAEOf(lambda x: model(x, 10 * BATCH), lambda x: guide(x, 10 * BATCH))
    loss, terms = surrogate(ELBO(), large, x)
    torch.testing.assert_close(loss, 10 * plain)
    torch.testing.assert_close(terms, plain_terms)


def test_a_scale_on_the_prior_alone_is_not_lost_in_the_closed_form(x):
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.25):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 1], 0.5))

    program = VAEOf(model, guide)
    expected, _ = surrogate(ELBO(), program, x)
    loss, _ = surrogate(ELBO(analytic_kl=True), program, x)
    torch.testing.assert_close(loss, expected)


def test_a_masked_latent_is_left_out_of_the_closed_form(x):
    vae, seen = make_vae(), torch.arange(BATCH) < 2
    masked = VAEOf(poutine.mask(vae.model, mask=seen), poutine.mask(vae.guide, mask=seen))
    _, terms = surrogate(ELBO(analytic_kl=True), masked, x)
    closed = kl_divergence(vae.posterior(x), vae.prior().expand([BATCH]))
    torch.testing.assert_close(terms["kl"], closed[:2].sum().detach())


def test_particles_divide_the_variance_and_leave_the_mean(x):
    vae = make_vae()
    one = torch.stack([surrogate(ELBO(1), vae, x, s)[1]["elbo"] for s in range(300)])
    many = torch.stack([surrogate(ELBO(10), vae, x, s)[1]["elbo"] for s in range(300)])
    error = math.sqrt((one.var() + many.var()) / 300)
    assert abs(one.mean() - many.mean()) < 4 * error
    # A variance of 300 draws is known to sqrt(2 / 300) = 8 %, the ratio of two to 12 %.
    assert 0.06 < many.var() / one.var() < 0.16


@pytest.mark.parametrize("analytic_kl", [False, True])
def test_gradient_is_that_of_finite_differences(x, analytic_kl):
    vae, objective = make_vae(), ELBO(num_particles=3, analytic_kl=analytic_kl, beta=0.7)
    params = list(vae.parameters())
    direction = [torch.randn_like(p) for p in params]
    exact = grads(surrogate(objective, vae, x)[0], params)
    slope = sum((g * d).sum() for g, d in zip(exact, direction, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=step)
        values.append(surrogate(objective, vae, x)[0].item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope.item(), rel=1e-6)


class PPCA(nn.Module):
    """Probabilistic PCA with a linear guide: the bound is a closed form."""

    def __init__(self):
        super().__init__()
        for name, shape in (("w", (4, 2)), ("a", (2, 4)), ("raw", (2,))):
            value = 0.5 * torch.randn(shape, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.a.T, self.raw.exp()).to_event(1))

    def elbo(self, x):
        loc, scale = x @ self.a.T, self.raw.exp()
        fit = dist.Normal(loc @ self.w.T, 0.5).log_prob(x).sum()
        spread = len(x) * (self.w * scale).square().sum() / (2 * 0.25)
        kl = kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)).sum()
        return fit - spread - kl


@pytest.mark.parametrize("analytic_kl", [False, True])
def test_value_and_gradient_are_unbiased_for_probabilistic_pca(x, analytic_kl):
    ppca, objective = PPCA(), ELBO(num_particles=20, analytic_kl=analytic_kl)
    params = list(ppca.parameters())
    exact = [-ppca.elbo(x), *grads(-ppca.elbo(x), params)]
    draws = []
    for seed in range(200):
        loss, _ = surrogate(objective, ppca, x, seed)
        draws.append(torch.cat([t.flatten() for t in (loss, *grads(loss, params))]))
    mean, error = mean_and_error(draws)
    exact = torch.cat([t.flatten() for t in exact]).detach()
    # 19 numbers: one of them off by 5 standard errors has a chance of one in 90,000.
    assert ((mean - exact).abs() < 5 * error).all()


def test_gradient_is_that_of_trace_elbo_under_one_seed(x):
    vae = make_vae()
    params = list(vae.parameters())
    ours, _ = surrogate(ELBO(), vae, x)
    torch.manual_seed(1)
    theirs = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads(ours, params), grads(theirs, params))


def test_stock_svi_trains_with_it(x):
    vae = make_vae()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), loss=ELBO())
    before = {name: p.clone() for name, p in vae.named_parameters()}
    losses = [svi.step(x) for _ in range(200)]
    assert not any(torch.equal(p, before[name]) for name, p in vae.named_parameters())
    assert sum(losses[-20:]) < sum(losses[:20])
    assert isinstance(svi.evaluate_loss(x), float)


def mixture(x):
    """A label summed out beside a normal latent, and by hand what it should be."""

    def model(x):
        with pyro.plate("data", len(x)):
            logits = x.new_tensor([0.2, -0.4, 0.1])
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + y, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.6))

    def bound(weight):
        torch.manual_seed(1)
        z = dist.Normal(0.5 * x, 0.6).sample()
        kl = dist.Normal(0.5 * x, 0.6).log_prob(z) - dist.Normal(x.new_zeros(()), 1.0).log_prob(z)
        log_py = dist.Categorical(logits=x.new_tensor([0.2, -0.4, 0.1])).logits[:, None]
        log_px = dist.Normal(z + torch.arange(3.0)[:, None].to(x), 0.7).log_prob(x)
        return ((log_py + log_px).logsumexp(0) - weight * kl).sum()

    return VAEOf(model, guide), bound


def test_an_enumerated_site_is_summed_out_and_the_kl_weight_still_counts():
    x = torch.tensor([0.3, 2.0, 1.1]).double()
    program, bound = mixture(x)
    loss, terms = surrogate(ELBO(beta=0.5), program, x, kl_weight=0.4)
    torch.testing.assert_close(loss, -bound(0.2))
    torch.testing.assert_close(terms["elbo"], bound(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELBO(num_particles=0), "num_particles must be at least 1, got 0"),
        (lambda: ELBO(num_particles=2.5), "num_particles must be at least 1, got 2.5"),
        (lambda: ELBO(beta=-1), "beta must not be negative, got -1"),
        (lambda: ELBO(free_bits=-1), "free_bits must not be negative, got -1"),
        (lambda: MIWAE(num_bounds=0), "num_bounds must be at least 1, got 0"),
        (lambda: MIWAE(num_bounds=2.5), "num_bounds must be at least 1, got 2.5"),
        (lambda: ReweightedWakeSleep(insomnia=2), "insomnia must lie between 0 and 1, got 2"),
        (lambda: ScoreFunction(1), "needs num_particles of at least 2, got 1"),
        (lambda: ScoreFunction(2, "moving"), "baseline must be 'leave-one-out' or 'none'"),
        (lambda: MMD(alpha=1.5), "alpha must be at most 1, got 1.5"),
        (lambda: MMD(alpha=0.5, penalty=0.2), "penalty must be at least 1 - alpha = 0.5, got 0.2"),
        (lambda: Denoising("salt"), "noise must be 'mask', 'flip' or 'normal', got 'salt'"),
        (lambda: Denoising("mask", 1.5), "level of mask noise must lie between 0 and 1, got 1.5"),
        (lambda: Denoising("normal", -1), "level of normal noise must not be negative, got -1"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guide_that_cannot_be_differentiated_through_is_refused(x):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(x[:, 0] + 1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_ones(())))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"'z' \(Poisson\) cannot be differentiated through"):
        surrogate(ELBO(), VAEOf(model, guide), x)


def test_an_objective_of_ones_own_needs_a_surrogate(x):
    vae = make_vae()
    with pytest.raises(NotImplementedError):
        objectives.Objective().loss(vae.model, vae.guide, x)


# Free bits ----------------------------------------------------------------------------------------


def test_free_bits_are_those_of_each_dimension_averaged_over_the_batch(x):
    vae, floor = make_vae(), 0.1
    loss, terms = surrogate(
        ELBO(analytic_kl=True, beta=0.5, free_bits=floor), vae, x, kl_weight=0.8
    )
    q = vae.posterior(x).base_dist
    each = kl_divergence(q, dist.Normal(torch.zeros(()).double(), 1.0)).mean(0)
    assert each.min() < floor < each.max()
    expected = 0.4 * BATCH * each.clamp(min=floor).sum() - terms["reconstruction"]
    torch.testing.assert_close(loss, expected)
    plain = surrogate(ELBO(analytic_kl=True), vae, x)[1]
    torch.testing.assert_close(terms, plain)


def test_free_bits_agree_with_and_without_a_closed_form(x):
    vae = make_vae()
    closed, _ = surrogate(ELBO(4000, analytic_kl=True, free_bits=0.1), vae, x)
    sampled, _ = surrogate(ELBO(4000, free_bits=0.1), vae, x)
    torch.testing.assert_close(sampled, closed, rtol=0.005, atol=0)


def test_dimensions_below_the_floor_are_left_alone(x):
    vae = make_vae()
    (free,) = grads(surrogate(ELBO(free_bits=1e3), vae, x)[0], [vae.encoder.net.bias])
    (none,) = grads(surrogate(ELBO(beta=0.0), vae, x)[0], [vae.encoder.net.bias])
    torch.testing.assert_close(free, none)


def test_free_bits_of_a_prior_that_does_not_factorise_are_those_of_the_site(x, caplog):
    class Correlated(priors.Prior):
        def forward(self):
            cov = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
            return dist.MultivariateNormal(torch.zeros(2).double(), cov)

    vae = make_vae(Correlated(LATENTS))
    plain, terms = surrogate(ELBO(), vae, x)
    assert terms["kl"] > 0
    for floor, kl in ((1e-9, terms["kl"]), (7.0, torch.tensor(7.0 * BATCH).double())):
        loss, _ = surrogate(ELBO(free_bits=floor), vae, x)
        torch.testing.assert_close(loss.detach(), kl - terms["reconstruction"])
    assert "'z' has one floor for all its dimensions" in caplog.text
    assert plain.requires_grad


def test_free_bits_leave_a_masked_latent_out(x):
    vae, seen = make_vae(), torch.arange(BATCH) < 2
    masked = VAEOf(poutine.mask(vae.model, mask=seen), poutine.mask(vae.guide, mask=seen))
    loss, terms = surrogate(ELBO(analytic_kl=True, free_bits=1e-9), masked, x)
    torch.testing.assert_close(loss.detach(), -terms["elbo"])


def test_free_bits_have_no_meaning_beside_a_scale_or_an_enumerated_site(x):
    vae = make_vae()
    scaled = VAEOf(poutine.scale(vae.model, 3.0), poutine.scale(vae.guide, 3.0))
    with pytest.raises(ValueError, match="has a scale"):
        surrogate(ELBO(free_bits=1.0), scaled, x)
    x = torch.tensor([0.3, 2.0]).double()
    with pytest.raises(ValueError, match="take free_bits=0"):
        surrogate(ELBO(free_bits=1.0), mixture(x)[0], x)


def test_several_latents_are_reported_one_by_one():
    program, x, vae = TwoLatents(False), torch.tensor([1.0, -2.0, 0.3]).double(), make_vae()
    terms = report(program.model, program.guide, (x,))
    torch.testing.assert_close(terms["kl_z1"] + terms["kl_z2"], terms["kl"])
    assert not {"kl_z"} & report(vae.model, vae.guide, (torch.zeros(2, 4).double(),)).keys()


@pytest.mark.parametrize(
    "objective",
    [
        IWAE(1),
        MIWAE(1, 1),
        DReG(1),
        StickingTheLanding(1),
        ScoreFunction(1, "none"),
        ReweightedWakeSleep(1),
        ReweightedWakeSleep(1, insomnia=0.4),
    ],
)
def test_the_weight_of_training_counts_in_the_value_of_every_loss(x, objective):
    loss, terms = surrogate(objective, make_vae(), x, kl_weight=0.4)
    torch.testing.assert_close(loss.detach(), 0.4 * terms["kl"] - terms["reconstruction"])


# Importance weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "bounds"),
    [(IWAE(6), 1), (DReG(6), 1), (ReweightedWakeSleep(6), 1), (MIWAE(2, 3), 3)],
    ids=["IWAE", "DReG", "ReweightedWakeSleep", "MIWAE"],
)
def test_bounds_are_those_of_the_log_weights_of_each_datum(x, objective, bounds):
    vae = make_vae()
    loss, terms = surrogate(objective, vae, x)
    torch.manual_seed(1)
    log_w = log_weights(vae.model, vae.guide, (x,), 6).view(bounds, 6 // bounds, BATCH)
    bound = (log_w.logsumexp(1) - math.log(6 // bounds)).mean(0).sum()
    torch.testing.assert_close(terms["bound"], bound.detach())
    torch.testing.assert_close(loss.detach(), -bound.detach())
    torch.testing.assert_close(terms["elbo"], log_w.mean((0, 1)).sum().detach())


@pytest.mark.parametrize("objective", [IWAE(3), DReG(3), ReweightedWakeSleep(3), ScoreFunction(3)])
def test_an_enumerated_site_of_the_model_is_summed_out_in_every_weight(objective):
    x = torch.tensor([0.3, 2.0, 1.1]).double()
    program, _ = mixture(x)
    _, terms = surrogate(objective, program, x)
    torch.manual_seed(1)
    log_w = log_weights(program.model, program.guide, (x,), 3)
    torch.testing.assert_close(terms["elbo"], log_w.mean(0).sum())


def labelled(x):
    """A guide that sums a label out."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(3)))
            z = pyro.sample("z", dist.Normal(y.to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.5 * (x + y), 0.6))

    return VAEOf(model, guide)


def test_a_site_enumerated_in_the_guide_is_summed_out_or_refused():
    x = torch.tensor([0.3, 2.0, 1.1]).double()
    _, terms = surrogate(IWAE(3), labelled(x), x)
    torch.manual_seed(1)
    log_w = log_weights(labelled(x).model, labelled(x).guide, (x,), 3)
    torch.testing.assert_close(terms["bound"], (log_w.logsumexp(0) - math.log(3)).sum())
    for objective in (DReG(), StickingTheLanding(), ReweightedWakeSleep(), ScoreFunction(), MMD()):
        with pytest.raises(ValueError, match="'y' is enumerated, and this objective needs its"):
            surrogate(objective, labelled(x), x)


@pytest.mark.parametrize(
    "objective",
    [IWAE(), DReG(), StickingTheLanding(), ScoreFunction(), ReweightedWakeSleep(), MMD()],
)
def test_a_scale_is_refused_where_it_would_weigh_only_a_part(x, objective):
    vae = make_vae()
    scaled = VAEOf(poutine.scale(vae.model, 3.0), vae.guide)
    with pytest.raises(ValueError, match="has a scale"):
        surrogate(objective, scaled, x)


@pytest.mark.parametrize(
    "objective", [DReG(), StickingTheLanding(), ReweightedWakeSleep(), ScoreFunction()]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_guide_that_scores_only_its_own_draws_is_refused(objective, layers):
    flow = dist.transforms.Planar(2).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if layers == 2:
                z = z + pyro.sample("y", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            if layers == 2:
                pyro.sample("y", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    program, x = VAEOf(model, guide), torch.tensor([0.3, 2.0, 1.1]).double()
    with pytest.raises(ValueError, match=r"'z' \(TransformedDistribution\) scores only its own"):
        surrogate(objective, program, x)
    assert surrogate(IWAE(), program, x)[0].isfinite()


# Wake and sleep -----------------------------------------------------------------------------------


def test_data_that_the_model_does_not_observe_as_they_are_cannot_be_dreamt(x):
    vae = VAE(*make_vae()._init_args.values(), missing=True).double()
    with pytest.raises(ValueError, match="take insomnia=1"):
        surrogate(ReweightedWakeSleep(insomnia=0.5), vae, x)
    assert surrogate(ReweightedWakeSleep(), vae, x)[0].isfinite()


# A plain autoencoder ------------------------------------------------------------------------------


def autoencoder():
    vae = make_vae()

    def guide(x):
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(vae.posterior(x).mean, event_dim=1))

    return vae, VAEOf(vae.model, guide)


@pytest.mark.parametrize("objective", [ELBO(), ELBO(2, analytic_kl=True), MMD(), Denoising()])
def test_a_guide_without_density_is_trained_by_what_needs_only_draws(x, objective, caplog):
    vae, program = autoencoder()
    loss, terms = surrogate(objective, program, x)
    assert all(grad.any() for grad in grads(loss, list(vae.parameters())))
    if type(objective) is ELBO:
        z = vae.posterior(x).mean
        log_joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
        torch.testing.assert_close(terms["elbo"], log_joint.sum().detach())
    surrogate(objective, program, x)
    assert caplog.text.count("'z' has no density: what is called elbo is log p(x, z)") == 1
    report(program.model, program.guide, (x,))


@pytest.mark.parametrize(
    "objective",
    [
        IWAE(),
        DReG(),
        StickingTheLanding(),
        ReweightedWakeSleep(),
        ScoreFunction(),
        ELBO(free_bits=1),
    ],
)
def test_a_guide_without_density_is_refused_where_one_is_needed(x, objective):
    program = Program(*vars(autoencoder()[1]).values())
    with pytest.raises(ValueError, match="'z' is a Delta, which has no density"):
        surrogate(objective, program, x)
    with pytest.raises(ValueError, match="'z' is a Delta, which has no density"):
        fit(program, x, objective=objective, epochs=1, progress=False)


# Maximum mean discrepancy -------------------------------------------------------------------------


def by_hand(z, prior):
    """The discrepancy, pair by pair."""
    n = len(z)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    spread = sum((prior[i] - prior[j]).square().sum() for i, j in pairs) / len(pairs)

    def kernel(a, b):
        squared = (a - b).square().sum()
        scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        return sum(s * spread / (s * spread + squared) for s in scales) / 7

    within = sum(kernel(z[i], z[j]) + kernel(prior[i], prior[j]) for i, j in pairs) / len(pairs)
    return within - 2 * sum(kernel(a, b) for a in z for b in prior) / n**2


def test_the_discrepancy_is_that_of_all_pairs():
    z, prior = torch.randn(4, 5, 3).double() + 1, torch.randn(5, 3).double()
    expected = torch.stack([by_hand(one, prior) for one in z])
    torch.testing.assert_close(mmd(z, prior), expected)


def test_the_discrepancy_of_two_samples_is_zero_for_one_distribution_alone():
    same = mmd(torch.randn(2000, 20, 2), torch.randn(20, 2))
    draws = torch.stack([mmd(torch.randn(20, 2), torch.randn(20, 2)) for _ in range(1000)])
    assert draws.mean().abs() < 4 * draws.std() / math.sqrt(1000) + 1e-3
    assert mmd(torch.randn(2000, 20, 2) + 1, torch.randn(20, 2)).mean() > same.mean() + 0.05


def test_the_discrepancy_joins_the_loss_once_per_datum():
    program, x = TwoLatents(False), torch.tensor([1.0, -2.0, 0.3]).double()
    objective = MMD(alpha=0.75, penalty=10.0, num_particles=2)
    loss, terms = surrogate(objective, program, x, kl_weight=0.5)
    plain, plain_terms = surrogate(ELBO(2, beta=0.25), program, x, kl_weight=0.5)
    torch.testing.assert_close(loss, plain + 9.75 * terms["mmd"])
    torch.manual_seed(1)
    drawn = draw(program.guide, (x,), 2).values
    _, prior = simulate(program.model, (x,))
    codes, prior = (torch.stack([v["z1"], v["z2"]], -1) for v in (drawn, prior))
    expected = sum(by_hand(z, prior) for z in codes.detach().view(2, 3, 2)) / 2
    torch.testing.assert_close(terms.pop("mmd"), 3 * expected)
    torch.testing.assert_close(terms, plain_terms)


def test_a_batch_of_one_has_no_discrepancy(x):
    with pytest.raises(ValueError, match="take a batch_size of at least 2"):
        surrogate(MMD(), make_vae(), x[:1])


# Denoising ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["mask", "flip", "normal"])
def test_denoising_at_level_zero_is_the_elbo(x, noise):
    vae = make_vae()
    torch.manual_seed(1)
    Denoising(noise).corrupt(x)  # as much noise as training takes
    expected = ELBO(2, beta=0.5).surrogate(vae.model, vae.guide, (x,))
    found = surrogate(Denoising(noise, level=0.0, num_particles=2, beta=0.5), vae, x)
    torch.testing.assert_close(found, expected)


def test_noise_is_what_it_says():
    x = torch.tensor([0.0, 1.0]).repeat(20_000, 1)
    masked, flipped = Denoising("mask", 0.3).corrupt(x), Denoising("flip", 0.3).corrupt(x)
    noisy = Denoising("normal", 0.3).corrupt(x)
    torch.testing.assert_close(masked.mean(0), torch.tensor([0.0, 0.7]), rtol=0, atol=0.02)
    torch.testing.assert_close(flipped.mean(0), torch.tensor([0.3, 0.7]), rtol=0, atol=0.02)
    torch.testing.assert_close((noisy - x).std(0), torch.tensor([0.3, 0.3]), rtol=0.03, atol=0)
    assert set(masked.unique().tolist()) == set(flipped.unique().tolist()) == {0.0, 1.0}


def test_the_guide_alone_sees_noise_and_in_the_first_argument_alone():
    def model(x, y):
        seen["model"] = x, y
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        seen["guide"] = x, y
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    seen, x, y = {}, torch.ones(4), torch.ones(4)
    Denoising("mask", level=1.0).surrogate(model, guide, (x, y))
    assert not seen["guide"][0].any()
    assert all(tensor.all() for tensor in (seen["guide"][1], *seen["model"]))


# Every objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_moves_every_parameter(name, x):
    vae = make_vae()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    history = fit(vae, x, objective=OBJECTIVES[name](), epochs=2, batch_size=3, progress=False)
    assert all(math.isfinite(row["elbo"]) for row in history)
    assert not any(torch.equal(before[key], value) for key, value in vae.state_dict().items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pyros_svi_moves_every_parameter(name):
    program = exact.PPCA(width=1.3, shift=0.3)
    before = {key: value.clone() for key, value in program.state_dict().items()}
    svi = SVI(program.model, program.guide, Adam({"lr": 0.01}), OBJECTIVES[name]())
    x = program.sample(7)
    assert all(math.isfinite(svi.step(x)) for _ in range(2))
    assert math.isfinite(svi.evaluate_loss(x))
    assert not any(torch.equal(before[key], value) for key, value in program.state_dict().items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_value_needs_no_gradients_and_is_that_of_the_loss(name, x):
    vae, objective = make_vae(), OBJECTIVES[name]()
    loss, terms = surrogate(objective, vae, x)
    with torch.no_grad():
        again, also = surrogate(objective, vae, x)
    torch.testing.assert_close(again, loss.detach())
    torch.testing.assert_close(also, terms)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.slow
def test_every_objective_traces_to_one_graph(name, x):
    vae, objective = make_vae(), OBJECTIVES[name]()

    def loss(kl_weight, x):
        return objective.surrogate(vae.model, vae.guide, (x,), kl_weight)

    step = compiled.with_gradients(loss, list(vae.parameters()))
    args = torch.tensor(0.7), x
    with validation(False):
        graph = torch.no_grad()(make_fx(step)(*args))
    results = []
    for run in (step, graph):
        torch.manual_seed(2)
        results.append(run(*args))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
