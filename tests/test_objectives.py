"""The ELBO: its value, its gradient, what weighs it and what is reported."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence

from pyrovae import VAE, guides, likelihoods, nets, objectives, priors
from pyrovae.objectives import ELBO

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
    ("arguments", "message"),
    [({"num_particles": 0}, "num_particles must be at least 1"), ({"beta": -1}, "beta must not")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ELBO(**arguments)


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
