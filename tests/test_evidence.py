"""log p(x): equal to what is known, and honest where it is not; nothing of the caller's changes."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA, by_quadrature
from torch import nn

import pyrovae
from pyrovae import VAE, data, elbo, guides, likelihoods, log_px, nets, priors
from pyrovae.evidence import LogPx, diagnostics, walk
from pyrovae.evidence import weights as log_weights

EXACT, WIDE = PPCA(), PPCA(width=1.3)
X = EXACT.sample(11)
TRUTH = EXACT.log_px(X)


def close(left, right, tolerance):
    torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=tolerance)


def small_vae(dim=6, latent_dim=2, **kwargs):
    net = nets.MLP(hidden=(8,))
    return VAE(
        priors.StandardNormal(latent_dim),
        likelihoods.Bernoulli((dim,), latent_dim, net),
        guides.Normal((dim,), latent_dim, net),
        **kwargs,
    )


# Truth.


@pytest.mark.parametrize("num_particles", [1, 2, 7, 100, 1500])
def test_with_the_posterior_as_guide_it_is_exact_for_every_k(num_particles):
    close(log_px(EXACT.model, EXACT.guide, X, num_particles).values, TRUTH, 2e-4)
    fine = log_px(EXACT.model, EXACT.guide, X, num_particles, dtype=torch.float64)
    close(fine.values, TRUTH, 1e-9)
    close(elbo(EXACT.model, EXACT.guide, X, num_particles), TRUTH, 2e-4)


def test_with_another_guide_it_lies_within_its_errors():
    result = log_px(WIDE.model, WIDE.guide, X, 20_000, seed=0)
    assert (result.khat < 0.5).all()
    assert (result.std_error < 0.02).all()
    assert ((result.values - TRUTH).abs() < 4 * result.std_error).all()
    assert abs(result.mean - float(TRUTH.mean())) < 4 * result.mean_std_error


def test_standard_errors_are_calibrated():
    x = X[:1].expand(200, -1)  # one datum, 200 times: 200 runs
    result = log_px(WIDE.model, WIDE.guide, x, 400, seed=0)
    z = (result.values - TRUTH[0]) / result.std_error
    assert float(result.khat.median()) < 0.5
    assert 0.8 < float(z.std()) < 1.25  # the spread of 200 is itself known to 5 %
    assert abs(float(z.mean())) < 0.3
    close(result.std_error.mean(), result.values.std(), 0.2 * float(result.values.std()))


def test_k_hat_rises_as_the_guide_narrows():
    medians = []
    for width in (1.3, 0.9, 0.7, 0.5):
        vae = PPCA(width=width)
        medians.append(float(log_px(vae.model, vae.guide, X, 2000, seed=0).khat.median()))
    assert medians == sorted(medians)
    assert medians[0] < 0.3
    assert medians[-1] > 0.6  # the tail's shape is 1 - width^2


def test_the_bound_rises_with_k():
    vae = PPCA(width=0.6)
    x = X[:1].expand(400, -1)
    results = [log_px(vae.model, vae.guide, x, k, seed=k) for k in (1, 4, 16, 64)]
    means, errors = [r.mean for r in results], [r.test_std_error for r in results]
    for low, high, a, b in zip(means, means[1:], errors, errors[1:], strict=False):
        assert high - low > 2 * math.hypot(a, b)
    assert means[-1] < float(TRUTH[0])


def test_the_elbo_is_log_px_less_the_kl():
    vae = PPCA(width=0.7, shift=0.3)
    kl = vae.kl(X).detach()
    bound = elbo(vae.model, vae.guide, X, 4000, seed=0)
    spread = torch.stack([elbo(vae.model, vae.guide, X, 100, seed=i) for i in range(20)]).std(0)
    error = spread / math.sqrt(40)
    assert (error < 0.03).all()
    assert ((bound - (TRUTH - kl)).abs() < 5 * error).all()
    assert (kl > 0.2).all()


def test_one_latent_against_quadrature():
    torch.manual_seed(3)
    vae = small_vae(latent_dim=1).double()
    for part in vae.parameters():
        part.data.add_(0.5 * torch.randn_like(part))
    x = (torch.rand(5, 6) < 0.5).double()
    with torch.no_grad():
        truth = by_quadrature(
            lambda z: (
                dist.Normal(0.0, 1.0).log_prob(z)[:, None]
                + torch.stack([vae.likelihood(z[:, None]).log_prob(datum) for datum in x], 1)
            )
        )
    result = log_px(vae.model, vae.guide, x, 20_000, seed=0)
    assert (result.khat < 0.7).all()
    assert (result.std_error < 0.05).all()
    assert ((result.values - truth).abs() < 4 * result.std_error).all()


def test_missing_entries_are_integrated_out():
    torch.manual_seed(1)
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Normal((5,), 2, nets.MLP(hidden=(8,)), scale=0.5),
        guides.Normal((5,), 2, nets.MLP(hidden=(8,))),
        missing=True,
    )
    x = torch.randn(4, 5)
    gone = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    result = log_px(vae.model, vae.guide, x.masked_fill(gone, math.nan), 3000, seed=0)
    for i in range(4):
        seen = ~gone[i]

        def model(rows, i=i, seen=seen):
            with pyro.plate("data", len(rows)):
                z = pyro.sample("z", vae.prior())
                px = vae.likelihood(z).base_dist
                px = dist.Normal(px.loc[:, seen], px.scale[..., seen]).to_event(1)
                pyro.sample("x", px, obs=rows[:, seen])

        filled = x[i : i + 1].masked_fill(gone[i], 0.0)
        alone = log_px(model, vae.guide, filled, 3000, seed=1)
        error = torch.hypot(alone.std_error, result.std_error[i])
        assert abs(alone.values - result.values[i]) < 4 * error
    # With nothing seen the truth is log 1.
    assert abs(result.values[3]) < 4 * result.std_error[3]
    assert result.num_dims == 11 / 4
    assert result.bits_per_dim == pytest.approx(-result.mean / (11 / 4 * math.log(2)))


def test_nothing_observed_has_no_bits_per_dim():
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Normal((5,), 2), guides.Normal((5,), 2), missing=True
    )
    assert math.isnan(log_px(vae.model, vae.guide, torch.full((2, 5), math.nan), 50).bits_per_dim)


def test_units_and_description_of_a_split_are_kept():
    test = data.load("digits", binarize="none").test.subset(range(20))
    assert (test.log_det != 0).any()
    torch.manual_seed(0)
    vae = VAE(
        priors.StandardNormal(3),
        likelihoods.Normal((1, 8, 8), 3, nets.MLP(hidden=(8,))),
        guides.Normal((1, 8, 8), 3, nets.MLP(hidden=(8,))),
    )
    result = log_px(vae.model, vae.guide, test, 20, seed=0)
    seen = log_px(vae.model, vae.guide, test[range(20)], 20, seed=0)
    close(result.values, seen.values + test.log_det, 1e-9)
    bound = elbo(vae.model, vae.guide, test, 20, seed=0)
    close(bound, elbo(vae.model, vae.guide, test[range(20)], 20, seed=0) + test.log_det, 1e-9)
    assert result.data == test.description
    assert "digits" in str(result)
    assert result.num_dims == 64


def test_integers_and_arrays_are_data():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))  # the posterior

    x = torch.tensor([0, 1, 5, 2])
    truth = dist.GammaPoisson(2.0, 1.0).log_prob(x.float())
    for form in (x, x.numpy(), x.to(torch.uint8), x.float(), torch.utils.data.TensorDataset(x)):
        result = log_px(model, guide, form, 3)
        close(result.values, truth, 1e-4)
        assert result.num_dims == 1


# The same noise, however it is run.


def test_shards_and_the_whole_agree_bit_for_bit():
    whole = log_px(WIDE.model, WIDE.guide, X, 300, seed=4, block_size=4)
    parts = [
        log_px(WIDE.model, WIDE.guide, X, 300, seed=4, block_size=4, blocks=[i]) for i in range(3)
    ]
    joined = LogPx.join(parts)
    assert [len(part.values) for part in parts] == [4, 4, 3]
    for name in ("values", "std_error", "ess", "khat", "gain_per_doubling"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert joined.summary() == whole.summary()
    again = log_px(WIDE.model, WIDE.guide, X, 300, seed=4, block_size=4)
    assert torch.equal(again.values, whole.values)
    assert not torch.equal(log_px(WIDE.model, WIDE.guide, X, 300, seed=5).values, whole.values)
    assert log_px(WIDE.model, WIDE.guide, X, 3).seed != log_px(WIDE.model, WIDE.guide, X, 3).seed


def test_whole_numbers_of_numpy_are_whole_numbers():
    given = {"seed": 4, "block_size": 4, "blocks": [1, 2]}
    theirs = {name: np.array(value) for name, value in given.items()}
    result = log_px(WIDE.model, WIDE.guide, X, np.int64(30), **theirs)
    same = log_px(WIDE.model, WIDE.guide, X, 30, **given)
    assert torch.equal(result.values, same.values)
    assert json.loads(json.dumps(result.summary())) == same.summary()
    bound = elbo(WIDE.model, WIDE.guide, X, np.int32(5), np.uint8(1))
    assert torch.equal(bound, elbo(WIDE.model, WIDE.guide, X, 5, 1))


def test_blocks_have_their_own_noise():
    x = X[:1].expand(4, -1)
    values = log_px(WIDE.model, WIDE.guide, x, 50, seed=0, block_size=1).values
    assert len(values.unique()) == 4


def test_other_blocks_and_batch_mates_change_only_the_noise():
    results = [
        log_px(WIDE.model, WIDE.guide, X, 4000, seed=i, block_size=i) for i in (1, 3, 11, 50)
    ]
    results.append(
        LogPx.join([log_px(WIDE.model, WIDE.guide, x, 4000, seed=9) for x in X.split(1)])
    )
    for result in results:
        assert ((result.values - TRUTH).abs() < 4.5 * result.std_error).all()


def test_a_split_drawn_afresh_is_keyed_by_the_seed_too():
    train = data.load("digits").train.subset(range(12))
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli((1, 8, 8), 2), guides.Normal((1, 8, 8), 2)
    )
    one = log_px(vae.model, vae.guide, train, 5, seed=0)
    torch.rand(3)
    state = torch.get_rng_state()
    two = log_px(vae.model, vae.guide, train, 5, seed=0)
    assert torch.equal(one.values, two.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_joining_weighs_blocks_by_size():
    def part(values, dims, **kwargs):
        values = torch.tensor(values, dtype=torch.float64)
        settings = {
            "method": "importance",
            "num_particles": 3,
            "seed": 0,
            "how": "importance sampling",
            "num_dims": dims,
        } | kwargs
        return LogPx(*[values] * 6, **settings)

    joined = LogPx.join([part([1.0, 2.0, 3.0], 10.0), part([6.0], 2.0)])
    assert joined.mean == 3.0
    assert joined.num_dims == 8.0
    assert joined.mean_std_error == pytest.approx(math.sqrt(1 + 4 + 9 + 36) / 4)
    assert joined.test_std_error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    for other in ({"seed": 1}, {"num_particles": 4}, {"how": "annealing"}, {"data": "other"}):
        with pytest.raises(ValueError, match="different settings"):
            LogPx.join([part([1.0], 1.0), part([1.0], 1.0, **other)])
    with pytest.raises(ValueError, match="no estimate"):
        LogPx.join([])
    assert math.isnan(part([1.0], 1.0).test_std_error)


# Nothing of the caller's changes.


class Normalized(PPCA):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        )

    def posterior(self, x):
        return dist.Normal(self.net(x), 1.0).to_event(1)


def plain(vae):
    """The same as functions that close over the module, with one parameter in the store."""

    def model(x):
        bias = pyro.param("bias", vae.bias.detach().clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            px = dist.Normal(z @ vae.weight.T + bias, vae.noise).to_event(1)
            pyro.sample("x", px, obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            q = vae.posterior(x)
            pyro.sample("z", dist.Normal(q.mean, q.stddev * scale).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    ("functions", "dtype"), [(False, None), (False, torch.float64), (True, None)]
)
def test_nothing_of_the_callers_changes(functions, dtype):
    vae = Normalized()
    vae.net[2].eval()
    model, guide = plain(vae) if functions else (vae.model, vae.guide)
    store = pyro.get_param_store()
    pyro.param("mine", torch.ones(3))
    if functions:
        guide(X[:2])
        with torch.no_grad():
            store["scale"] = torch.tensor(1.5)
    objects, values = list(vae.parameters()), copy.deepcopy(vae.state_dict())
    modes = [module.training for module in vae.modules()]
    stored = {name: (param, param.clone()) for name, param in store.get_state()["params"].items()}
    random = torch.get_rng_state()
    torch.distributions.Distribution.set_default_validate_args(True)
    for run in (log_px, elbo):
        kwargs = {"dtype": dtype} if run is log_px else {}
        run(model, guide, X, 5, seed=1, **kwargs)
        with pytest.raises(ValueError, match="fails on data"):
            run(model, guide, torch.cat([X, torch.full((2, 5), math.nan)]), 5, **kwargs)
    assert all(a is b for a, b in zip(objects, vae.parameters(), strict=True))
    assert all(p.dtype == torch.float32 and p.grad is None for p in vae.parameters())
    assert all(torch.equal(value, values[key]) for key, value in vae.state_dict().items())
    assert [module.training for module in vae.modules()] == modes
    now = store.get_state()["params"]
    assert now.keys() == stored.keys()
    assert all(now[n] is p and torch.equal(p, value) for n, (p, value) in stored.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.distributions.Distribution._validate_args
    assert pyro.infer.util.is_validation_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_evaluation_mode_is_what_is_scored():
    vae = Normalized()
    for _ in range(20):
        vae.net(X)
    modes = []
    vae.net[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    one = log_px(vae.train().model, vae.guide, X, 20, seed=0)
    assert torch.equal(one.values, log_px(vae.eval().model, vae.guide, X, 20, seed=0).values)
    model, guide = plain(vae.train())
    close(log_px(model, guide, X, 20, seed=0).values, one.values, 1e-4)
    assert modes
    assert not any(modes)


def test_parameters_in_the_store_are_used():
    model, guide = plain(EXACT)
    guide(X)
    model_only = log_px(model, EXACT.guide, X, 3)
    close(model_only.values, TRUTH, 2e-4)
    pyro.param("bias", EXACT.bias.detach() + 1.0)
    moved = log_px(model, lambda x: EXACT.guide(x - 1.0), X, 3)
    close(moved.values, EXACT.log_px(X - 1.0), 2e-4)
    assert set(pyro.get_param_store().keys()) == {"bias", "scale"}


def test_stored_parameters_run_in_float64():
    seen = []

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        seen.append(loc.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))

    guide(X)
    log_px(EXACT.model, guide, X, 3, dtype=torch.float64)
    assert seen[0] == torch.float32
    assert set(seen[1:]) == {torch.float64}
    assert pyro.param("loc").dtype == torch.float32


def test_low_precision_is_evaluated_in_float32():
    low = copy.deepcopy(WIDE).bfloat16()
    rounded = copy.deepcopy(low).float()
    found = log_px(low.model, low.guide, X, 50, seed=0)
    assert torch.equal(found.values, log_px(rounded.model, rounded.guide, X, 50, seed=0).values)
    assert low.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_px(WIDE.model, WIDE.guide, X, 50, seed=0)
    assert torch.equal(inside.values, log_px(WIDE.model, WIDE.guide, X, 50, seed=0).values)
    with pytest.raises(ValueError, match="dtype must be"):
        log_px(WIDE.model, WIDE.guide, X, 5, dtype=torch.bfloat16)


def test_two_vaes_of_one_class_do_not_mix():
    torch.manual_seed(0)
    x = (torch.rand(6, 6) < 0.5).float()
    one, two = small_vae(), small_vae()
    for part in two.parameters():
        part.data.add_(0.3 * torch.randn_like(part))
    twin = copy.deepcopy(two)
    first, second = (log_px(v.model, v.guide, x, 20, seed=0).values for v in (one, two))
    assert (first - second).abs().min() > 1e-3
    assert torch.equal(log_px(one.model, one.guide, x, 20, seed=0).values, first)
    assert torch.equal(log_px(twin.model, twin.guide, x, 20, seed=0).values, second)
    for part in two.parameters():
        part.data.zero_()
    assert torch.equal(log_px(twin.model, twin.guide, x, 20, seed=0).values, second)
    close(
        log_px(two.model, two.guide, x, 20, seed=0).values.mean(), torch.tensor(6 * -math.log(2)), 1
    )


# Ragged blocks, one datum, one particle.


@pytest.mark.parametrize("count", [1, 7, 9])
@pytest.mark.parametrize("num_particles", [1, 3, 801])
def test_any_number_of_data_and_particles(count, num_particles):
    result = log_px(EXACT.model, EXACT.guide, X[:count], num_particles, seed=0)
    close(result.values, TRUTH[:count], 2e-4)
    for name in ("values", "std_error", "ess", "khat", "gain_per_doubling"):
        assert getattr(result, name).shape == (count,)
    no_tail = result.khat.isnan() if num_particles == 1 else result.khat == -math.inf
    assert no_tail.all()
    if num_particles > 1:
        close(result.ess, torch.full((count,), float(num_particles)), num_particles * 1e-5)
        assert (result.std_error < 1e-4).all()
    assert f"K = {num_particles:,} particles" in str(result)
    assert "nan" not in str(result)


def test_what_is_said():
    good = log_px(WIDE.model, WIDE.guide, X, 2000, seed=3)
    assert "lower bound" in str(good)
    assert "(seed 3)" in str(good)
    assert str(good).endswith("k-hat is above 0.7 for 0 of 11 data.")
    bad = PPCA(width=0.2)
    assert "loose by an unknown amount" in str(log_px(bad.model, bad.guide, X, 2000, seed=3))
    assert "of 3 weights count" in str(log_px(WIDE.model, WIDE.guide, X, 3))
    rising = PPCA(width=0.75, latent_dim=3)
    assert isinstance(log_px(rising.model, rising.guide, X, 50).summary()["khat_above_0.7"], int)


# Diagnostics.


def weights(seed=0, k=1000, n=4):
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diagnostics_are_what_they_are_called():
    log_w = weights() * torch.tensor([0.1, 0.5, 1.0, 2.0]) - 700
    w = np.exp(log_w.numpy() + 700)
    close(diagnostics.log_mean_exp(log_w), torch.tensor(np.log(w.mean(0)) - 700), 1e-9)
    ess = torch.tensor(w.sum(0) ** 2 / (w**2).sum(0))
    close(diagnostics.effective_sample_size(log_w), ess, 1e-6)
    error = torch.tensor(w.std(0, ddof=1) / math.sqrt(1000) / w.mean(0))
    close(diagnostics.std_error(log_w), error, 1e-9)
    halves = (np.log(w[:500].mean(0)) + np.log(w[500:].mean(0))) / 2
    close(diagnostics.gain_per_doubling(log_w), torch.tensor(np.log(w.mean(0)) - halves), 1e-9)


def test_the_standard_error_is_the_spread_of_replicates():
    log_w = 0.5 * weights(1, k=200, n=4000)
    spread = diagnostics.log_mean_exp(log_w).std()
    close(diagnostics.std_error(log_w).mean(), spread, 0.04 * float(spread))  # 4000: known to 1 %


def test_one_particle_and_odd_numbers():
    one = weights(k=1)
    assert diagnostics.std_error(one).isnan().all()
    assert diagnostics.gain_per_doubling(one).isnan().all()
    close(diagnostics.effective_sample_size(one), torch.ones(4), 1e-12)
    assert diagnostics.gain_per_doubling(weights(k=3)).isfinite().all()


@pytest.mark.parametrize("shape", [0.3, 0.8])
def test_k_hat_is_the_shape_of_the_right_tail(shape):
    """The fit uses 3 sqrt(K) = 424 weights: its error is (1 + k) / sqrt(424), 0.06 to 0.09."""
    u = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = 1 + (u ** (-shape) - 1) / shape
    found = diagnostics.khat(w.log())
    assert (found - shape).abs().max() < 0.3
    assert abs(float(found.mean()) - shape) < 0.12
    assert (diagnostics.khat(-w.log()) < 0.2).all()  # the left tail is none of its business
    close(diagnostics.khat(w.log() - 5000), found, 1e-6)


def test_k_hat_where_there_is_nothing_to_fit():
    constant = torch.full((1000, 1), -3.0)
    assert diagnostics.khat(constant) == -math.inf
    assert diagnostics.khat(constant + 1e-5 * torch.randn(1000, 1)) == -math.inf
    assert diagnostics.khat(weights(k=3)).isnan().all()
    some = weights()
    some[::3] = -math.inf
    assert diagnostics.khat(some).isfinite().all()
    assert (diagnostics.khat(torch.full((1000, 2), -math.inf)) == math.inf).all()
    one = torch.full((1000, 1), -math.inf)
    one[0] = 0.0
    assert diagnostics.khat(one) == math.inf
    assert diagnostics.khat(5000 * weights()).min() > 0.7  # all but a few underflow
    half = torch.zeros(1000, 1)
    half[::2] = -math.inf
    assert diagnostics.khat(half) == -math.inf


def test_weights_of_zero_count():
    """A uniform prior under a broader guide: some draws have no density under the model."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("half", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.zeros(3)
    result = log_px(model, guide, x, 5000, seed=0)
    truth = math.log(0.5) - math.log(2 * math.pi) / 2
    assert ((result.values - truth).abs() < 4 * result.std_error).all()


# What is refused.


def test_arguments_are_checked():
    run = [EXACT.model, EXACT.guide]
    for evaluate in (elbo, log_px):
        with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
            evaluate(*run, X, 0)
        with pytest.raises(ValueError, match=r"empty|at least one"):
            evaluate(*run, X[:0], 5)
        with pytest.raises(ValueError, match="same first dimension"):
            evaluate(*run, (X, X[:3]), 5)
        with pytest.raises(TypeError, match="expected"):
            evaluate(*run, "digits", 5)
        with pytest.raises(ValueError, match="'z' is a Delta"):
            evaluate(EXACT.model, delta, X, 5)
    with pytest.raises(ValueError, match="method must be"):
        log_px(*run, X, 5, method="harmonic")
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        log_px(*run, X, 5, block_size=0)
    for wrong in ({"seed": 1.5}, {"block_size": "8"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number, got "):
            log_px(*run, X, 5, **wrong)
    with pytest.raises(ValueError, match=r"num_particles must be a whole number, got 2\.0"):
        elbo(*run, X, 2.0)
    for wrong in ([2], [-1], [], [0, 5]):
        with pytest.raises(ValueError, match="blocks must be among 0 to 1"):
            log_px(*run, X, 500, blocks=wrong)


def delta(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(len(x), 2)).to_event(1))


def test_data_outside_the_support_are_refused_wherever_they_are():
    vae = small_vae()
    x = (torch.rand(30, 6) < 0.5).float()
    x[20, 3] = 0.4
    for evaluate in (elbo, log_px):
        with pytest.raises(ValueError, match=r"fails on data 16 to 23: .*support") as caught:
            evaluate(vae.model, vae.guide, x, 100)
        assert "\n" not in str(caught.value)


def test_densities_that_are_no_numbers_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z > 3.5, math.nan, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="a log weight is NaN"):
        log_px(model, guide, torch.zeros(8), 20_000, seed=0)
    with pytest.raises(ValueError, match="fails on data 8 to 15"):
        log_px(model, guide, torch.cat([torch.zeros(8), torch.full((8,), math.nan)]), 200, seed=0)


# Speed and memory.


def test_rows_run_together():
    calls = []

    def model(x):
        calls.append(len(x))
        EXACT.model(x)

    log_px(model, EXACT.guide, X, 1000)
    assert max(calls) == walk.ROWS
    assert sum(calls) < 11 * 1000 + 200


@pytest.mark.parametrize(("num_data", "expected"), [(4, False), (5, True)])
def test_what_pays_is_compiled_by_all_data(num_data, expected, monkeypatch):
    """Also where a part of the blocks is run, which must get the noise of the whole."""
    asked = []
    monkeypatch.setattr(log_weights, "COMPILE_PARTICLES", 5 * 500)
    monkeypatch.setattr(
        log_weights.compiled, "compile_function", lambda *args: asked.append(args[-1])
    )
    how = {"seed": 0, "block_size": 2, "blocks": [0]}
    log_px(EXACT.model, EXACT.guide, X[:1].expand(num_data, -1), 500, **how)
    assert asked == ["log p(x)"] * expected


@pytest.mark.slow
def test_compiled_log_px_is_that_of_eager():
    """All but the noise: two hundred data, so that the mean of z-scores has an error of 0.07."""
    torch.manual_seed(0)
    net = nets.MLP((20,))
    vae = VAE(
        priors.StandardNormal(3),
        likelihoods.Bernoulli((10,), 3, net),
        guides.Normal((10,), 3, net),
    )
    x = torch.bernoulli(torch.full((203, 10), 0.3))
    how = {"num_particles": 450, "seed": 0}
    plain = log_px(vae.model, vae.guide, x, **how, compile=False)
    fast = log_px(vae.model, vae.guide, x, **how, compile=True)
    assert not torch.equal(fast.values, plain.values)
    error = (fast.std_error.square() + plain.std_error.square()).sqrt()
    z = (fast.values - plain.values)[:200] / error[:200]
    assert abs(z.mean()) < 0.3
    assert 0.8 < z.std() < 1.25
    some = log_px(vae.model, vae.guide, x, **how, compile=True, blocks=[0, 3])
    torch.testing.assert_close(some.values, fast.values[[*range(8), *range(24, 32)]])


PEAK = """
import resource, sys, torch, pyrovae
from exact import PPCA
ppca = PPCA(data_dim=200, latent_dim=20, width=1.1)
pyrovae.log_px(ppca.model, ppca.guide, ppca.sample(9), int(sys.argv[1]), seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_all_but_flat_in_k():
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.dirname(os.path.dirname(pyrovae.__file__))])
    env = {**os.environ, "PYTHONPATH": paths}
    kilobytes = [
        int(subprocess.check_output([sys.executable, "-c", PEAK, k], env=env))
        for k in ("100", "100000")
    ]
    assert kilobytes[1] - kilobytes[0] < 100 * 1024
