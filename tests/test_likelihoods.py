"""Likelihoods against what is known of them: arithmetic with many digits, enumeration, formulas."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from table import INDEPENDENT, LATENTS, LIKELIHOODS, NET, SEQUENCES
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae
from pyrovae import (
    _build,
    _settings,
    cli,
    compiled,
    data,
    guides,
    likelihoods,
    objectives,
    priors,
    program,
)
from pyrovae._distributions import Beta, NegativeBinomial, OptimalNormal, ZeroInflated
from pyrovae._levels import DiscretizedLogistic, Lattice, Levels
from pyrovae.program import log_joint

COLOUR = (3, 2, 1)


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(make: Callable[..., Any], shape: tuple[int, ...] = (1, 3, 4), **arguments: Any) -> Any:
    """A likelihood with weights of some size."""
    part = make(shape, LATENTS, NET, **arguments)
    with torch.no_grad():
        for param in part.parameters():
            param.add_(0.5 * torch.randn_like(param))
    return part


def vae_of(likelihood: Any, missing: bool = False) -> Any:
    guide = guides.Normal(likelihood.shape, LATENTS, NET)
    return pyrovae.VAE(priors.StandardNormal(LATENTS), likelihood, guide, missing)


# Discretized logistic -----------------------------------------------------------------------------

LOCS = (-1e4, -50.0, -1.0, 0.0, 3.3, 127.5, 254.9, 300.0, 1e4)
SCALES = (1e-3, 0.01, 0.3, 3.0, 100.0, 1e4)


def _exact(level: int, loc: float, scale: float, top: int = 255) -> float:
    """Log probability by 60 digits."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, MAX_EMAX, MIN_EMIN
        a = (Decimal(level) - Decimal("0.5") - Decimal(loc)) / Decimal(scale)
        b = (Decimal(level) + Decimal("0.5") - Decimal(loc)) / Decimal(scale)
        if level == 0:
            return float(-(1 + (-b).exp()).ln())
        if level == top:
            return float(-(1 + a.exp()).ln())
        if a + b > 0:  # the tail in which the difference is not of two ones
            a, b = -b, -a
        below, above = (t.exp() / (1 + t.exp()) for t in (a, b))
        return float((above - below).ln())


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_discretized_logistic_is_exact(dtype: torch.dtype, rtol: float, level: int) -> None:
    pairs = torch.tensor(list(itertools.product(LOCS, SCALES)), dtype=dtype)
    loc, scale = pairs.unbind(-1)
    loc.requires_grad_()
    scale.requires_grad_()
    exact = torch.tensor([_exact(level, a, s) for a, s in pairs.tolist()])
    log_prob = DiscretizedLogistic(loc, scale, 255).log_prob(torch.full_like(loc, level))
    torch.testing.assert_close(log_prob.double(), exact, rtol=rtol, atol=rtol)
    for slope in torch.autograd.grad(log_prob.sum(), (loc, scale)):
        assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_discretized_logistic_sums_to_one(dtype: torch.dtype) -> None:
    loc, scale = torch.tensor(list(itertools.product(LOCS, SCALES)), dtype=dtype).unbind(-1)
    px = DiscretizedLogistic(loc, scale, 255)
    levels = torch.arange(256, dtype=dtype)[:, None].expand(-1, len(loc))
    total = px.log_prob(levels).logsumexp(0)
    # Far from the ends float32 knows a location to so many scales and no better.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    near = ((loc - loc.round()).abs() < 0.49) | (scale > 0.1) | (dtype == torch.float64)
    assert total[near].abs().max() < tolerance
    mean = (px.log_prob(levels).exp() * levels).sum(0)
    torch.testing.assert_close(px.mean[near], mean[near], rtol=1e-4, atol=1e-3)


def test_discretized_logistic_starts_at_the_spread_of_the_data() -> None:
    x = (0.5 + 0.1 * torch.randn(4000, 5)).clamp(0, 1).mul(255).round() / 255
    for make in (likelihoods.DiscretizedLogistic, likelihoods.DiscretizedLogisticMixture):
        part = make((5,), LATENTS, NET)
        part.initialize(x)
        draws = part(torch.zeros(LATENTS)).sample((4000,))
        torch.testing.assert_close(draws.std(0), x.std(0), rtol=0.3, atol=0)


# Mixture over the channels of a pixel -------------------------------------------------------------


def colours() -> Tensor:
    return torch.cartesian_prod(*[torch.arange(4.0)] * 3)


def _pixel(part: Any, z: Tensor, row: int) -> Tensor:
    """Probabilities of a pixel's 64 colours, shape `(4, 4, 4)`, by differences of sigmoids."""
    logits, loc, raw, coupling = part.split(part.net(z))
    weight = logits[:, 0, row, 0].softmax(0)
    scale = 3 * torch.nn.functional.softplus(raw[:, :, row, 0]) + 0.01
    total = torch.zeros(4, 4, 4)
    for r, g, b in itertools.product(range(4), repeat=3):
        x = torch.tensor([r, g, b]).double()
        red, green, blue = coupling[:, :, row, 0].tanh().unbind(1)
        to_green = red * (x[0] - 1.5)
        to_blue = green * (x[0] - 1.5) + blue * (x[1] - 1.5)
        at = 3 * loc[:, :, row, 0] + torch.stack([0 * red, to_green, to_blue], 1)
        high = torch.where(x < 3, ((x + 0.5 - at) / scale).sigmoid(), 1.0)
        low = torch.where(x > 0, ((x - 0.5 - at) / scale).sigmoid(), 0.0)
        total[r, g, b] = (weight * (high - low).prod(1)).sum()
    return total


@torch.no_grad()
def test_a_coloured_pixel_is_a_mixture_whose_channels_follow_each_other() -> None:
    part = small(likelihoods.DiscretizedLogisticMixture, COLOUR, max_value=3, num_components=2)
    z = torch.randn(LATENTS)
    upper, lower = _pixel(part, z, 0), _pixel(part, z, 1)
    torch.testing.assert_close(upper.sum(), torch.tensor(1.0))
    x = torch.stack([colours(), colours().flip(0)], -1)[..., None] / 3
    expected = (upper.flatten() * lower.flatten().flip(0)).log()
    torch.testing.assert_close(part(z).log_prob(x), expected)


@torch.no_grad()
def test_a_mixture_over_channels_sums_to_one_and_draws_what_it_scores() -> None:
    part = small(likelihoods.DiscretizedLogisticMixture, (3, 1, 1), max_value=3, num_components=3)
    z = torch.randn(2, LATENTS)
    px = part(z)
    every = colours()[:, None, :, None, None].expand(-1, 2, -1, -1, -1) / 3
    probability = px.log_prob(every).exp()
    torch.testing.assert_close(probability.sum(0), torch.ones(2))
    draws = (px.sample((40_000,)) * 3).round().long().flatten(2)
    code = (draws * torch.tensor([16, 4, 1])).sum(-1)
    found = torch.stack([torch.bincount(column, minlength=64) for column in code.T], 1) / 40_000
    error = (probability * (1 - probability) / 40_000).sqrt()
    assert ((found - probability).abs() <= 5 * error + 1e-4).all()


@pytest.mark.parametrize("lead", [(), (5,), (3, 5)])
def test_a_mixture_over_channels_has_the_shapes_of_a_likelihood(lead: tuple[int, ...]) -> None:
    part = small(likelihoods.DiscretizedLogisticMixture, COLOUR, num_components=2)
    px = part(torch.randn(*lead, LATENTS))
    x = px.sample((4,))
    assert (px.batch_shape, px.event_shape, px.mean.shape) == (lead, COLOUR, (*lead, *COLOUR))
    assert x.shape == (4, *lead, *COLOUR)
    assert px.support.check(x).all()
    assert torch.equal(px.expand((2, *lead)).log_prob(x[:2]), px.log_prob(x[:2]))
    px.log_prob(x).sum().backward()
    assert all(param.grad.isfinite().all() and param.grad.any() for param in part.parameters())


def test_a_mixture_over_channels_has_its_mean_where_nothing_is_cut_off() -> None:
    part = likelihoods.DiscretizedLogisticMixture((3, 1, 1), LATENTS, NET, num_components=2)
    part.initialize(torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1) + 0.02 * torch.randn(999, 3, 1, 1))
    with torch.no_grad():
        part.split(part.net.bias)[3].fill_(0.7)
        px = part(torch.zeros(LATENTS))
        x = px.sample((20_000,))
    error = x.std(0) / math.sqrt(len(x))
    assert ((x.mean(0) - px.mean).abs() < 5 * error + 1e-4).all()


def test_a_mixture_of_entries_is_a_mixture_of_logistics() -> None:
    part = small(likelihoods.DiscretizedLogisticMixture, (4,), max_value=3, num_components=2)
    z = torch.randn(5, LATENTS)
    logits, loc, raw, coupling = part.split(part.net(z))
    assert coupling.numel() == 0
    scale = 3 * torch.nn.functional.softplus(raw) + 0.01
    x = torch.arange(4.0) / 3
    each = DiscretizedLogistic(3 * loc, scale, 3).log_prob(3 * x)
    expected = (logits.log_softmax(1) + each).logsumexp(1).sum((1, 2))
    torch.testing.assert_close(part(z).log_prob(x.expand(5, -1)), expected)


def test_components_of_a_mixture_start_apart() -> None:
    part = likelihoods.DiscretizedLogisticMixture((4,), LATENTS, NET)
    part.initialize(torch.rand(500, 4).mul(255).round() / 255)
    loc = part.split(part.net.bias)[1]
    assert (loc.diff(dim=0) > 0.05).all()


def test_channels_that_lead_each_other_refuse_missing_entries() -> None:
    vae = vae_of(small(likelihoods.DiscretizedLogisticMixture, COLOUR), missing=True)
    with pytest.raises(ValueError, match="need a likelihood whose entries are independent given z"):
        pyrovae.elbo(vae.model, vae.guide, torch.zeros(7, *COLOUR))


# Sequences ----------------------------------------------------------------------------------------

SEQUENCE_SHAPES = [(6,), (3, 2), (2, 3, 1)]


def every_binary(shape: tuple[int, ...]) -> Tensor:
    """All binary data of this shape, shape `(2^D, *shape)`."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * math.prod(shape)).view(-1, *shape)


@torch.no_grad()
@pytest.mark.parametrize("shape", SEQUENCE_SHAPES, ids=str)
def test_binary_sequences_sum_to_one_and_are_drawn_as_scored(shape: tuple[int, ...]) -> None:
    px = small(likelihoods.RecurrentBernoulli, shape, hidden=4)(2 * torch.randn(2, LATENTS))
    every = every_binary(shape)
    probability = px.log_prob(every[:, None]).exp()
    torch.testing.assert_close(probability.sum(0), torch.ones(2))
    expected = torch.einsum("xn,x...->n...", probability, every)
    assert (px.mean - expected).abs().max() < 0.1
    draws = px.sample((40_000,)).flatten(2)
    code = (draws * 2 ** torch.arange(5.0, -1, -1)).sum(-1).long()
    found = torch.stack([torch.bincount(column, minlength=64) for column in code.T], 1) / 40_000
    error = (probability * (1 - probability) / 40_000).sqrt()
    assert ((found - probability).abs() <= 5 * error + 1e-4).all()


@torch.no_grad()
def test_real_sequences_integrate_to_one_and_are_drawn_as_scored() -> None:
    px = small(likelihoods.RecurrentNormal, (2,), hidden=4)(torch.randn(LATENTS))
    line = torch.linspace(-20, 20, 401)
    density = px.log_prob(torch.cartesian_prod(line, line)).exp().view(401, 401)
    mass = density * (line[1] - line[0]) ** 2
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0), rtol=1e-6, atol=0)
    draws = px.sample((40_000,))
    second = (mass.sum(0) * line).sum(), (mass * line[:, None] * line).sum()
    for found, expected in zip((draws[:, 1], draws.prod(1)), second, strict=True):
        assert abs(found.mean() - expected) < 5 * found.std() / 200


@torch.no_grad()
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_step_knows_z_and_the_steps_before(name: str) -> None:
    part = small(getattr(likelihoods, name), (5, 2), hidden=4)
    z, x = torch.randn(LATENTS), LIKELIHOODS[name]()(torch.zeros(LATENTS)).sample().view(-1)[:10]
    x = x.view(5, 2)
    state, given = part.net(z).split([4, 12])
    state, log_prob = state.tanh(), torch.zeros(())
    for t in range(5):
        read = torch.zeros(3) if t == 0 else torch.cat([x[t - 1], torch.ones(1)])
        state = part.unit(part.unit.read(read) + given, state)
        log_prob = log_prob + part.step(part.head(state) + part.bias[t]).log_prob(x[t])
    torch.testing.assert_close(part(z).log_prob(x), log_prob)


@pytest.mark.parametrize("name", SEQUENCES)
def test_word_dropout_is_for_training_alone(name: str) -> None:
    part = small(getattr(likelihoods, name), (4, 2), hidden=4, word_dropout=0.5)
    z = torch.randn(30, LATENTS)
    px = part(z)
    x = px.sample()
    assert not torch.equal(px.log_prob(x), px.log_prob(x))
    part.eval()
    assert torch.equal(px.log_prob(x), px.log_prob(x))
    whole = getattr(likelihoods, name)((4, 2), LATENTS, NET, hidden=4)
    whole.load_state_dict(part.state_dict())
    torch.testing.assert_close(whole(z).log_prob(x), px.log_prob(x))


def test_a_step_that_is_dropped_is_not_read() -> None:
    part = small(likelihoods.RecurrentBernoulli, (9, 2), hidden=4, word_dropout=0.3)
    steps = torch.ones(1000, 9, 2)
    read = part._before(steps)
    assert not read[:, 0].any()
    assert set(read[:, 1:].sum(-1).unique().tolist()) == {0.0, 3.0}
    kept = read[:, 1:, -1].mean()
    assert abs(kept - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 8000)


@torch.no_grad()
def test_a_row_has_the_same_mean_in_any_batch() -> None:
    part, z = small(likelihoods.RecurrentNormal, (4, 2), hidden=4), torch.randn(5, LATENTS)
    generator = torch.get_rng_state()
    together = part(z).mean
    torch.testing.assert_close(together, torch.stack([part(row).mean for row in z]))
    torch.testing.assert_close(together, part(z.view(5, 1, -1)).mean[:, 0])
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_other_rates_of_word_dropout_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="word_dropout must be at least 0 and below 1"):
        likelihoods.RecurrentBernoulli((4,), LATENTS, word_dropout=rate)


def test_a_recurrent_decoder_learns_what_a_step_tells_of_the_next() -> None:
    """An autoregression, x_t ~ N(0.9 x_t-1, 0.19), whose density is known."""
    torch.set_default_dtype(torch.float32)
    x = torch.randn(2, 1000, 6)
    for t in range(1, 6):
        x[..., t] = 0.9 * x[..., t - 1] + 0.19**0.5 * x[..., t]
    truth = dist.Normal(0, 1).log_prob(x[1, :, 0])
    truth = truth + dist.Normal(0.9 * x[1, :, :-1], 0.19**0.5).log_prob(x[1, :, 1:]).sum(-1)
    vae = vae_of(likelihoods.RecurrentNormal((6,), LATENTS, NET, hidden=8))
    pyrovae.fit(vae, x[0], epochs=20, lr=0.02, compile=False, progress=False)
    gap = truth - pyrovae.elbo(vae.model, vae.guide, x[1], 10, seed=0)
    assert -0.02 < gap.mean() < 0.15


def test_sequences_refuse_missing_entries() -> None:
    vae = vae_of(small(likelihoods.RecurrentNormal, (3, 2), hidden=4), missing=True)
    with pytest.raises(ValueError, match="need a likelihood whose entries are independent given z"):
        pyrovae.elbo(vae.model, vae.guide, torch.zeros(7, 3, 2))


# Levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 16, 255, 65535])
def test_the_lattice_knows_its_points_in_single_precision(top: int) -> None:
    x = torch.arange(top + 1, dtype=torch.float32) / top
    assert Lattice(top).check(x).all()
    assert not Lattice(top).check(x + 0.3 / top).any()
    assert not Lattice(top).check(torch.tensor([-1.0, 1 + 1 / top, math.nan])).any()
    assert str(Lattice(top)) == f"multiples of 1/{top} from 0 to 1"


@pytest.mark.parametrize("top", [0, -1, 2.5, "many", True])
@pytest.mark.parametrize("name", ["Binomial", "Categorical", "DiscretizedLogistic"])
def test_other_highest_levels_are_refused(name: str, top: Any) -> None:
    with pytest.raises(ValueError, match="max_value must be a whole number from 1 on"):
        getattr(likelihoods, name)((2,), LATENTS, NET, max_value=top)


@pytest.mark.parametrize("num", [0, 2.5])
def test_no_components_and_half_ones_are_refused(num: Any) -> None:
    with pytest.raises(ValueError, match=f"num_components must be positive integers, got {num}"):
        likelihoods.DiscretizedLogisticMixture((2,), LATENTS, NET, num_components=num)


def test_images_without_channels_are_no_rows_of_channels() -> None:
    with pytest.raises(ValueError, match=r"shape must be \(1, 28, 28\) for one channel, got"):
        likelihoods.DiscretizedLogisticMixture((28, 28), LATENTS, NET)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_are_scored_by_number(dtype: torch.dtype) -> None:
    for top in (*range(1, 120), 255):  # 1 / 49 * 49 is less than one
        logits = torch.randn(top + 1, dtype=dtype)
        px = Levels(dist.Categorical(logits=logits), top)
        x = torch.arange(top + 1, dtype=dtype) / top
        torch.testing.assert_close(px.log_prob(x), logits.log_softmax(0))
    with pytest.raises(ValueError, match="support"):
        Levels(dist.Categorical(logits=logits), 255, validate_args=True).log_prob(x + 0.5 / 255)


def test_categorical_starts_at_the_frequencies_of_the_data() -> None:
    x = torch.tensor([0.0, 0.0, 0.5, math.nan])[:, None].expand(-1, 3).repeat(1000, 1)
    part = likelihoods.Categorical((3,), LATENTS, NET, max_value=2)
    part.initialize(x)
    probs = part(torch.zeros(LATENTS)).base_dist.base.probs
    expected = torch.tensor([2 / 3, 1 / 3, 0.0]).expand(3, -1)
    torch.testing.assert_close(probs, expected, atol=1e-3, rtol=0)


def test_a_uniform_categorical_costs_eight_bits() -> None:
    """From stored bytes to bits per dimension, exactly."""
    stored = torch.randint(0, 256, (30, 1, 3, 4), dtype=torch.uint8)
    torch.set_default_dtype(torch.float32)
    dataset = data.load(stored, kind="levels")
    part = likelihoods.Categorical((1, 3, 4), LATENTS, NET)
    with torch.no_grad():
        for param in part.parameters():
            param.zero_()
    vae = vae_of(part)
    with torch.no_grad():  # a guide that is the prior: every weight is p(x|z)
        for param in vae.encoder.parameters():
            param.zero_()
        vae.encoder.split(vae.encoder.net.bias)[1].fill_(math.log(math.expm1(1 - 1e-4)))
    result = pyrovae.log_px(vae.model, vae.guide, dataset.test, 10, seed=0, progress=False)
    assert abs(result.bits_per_dim - 8) < 1e-5


def test_dequantized_densities_bound_the_probability_of_a_level() -> None:
    """E_u log q(level + u) is at most the log of q's mass in the level's bin (Jensen)."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(40)[:, None]
    preprocess = data.Preprocess("grey", (1,), 255.0, dequantize=True)
    density = dist.Normal(0.4, 0.2)
    seen = preprocess(levels).double()
    dequantized = (density.log_prob(seen) + preprocess.log_det(levels)[:, None]).view(40, 256)
    edges = torch.arange(257) / 256
    mass = density.cdf(edges).diff().log()
    gap = mass - dequantized.mean(0)
    error = dequantized.std(0) / math.sqrt(40)
    assert (gap > -5 * error - 1e-4).all()
    assert gap.abs().max() < 0.2  # the bins are narrow: one number, two readings


# Counts -------------------------------------------------------------------------------------------

THETAS = (1e-3, 0.5, 7.9, 8.1, 100.0, 1e4, 1e6)


@pytest.mark.parametrize("mean", [1e-8, 0.1, 5.0, 300.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_negative_binomial_is_exact(dtype: torch.dtype, rtol: float, mean: float) -> None:
    theta = torch.tensor(THETAS, dtype=dtype)
    px = NegativeBinomial(theta, logits=math.log(mean) - theta.log())
    for k in (0, 1, 3, 40, 1000):
        exact = torch.tensor([_negative_binomial(k, mean, t) for t in theta.tolist()])
        found = px.log_prob(torch.full_like(theta, k)).double()
        torch.testing.assert_close(found, exact, rtol=rtol, atol=30 * rtol)


def _negative_binomial(k: int, mean: float, theta: float) -> float:
    """Log probability, the gamma functions as a product of k factors."""
    rising = math.fsum(math.log(theta + i) for i in range(k))
    powers = -theta * math.log1p(mean / theta) + k * (math.log(mean) - math.log(mean + theta))
    return rising + powers - math.lgamma(k + 1)


def test_negative_binomial_has_its_moments() -> None:
    part = small(likelihoods.NegativeBinomial)
    base = part(torch.randn(3, LATENTS)).base_dist
    mean, theta = base.mean, part.log_theta.exp()
    torch.testing.assert_close(base.variance, mean + mean.square() / theta)
    x = base.sample((20_000,))
    assert ((x.mean(0) - mean).abs() < 5 * (base.variance / len(x)).sqrt()).all()
    k = torch.arange(3000.0).view(-1, 1, 1, 1, 1)
    second = (base.log_prob(k).exp() * k.square()).sum(0)
    torch.testing.assert_close(second - mean.square(), base.variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Poisson", "NegativeBinomial", "ZeroInflatedNegativeBinomial"])
def test_a_mean_near_zero_leaves_counts_finite(name: str) -> None:
    part = getattr(likelihoods, name)((4,), LATENTS, NET).float()
    params = torch.full((3, part.num_params * 4), -100.0, requires_grad=True, dtype=torch.float32)
    px = part.distribution(params)
    assert (px.mean >= 0).all()
    assert (px.sample() == 0).all()
    x = torch.tensor([0.0, 1.0, 7.0, 100.0]).float().expand(3, 4)
    px.log_prob(x).sum().backward()
    assert params.grad is not None
    assert params.grad.isfinite().all()


@pytest.mark.parametrize("log_rate", [-105.0, -60.0, 60.0, 90.0])
def test_rates_beyond_single_precision_leave_counts_finite(log_rate: float) -> None:
    part = likelihoods.Poisson((784,), LATENTS, NET).float()
    params = torch.full((128, 784), log_rate, dtype=torch.float32, requires_grad=True)
    for count in (0.0, 1.0, 5.0, 1e6):
        log_prob = part.distribution(params).log_prob(torch.full_like(params, count)).sum()
        (slope,) = torch.autograd.grad(log_prob, params)
        assert log_prob.isfinite()
        assert slope.isfinite().all()
    assert log_prob < -1e9


def test_zero_inflation_adds_zeros_and_nothing_else() -> None:
    part = small(likelihoods.ZeroInflatedNegativeBinomial)
    z = torch.randn(3, LATENTS)
    log_mean, gate = part.split(part.net(z))
    counts = NegativeBinomial(part.log_theta.exp(), logits=log_mean - part.log_theta)
    base, g = part(z).base_dist, gate.sigmoid()
    for k in (0.0, 1.0, 6.0):
        expected = (1 - g) * counts.log_prob(torch.tensor(k)).exp() + g * (k == 0)
        torch.testing.assert_close(base.log_prob(torch.tensor(k)).exp(), expected)
    torch.testing.assert_close(base.mean, (1 - g) * log_mean.exp())
    before = base.log_prob(torch.zeros(()))
    base.sample()
    assert torch.equal(base.expand((2, *base.batch_shape)).log_prob(torch.zeros(()))[1], before)
    assert isinstance(base, ZeroInflated)


def test_negative_binomial_starts_at_the_spread_of_the_data() -> None:
    theta, mean = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([20.0, 20.0, 20.0])
    x = NegativeBinomial(theta, logits=(mean / theta).log()).sample((20_000,))
    part = likelihoods.NegativeBinomial((3,), LATENTS, NET)
    part.initialize(x)
    torch.testing.assert_close(part.log_theta.exp(), theta, rtol=0.2, atol=0)


# Values inside (0, 1), and real values ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beta_is_finite_at_the_ends(dtype: torch.dtype) -> None:
    params = torch.linspace(-200, 200, 9, dtype=dtype).repeat(2, 2).requires_grad_()
    part = likelihoods.Beta((9,), LATENTS, NET).to(dtype)
    px = part.distribution(params)
    assert px.support.check(px.sample((500,))).all()
    for value in (0.0, 1e-6, 1 - 1e-6, 1.0):
        (slope,) = torch.autograd.grad(
            px.log_prob(torch.full((2, 9), value, dtype=dtype)).sum(), params, retain_graph=True
        )
        assert slope.isfinite().all()


def test_beta_is_that_of_torch_inside() -> None:
    a, b, x = torch.tensor([0.3, 2.0]), torch.tensor([0.7, 5.0]), torch.tensor([1e-7, 0.4])
    torch.testing.assert_close(Beta(a, b).log_prob(x), dist.Beta(a, b).log_prob(x))
    with pytest.raises(ValueError, match="support"):
        Beta(a, b, validate_args=True).log_prob(torch.tensor(1.5))


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (likelihoods.Beta, {}),
        (likelihoods.Laplace, {}),
        (likelihoods.Normal, {"scale": "amortized"}),
        (likelihoods.StudentT, {"df": 5.0}),
    ],
)
def test_spread_starts_at_that_of_the_data(make: Any, arguments: dict[str, Any]) -> None:
    x = 0.5 + torch.rand(4000, 5).sub(0.5) * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    part = make((5,), LATENTS, NET, **arguments)
    part.initialize(x)
    spread = part(torch.zeros(LATENTS)).base_dist.variance.sqrt()
    torch.testing.assert_close(spread, x.std(0), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("df", [1, 0.5, math.inf, math.nan, "many"])
def test_degrees_of_freedom_without_a_mean_are_refused(df: Any) -> None:
    with pytest.raises(ValueError, match="df must be"):
        likelihoods.StudentT((2,), LATENTS, NET, df=df)


def test_degrees_of_freedom_are_learned_where_they_say_so() -> None:
    learned = dict(likelihoods.StudentT((2,), LATENTS, NET).named_parameters())
    fixed = likelihoods.StudentT((2,), LATENTS, NET, df=3)
    assert "raw_df" in learned
    assert "raw_df" not in dict(fixed.named_parameters())
    assert (fixed(torch.zeros(LATENTS)).base_dist.df == 3).all()


EXTREMES: list[tuple[str, dict[str, float], list[float]]] = [
    *(("Poisson", {}, [math.log(rate)]) for rate in (1e-3, 1, 1e2, 1e4, 1e5)),
    *(
        ("NegativeBinomial", {"log_theta": math.log(theta)}, [math.log(mean)])
        for mean, theta in itertools.product((0.1, 1e3, 1e5), (0.5, 1e2, 1e4, 1e6))
    ),
    *(("Binomial", {}, [logit]) for logit in (-2.0, 0.0, 2.0)),
    *(("StudentT", {"raw_df": df}, [0.3, 1.0]) for df in (1.0, 1e2, 1e4, 1e6)),
    *(("Beta", {}, [0.5, concentration]) for concentration in (0.0, 1e2, 1e4)),
]
"""Name, parameters beside the network, and what the network puts out."""


@pytest.mark.parametrize(("name", "beside", "params"), EXTREMES)
def test_nats_of_an_image_are_the_same_in_single_precision(
    name: str, beside: dict[str, float], params: list[float]
) -> None:
    """Log gamma functions are as large as their arguments, and what counts is their difference."""
    part = getattr(likelihoods, name)((784,), LATENTS, NET).float()
    with torch.no_grad():
        for key, value in beside.items():
            getattr(part, key).fill_(value)
    given = torch.tensor(params).float().repeat_interleave(784).requires_grad_()
    exact = copy.deepcopy(part).double().distribution(given.double())
    x = exact.sample().float()
    found, expected = part.distribution(given).log_prob(x), exact.log_prob(x.double())
    assert found.dtype == torch.float32
    assert abs(found - expected) < 0.01
    slopes = [torch.autograd.grad(log_prob, given)[0] for log_prob in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


# Optimal noise ------------------------------------------------------------------------------------


def optimal() -> Any:
    return small(likelihoods.Normal, scale="optimal")


def test_optimal_noise_has_the_gradient_of_the_log_mean_squared_error() -> None:
    part, z, x = optimal(), torch.randn(6, LATENTS), torch.randn(6, 1, 3, 4)
    params = list(part.parameters())
    log_prob = part(z).log_prob(x).sum()
    mse = (x - part.net(z)).square().mean()
    known = -x.numel() / 2 * (mse.log() + 1 + math.log(2 * math.pi))
    torch.testing.assert_close(log_prob, known)
    found, expected = (torch.autograd.grad(value, params) for value in (log_prob, known))
    torch.testing.assert_close(found, expected)


def test_optimal_noise_moves_in_training_and_stands_in_evaluation() -> None:
    part, z, x = optimal(), torch.randn(6, LATENTS), torch.randn(6, 1, 3, 4)
    part.initialize(x)
    start = part.variance.clone()
    mse = (x - part.net(z)).square().mean().detach()
    part(z).log_prob(x)
    torch.testing.assert_close(part.variance, 0.9 * start + 0.1 * mse)
    after = part.variance.clone()
    part.eval()
    px = part(z)
    together = px.log_prob(x)
    alone = torch.stack([part(z[i : i + 1]).log_prob(x[i : i + 1])[0] for i in range(6)])
    torch.testing.assert_close(together, alone)
    expected = dist.Normal(part.net(z), after.sqrt()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(together, expected)
    assert torch.equal(part.variance, after)
    assert torch.equal(part.scale, after.sqrt())


def test_optimal_noise_leaves_missing_entries_out() -> None:
    part, z, x = optimal(), torch.randn(6, LATENTS), torch.randn(6, 1, 3, 4)
    seen = torch.rand_like(x) < 0.6
    base = part(z).base_dist.mask(seen)
    assert isinstance(base, OptimalNormal)
    found = base.log_prob(torch.where(seen, x, 1e3))
    mse = (x - part.net(z)).square()[seen].mean()
    expected = dist.Normal(part.net(z), mse.sqrt()).log_prob(x) * seen
    torch.testing.assert_close(found, expected)


def test_masks_of_optimal_noise_add_up() -> None:
    loc, x = torch.randn(6, 12), torch.randn(6, 12)
    one, other = torch.rand_like(x) < 0.6, torch.rand_like(x) < 0.6
    base = OptimalNormal(loc, torch.ones(()))
    both = base.mask(one & other).log_prob(x)
    assert torch.equal(base.mask(one).mask(other).log_prob(x), both)
    assert torch.equal(base.mask(one).mask(True).mask(other).log_prob(x), both)
    assert torch.equal(base.mask(True).log_prob(x), base.log_prob(x))
    assert not base.mask(one).mask(False).log_prob(x).any()
    assert both.any()


def test_optimal_noise_is_saved_with_the_weights(tmp_path: Path) -> None:
    vae = vae_of(optimal().float()).float()
    x = torch.randn(200, 1, 3, 4).float()
    pyrovae.fit(vae, x, epochs=3, batch_size=50, compile=False, progress=False)
    pyrovae.save(vae, tmp_path / "run")
    again = pyrovae.load(tmp_path / "run")
    assert vae.likelihood.variance != 1
    assert torch.equal(again.likelihood.variance, vae.likelihood.variance)
    results = [
        pyrovae.log_px(v.model, v.guide, x[:9], 20, seed=1, progress=False) for v in (vae, again)
    ]
    assert torch.equal(results[0].values, results[1].values)
    residual = (x - vae.reconstruct(x)).square().mean()
    assert 0.5 < vae.likelihood.variance / residual < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_traced_step_is_the_eager_one(name: str) -> None:
    """Losses, gradients, and what moves in place."""
    part = LIKELIHOODS[name]()
    x, y = part(torch.randn(2, 16, LATENTS)).sample()
    vae = vae_of(part)
    buffers = dict(vae.named_buffers())
    before = {key: value.clone() for key, value in buffers.items()}

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return objectives.ELBO().surrogate(vae.model, vae.guide, (x,), torch.tensor(1.0))

    step = compiled.with_gradients(loss, list(vae.parameters()))
    found = []
    with program.validation(False):
        for run in (step, make_fx(step)(y)):
            for key, value in before.items():
                buffers[key].copy_(value)
            torch.manual_seed(3)
            with torch.no_grad() if run is not step else torch.enable_grad():
                found.append((*run(x), {key: value.clone() for key, value in buffers.items()}))
    torch.testing.assert_close(found[0], found[1])
    moved = {key for key, value in before.items() if not torch.equal(found[1][2][key], value)}
    assert moved == ({"likelihood.variance"} if name == "Normal, optimal" else set())


# How data are read for a likelihood ---------------------------------------------------------------

OWN = """
from pyrovae import likelihoods

class Mine(likelihoods.DiscretizedLogistic):
    pass

class Anything(likelihoods.Normal):
    kind = None
"""


def reading(name: str | None, path: str = "digits", **settings: Any) -> Any:
    config = None if name is None else {"class_path": name, "init_args": {}}
    settings = {"latent_dim": 2, "data": path, "likelihood": config} | settings
    return _settings.Settings(
        prior=_config("priors.StandardNormal"), guide=_config("guides.Normal"),
        net={"class_path": "pyrovae.nets.MLP", "init_args": {"hidden": [5]}},
        objective=_config("objectives.ELBO"), **settings,
    )  # fmt: skip


def _config(name: str) -> dict[str, Any]:
    return {"class_path": f"pyrovae.{name}", "init_args": {}}


@pytest.fixture
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_default_dtype(torch.float32)
    Path("own_likelihoods.py").write_text(OWN)
    torch.save(torch.poisson(torch.full((40, 4), 3.0)).long(), "counts.pt")
    torch.save(torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8), "colours.pt")


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(
    ("name", "path", "settings", "kind", "treatment"),
    [
        (None, "digits", {}, "binary", "binarized"),
        ("pyrovae.likelihoods.Bernoulli", "digits", {}, "binary", "binarized"),
        ("pyrovae.likelihoods.Beta", "digits", {}, "grey", "dequantized"),
        ("pyrovae.likelihoods.Laplace", "digits", {}, "grey", "dequantized"),
        ("pyrovae.likelihoods.Laplace", "digits", {"dequantize": False}, "grey", "scaled"),
        ("pyrovae.likelihoods.StudentT", "digits", {"kind": "real"}, "real", "standardized"),
        ("pyrovae.likelihoods.Binomial", "digits", {}, "levels", "17 levels"),
        ("pyrovae.likelihoods.Binomial", "digits", {"binarize": "none"}, "levels", "17 levels"),
        ("pyrovae.likelihoods.Categorical", "digits", {}, "levels", "17 levels"),
        ("pyrovae.likelihoods.DiscretizedLogistic", "digits", {}, "levels", "17 levels"),
        ("pyrovae.likelihoods.DiscretizedLogisticMixture", "colours.pt", {}, "levels", "256"),
        (None, "digits", {"kind": "levels"}, "levels", "17 levels"),
        ("own_likelihoods.Mine", "digits", {}, "levels", "17 levels"),
        ("own_likelihoods.Anything", "digits", {}, "binary", "binarized"),
        ("pyrovae.likelihoods.Poisson", "counts.pt", {}, "counts", "counts as stored"),
        ("pyrovae.likelihoods.NegativeBinomial", "counts.pt", {}, "counts", "counts as stored"),
    ],
)
def test_a_likelihood_says_how_grey_data_are_read(
    name: str | None, path: str, settings: dict[str, Any], kind: str, treatment: str
) -> None:
    wanted = reading(name, path, **settings)
    dataset = _build.load_data(wanted)
    assert dataset.kind == kind
    assert treatment in dataset.preprocess.describe()
    vae, _ = _build.build(wanted, dataset)  # checks that the data lie in the support
    if kind == "levels":
        assert vae.likelihood.max_value == dataset.preprocess.max_value
        assert (dataset.test.log_det == 0).all()


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--binarize dynamic", "expected grey data, got levels data; leave binarize out"),
        ("--kind grey --binarize none", "outside the support of the likelihood .multiples of 1/16"),
        ("--likelihood.max-value 4", "DiscretizedLogistic takes --likelihood.net; see"),
        ("--dequantize true", "expected grey levels that are not binarized, got 17 levels"),
    ],
)
def test_what_does_not_suit_levels_is_refused_in_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["train", "--likelihood", "DiscretizedLogistic", *words.split()])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.usefixtures("_files")
def test_the_command_trains_on_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrovae.plotting.figures", lambda *_: {})
    words = ["--epochs", "1", "--num-particles", "3", "--latent-dim", "2"]
    words += ["--net.hidden", "5", "--out", "run"]
    assert cli.main(["train", "--likelihood", "DiscretizedLogistic", *words]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"]["init_args"]["likelihood"]["init_args"]["max_value"] == 16
    assert config["preprocess"]["stored_kind"] == "levels"
    assert cli.main(["log-px", "run", "--num-particles", "3"]) == 0


# Missing entries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEPENDENT)
def test_missing_entries_are_left_out(name: str) -> None:
    """The others' densities are as they were, and gradients are finite."""
    part = LIKELIHOODS[name]().eval()
    vae = vae_of(part, missing=True)
    x = part(torch.randn(7, LATENTS)).sample()
    hidden = torch.rand_like(x) < 0.4
    z = torch.randn(7, LATENTS)
    vae.encoder.eval()
    base = part(z).base_dist.log_prob(x).masked_fill(hidden, 0).sum((1, 2, 3))
    holes = x.masked_fill(hidden, math.nan)
    found = log_joint(vae.model, (holes,), {"z": z})
    expected = base + vae.prior().log_prob(z)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.sum(), list(part.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
