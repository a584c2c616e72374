"""log p(x) without chance: equal to what is known, honest about its error, refused elsewhere."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA, by_quadrature
from torch import nn

from pyrovae import VAE, guides, likelihoods, log_px, nets, priors
from pyrovae.evidence import Exact, LogPx
from pyrovae.evidence.estimate import exact

RULES = ("adaptive", "gauss-hermite")

# Float32 modules and data, with guides that are off.
PPCAS = {dim: PPCA(data_dim=8, latent_dim=dim, width=1.4, shift=0.5) for dim in (1, 2, 5, 50)}
DATA = {dim: ppca.sample(33) for dim, ppca in PPCAS.items()}  # a block and one more


@pytest.fixture(autouse=True)
def _in_float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def check(result, truth, tolerance):
    """Right within the tolerance, and within the error that it states."""
    off = (result.values - truth).abs()
    assert (off < tolerance).all(), off.max()
    assert (off <= result.std_error + 1e-13 * (1 + truth.abs())).all()
    assert result.values.dtype == torch.float64
    assert result.claim == "the value"


def program(model, guide):
    """Plain functions, in the plate of the data."""
    return functools.partial(_in_plate, model), functools.partial(_in_plate, guide)


def _in_plate(fn, x, *others):
    with pyro.plate("data", len(x)):
        fn(x, *others)


def bernoulli_vae(latent_dim, spread=0.7, dim=6):
    net = nets.MLP(hidden=(8,))
    vae = VAE(
        priors.StandardNormal(latent_dim),
        likelihoods.Bernoulli((dim,), latent_dim, net),
        guides.Normal((dim,), latent_dim, net),
    )
    for parameter in vae.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return vae


def dense(vae, x, points, reach=7.0):
    """log p(x) by a plain grid over the standard normal prior's whole extent."""
    latent_dim = vae.prior().event_shape[0]
    line = torch.linspace(-reach, reach, points)
    total = torch.full((len(x),), -math.inf)
    for z in torch.cartesian_prod(*[line] * latent_dim).reshape(-1, latent_dim).split(50_000):
        log_p = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x[:, None])
        total = torch.logaddexp(total, log_p.logsumexp(1).detach())
    return total + latent_dim * math.log(2 * reach / (points - 1))


# Linear and Gaussian.


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 50])
def test_ppca_is_closed(latent_dim):
    ppca, x = PPCAS[latent_dim], DATA[latent_dim]
    result = exact(ppca.model, ppca.guide, x)
    check(result, ppca.log_px(x), 1e-9)
    assert "closed form" in result.how
    assert ppca.weight.dtype == torch.float32
    check(exact(ppca.model, ppca.guide, x[:1]), ppca.log_px(x[:1]), 1e-9)


class Ladder(nn.Module):
    """z2 -> z1 -> x, all linear and normal."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 2))
        self.out = nn.Parameter(torch.randn(4, 3))

    def model(self, x, c):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(self.up[0]), 1.5).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.up.T, 0.3).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.out.T + c, 0.1).to_event(1), obs=x)

    def guide(self, x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros_like(self.out[0]), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(torch.zeros_like(self.up[0]), 1.0).to_event(1))


def test_a_linear_hierarchy_is_closed():
    torch.manual_seed(0)
    ladder = Ladder()
    x, c = torch.randn(9, 4), torch.randn(9, 1)
    up, out = ladder.up.detach(), ladder.out.detach()
    cov = out @ (1.5**2 * up @ up.T + 0.3**2 * torch.eye(3)) @ out.T + 0.1**2 * torch.eye(4)
    truth = dist.MultivariateNormal(c.expand(9, 4), cov).log_prob(x)
    result = exact(ladder.model, ladder.guide, (x, c))
    check(result, truth, 1e-9)
    assert "closed form" in result.how


def test_what_is_quadratic_near_by_alone_is_not_closed():
    def prior(apart):
        weights, away = torch.tensor([0.5, 0.5]), torch.tensor([0.0, apart])
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(away, 1.0))

    def model(apart, x):
        z = pyro.sample("z", prior(apart).expand(x.shape))
        pyro.sample("x", dist.Normal(z, 1e3), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.0, 3.0])
    result = exact(*program(functools.partial(model, 300.0), guide), x)
    assert "grid" in result.how
    spread = math.sqrt(1e6 + 1)
    parts = [dist.Normal(centre, spread).log_prob(x) for centre in (0.0, 300.0)]
    check(result, torch.logaddexp(*parts) - math.log(2), 1e-6)


# Sums.


def mixture(marked_in, x, summed=True):
    """x in two dimensions from one of five normals; y drawn by the guide or marked."""
    torch.manual_seed(1)
    probs, loc = torch.rand(5).softmax(0), 2 * torch.randn(5, 2)
    marks = {"enumerate": "parallel"}

    def model(x):
        y = pyro.sample("y", dist.Categorical(probs), infer=marks if marked_in == "model" else {})
        pyro.sample("x", dist.Normal(loc[y], 0.8).to_event(1), obs=x)

    def guide(x):
        pyro.sample("b", dist.Bernoulli(0.5).expand([len(x)]))
        if marked_in != "model":
            flat = torch.full((len(x), 5), 0.2)
            pyro.sample("y", dist.Categorical(flat), infer=marks if marked_in == "guide" else {})

    def with_coin(x):
        pyro.sample("b", dist.Bernoulli(0.3).expand([len(x)]))
        model(x)

    each = dist.Normal(loc, 0.8).to_event(1).log_prob(x[:, None])
    return program(with_coin, guide), (each + probs.log()).logsumexp(1)


@pytest.mark.parametrize("marked_in", ["model", "guide", "neither"])
def test_discrete_latents_are_summed(marked_in):
    x = torch.randn(35, 2)
    programs, truth = mixture(marked_in, x)
    result = exact(*programs, x)
    check(result, truth, 1e-9)
    assert result.how == "a sum over 10 values of its discrete latents"
    assert (result.spent == 10).all()


class Bits(nn.Module):
    """Four binary latents in an event, two more in an inner plate, one of three kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.weight, self.more = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3))
        self.kinds = nn.Parameter(torch.randn(3, 3))

    def latents(self, x, probs):
        z = pyro.sample("z", dist.Bernoulli(probs[..., None]).expand([*probs.shape, 4]).to_event(1))
        with pyro.plate("inner", 2, dim=-2):
            b = pyro.sample("b", dist.Bernoulli(1 - probs))
        return z, b, pyro.sample("y", dist.OneHotCategorical(torch.ones_like(self.kinds[0])))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z, b, y = self.latents(x, torch.tensor(0.3))
            loc = z @ self.weight + b.movedim(0, -1) @ self.more + y @ self.kinds
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            self.latents(x, torch.full((len(x),), 0.5))


def test_discrete_vectors_are_summed():
    bits = Bits()
    x = torch.randn(3, 3)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    weights = torch.cat([bits.weight, bits.more]).detach()
    odds = torch.tensor([0.3] * 4 + [0.7] * 2)
    loc = (states @ weights)[:, None] + bits.kinds.detach()
    log_p = dist.Bernoulli(odds).to_event(1).log_prob(states)[:, None] - math.log(3)
    log_p = log_p + dist.Normal(loc, 0.5).to_event(1).log_prob(x[:, None, None])
    result = exact(bits.model, bits.guide, x)
    check(result, log_p.flatten(1).logsumexp(1), 1e-9)
    assert (result.spent == 192).all()


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_label_beside_a_continuous_latent(rule, marked):
    def model(x, c):
        infer = {"enumerate": "parallel"} if marked else {}
        y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.4)), infer=infer)
        z = pyro.sample("z", dist.Normal(2 * y - 1, 0.8))
        pyro.sample("x", dist.Normal(torch.tanh(z) * (1 + y) + c, 0.2), obs=x)

    def guide(x, c):
        if not marked:
            pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.5)))
        pyro.sample("z", dist.Normal(x, 1.0))

    def log_joint(z):
        parts = []
        for y, odds in ((0.0, 0.6), (1.0, 0.4)):
            prior = math.log(odds) + dist.Normal(2 * y - 1, 0.8).log_prob(z)
            loc = torch.tanh(z)[:, None] * (1 + y) + c
            parts.append(prior[:, None] + dist.Normal(loc, 0.2).log_prob(x))
        return torch.logaddexp(*parts)

    x, c = torch.linspace(-2, 2, 5), torch.linspace(0, 0.1, 5)
    result = exact(*program(model, guide), (x, c), rule)
    check(result, by_quadrature(log_joint), 1e-5)
    assert "over 2 values" in result.how


# Quadrature.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_vae_of_few_latents(latent_dim, rule):
    torch.manual_seed(latent_dim)
    vae, x = bernoulli_vae(latent_dim), (torch.rand(4, 6) < 0.5).double()
    result = exact(vae.model, vae.guide, x, rule, tolerance=1e-7)
    check(result, dense(vae, x, 201 if latent_dim == 2 else 2001), 1e-6)
    assert f"{latent_dim} dimension" in result.how


def test_a_vae_of_three_latents():
    torch.manual_seed(3)
    vae, x = bernoulli_vae(3), (torch.rand(2, 6) < 0.5).double()
    truth = dense(vae, x, 65)
    for rule in RULES:
        check(exact(vae.model, vae.guide, x, rule, tolerance=1e-4), truth, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_vaes_of_three_latents_by_both_rules(seed):
    torch.manual_seed(seed)
    vae, x = bernoulli_vae(3, spread=1.0, dim=30), (torch.rand(3, 30) < 0.5).double()
    truth = dense(vae, x, 97)
    fine = exact(vae.model, vae.guide, x)
    check(fine, truth, 1e-6)
    other = exact(vae.model, vae.guide, x, "gauss-hermite")
    assert ((other.values - truth).abs() <= other.std_error + 1e-9).all()


def _latent(prior, likelihood, guide_at):
    def model(x):
        z = pyro.sample("z", prior)
        pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        pyro.sample("z", guide_at(x))

    return program(model, guide)


def _below(x):
    return dist.Normal(x, 2.0).cdf(torch.zeros_like(x))


CONJUGATE = {
    "gamma-poisson": (
        lambda x: _latent(
            dist.Gamma(x.new_tensor(2.5), x.new_tensor(0.7)),
            dist.Poisson,
            lambda x: dist.Gamma(x + 1.0, 2.0),
        ),
        lambda x: dist.GammaPoisson(x.new_tensor(2.5), x.new_tensor(0.7)).log_prob(x),
    ),
    "beta-binomial": (
        lambda x: _latent(
            dist.Beta(x.new_tensor(0.8), x.new_tensor(2.0)),
            lambda z: dist.Binomial(12, z),
            lambda x: dist.Beta(x + 1.0, 13.0 - x),
        ),
        lambda x: dist.BetaBinomial(x.new_tensor(0.8), x.new_tensor(2.0), 12).log_prob(x),
    ),
    "uniform": (
        lambda x: _latent(
            dist.Uniform(x.new_tensor(0.0), 12.0),
            lambda z: dist.Normal(z, 2.0),
            lambda x: dist.Uniform(torch.zeros_like(x), 12.0),
        ),
        lambda x: ((dist.Normal(x, 2.0).cdf(x.new_tensor(12.0)) - _below(x)) / 12).log(),
    ),
    "lognormal": (
        lambda x: _latent(
            dist.LogNormal(x.new_tensor(0.4), x.new_tensor(0.9)),
            lambda z: dist.LogNormal(z.log(), 0.3),
            lambda x: dist.LogNormal(x.clamp(min=0.1).log(), 1.0),
        ),
        lambda x: dist.LogNormal(x.new_tensor(0.4), math.hypot(0.9, 0.3)).log_prob(x),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONJUGATE)
def test_latents_with_bounds(name, rule):
    programs, truth = CONJUGATE[name]
    x = torch.tensor([1.0, 4.0, 11.0])
    result = exact(*programs(x), x, rule)
    check(result, truth(x), 1e-6)
    assert ("closed" in result.how) == (name == "lognormal")  # normal in log z


def test_two_modes_and_a_guide_at_neither():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.01), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.full_like(x, 5.0), 0.1))

    def log_joint(z):
        return dist.Normal(0.0, 1.0).log_prob(z)[:, None] + dist.Normal(
            z[:, None] ** 2, 0.01
        ).log_prob(x)

    x = torch.tensor([0.2, 1.0, 4.0])
    check(exact(*program(model, guide), x), by_quadrature(log_joint, points=400_001), 1e-6)


def test_a_narrow_posterior_far_from_prior_and_guide():
    """Rotated, so that no axis of the grid is the posterior's, and bent."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.01]])

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        w = z @ turn
        w = torch.stack([w[:, 0] + w[:, 1] ** 2 / 50, w[:, 1]], 1)  # of unit Jacobian
        noise = torch.tensor([1e-3, 0.3])
        pyro.sample("x", dist.Normal(w, noise).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.ones_like(x), 0.01).to_event(1))

    x = torch.tensor([[10.0, -20.0], [0.0, 0.0]])
    # In w the likelihood is normal: with the first to within 1e-3, one dimension is left.
    v, w_line = torch.linspace(-26, 4, 3001), []
    nodes = torch.linspace(-8e-3, 8e-3, 65)
    for first, second in x:
        w0 = first + nodes[:, None] - v**2 / 50
        z = torch.stack(torch.broadcast_tensors(w0, v), -1) @ torch.linalg.inv(turn)
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_p = log_p + dist.Normal(0.0, 1e-3).log_prob(nodes)[:, None]
        log_p = log_p + dist.Normal(v, 0.3).log_prob(second)
        w_line.append(log_p.flatten().logsumexp(0) + math.log(1e-2 * 1.6e-2 / 64))
    truth = torch.stack(w_line) - torch.linalg.slogdet(turn).logabsdet
    result = exact(*program(model, guide), x)
    check(result, truth, 1e-6)
    assert "grid" in result.how


@pytest.mark.parametrize("rule", RULES)
def test_a_posterior_a_thousand_standard_deviations_away(rule):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z + 0.1 * torch.sin(z), 0.01), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    def log_joint(z):
        likelihood = dist.Normal(z[:, None] + 0.1 * torch.sin(z[:, None]), 0.01)
        return dist.Normal(0.0, 1.0).log_prob(z)[:, None] + likelihood.log_prob(x)

    x = torch.tensor([3000.0])
    result = exact(*program(model, guide), x, rule)
    check(result, by_quadrature(log_joint, 2998.0, 3002.0, 40_001), 1e-6)


def test_an_edge_is_integrated_slowly_and_says_so():
    def model(x):
        z = pyro.sample("z", dist.Laplace(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x.sum(1))

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    def log_joint(s):  # the sum of two Laplace variables
        return (
            ((1 + s.abs()) / 4).log()[:, None]
            - s.abs()[:, None]
            + dist.Normal(s[:, None], 1.0).log_prob(x.sum(1))
        )

    x = torch.tensor([[0.3, 0.4], [2.0, 1.0]])
    result = exact(*program(model, guide), x, max_evaluations=30_000)
    truth = by_quadrature(log_joint, -40, 40, 400_001)
    assert (result.std_error > 1e-6).all()
    check(result, truth, 1e-2)


def test_importance_sampling_agrees_within_its_error():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(torch.tanh(2 * z), 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 1.2))

    x = torch.linspace(-2, 2, 20)
    bound = log_px(*program(model, guide), x, 5000, seed=0)
    assert (bound.khat < 0.5).all()
    z = (bound.values - exact(*program(model, guide), x).values) / bound.std_error
    assert (z.abs() < 4).all()
    assert z.std() < 1.5


# What it says, and what it leaves alone.


def test_a_result_says_what_it_is():
    ppca, x = PPCAS[2], DATA[2]
    said = str(exact(ppca.model, ppca.guide, x))
    assert said.startswith("log p(x) = -")
    assert "the value by the closed form of a linear-Gaussian program, mean over 33 data" in said
    assert "By its own account no datum is off by more than" in said
    for word in ("k-hat", "seed", "particles", "bound ", "Monte Carlo"):
        assert word not in said
    assert "Standard error" not in str(exact(ppca.model, ppca.guide, x[:1]))


def test_seed_and_blocks_change_nothing():
    torch.manual_seed(6)
    vae, x = bernoulli_vae(1), (torch.rand(11, 6) < 0.5).double()
    first = log_px(vae.model, vae.guide, x, method="exact", seed=1)
    second = log_px(vae.model, vae.guide, x, method="exact", seed=2)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=0)
    parts = [
        log_px(vae.model, vae.guide, x, method="exact", seed=1, block_size=4, blocks=[i])
        for i in range(3)
    ]
    torch.testing.assert_close(LogPx.join(parts).values, first.values, rtol=0, atol=2e-6)


def test_nothing_of_the_callers_changes():
    torch.manual_seed(7)
    vae, x = bernoulli_vae(1).float(), (torch.rand(3, 6) < 0.5).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    exact(vae.model, vae.guide, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    for name, value in vae.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(parameter.requires_grad for parameter in vae.parameters())


# Refusals.


def _refused(programs, x, match, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        exact(*programs, x, **kwargs)


def test_many_latents_are_refused():
    torch.manual_seed(8)
    vae, x = bernoulli_vae(4), (torch.rand(3, 6) < 0.5).double()
    _refused((vae.model, vae.guide), x, "4 continuous latents and is not linear-Gaussian.*annealed")


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x: dist.Poisson(torch.ones_like(x)), "'k' .Poisson. does not list its values"),
        (
            lambda x: dist.Bernoulli(torch.full((len(x), 14), 0.5)).to_event(1),
            "'k' has 2 values in each of 14 entries.*10,000",
        ),
    ],
)
def test_many_discrete_values_are_refused(fn, match):
    def model(x):
        k = pyro.sample("k", fn(x))
        k = k.sum(1) if k.dim() == 2 else k
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    _refused(program(model, lambda x: pyro.sample("k", fn(x))), torch.zeros(3), match)


def test_a_support_that_depends_on_the_data_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1 + x))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1 + x))

    _refused(program(model, guide), torch.tensor([1.0, 2.0]), "support of site 'z'")


def test_data_that_cannot_come_from_the_model_are_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z**2, 1.0).mask(x > 0), obs=x)
        pyro.factor("never", torch.where(x > 2, -math.inf, 0.0))

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0))

    _refused(program(model, guide), torch.tensor([1.0, 3.0]), "p\\(x, z\\) is zero")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rule must be one of adaptive, gauss-hermite"):
        Exact("simpson")
    with pytest.raises(ValueError, match="tolerance must be between"):
        Exact(tolerance=0.0)
    with pytest.raises(ValueError, match="max_evaluations must be at least"):
        Exact(max_evaluations=10)
    ppca, x = PPCAS[2], DATA[2]
    with pytest.raises(ValueError, match="num_particles must be left out"):
        log_px(ppca.model, ppca.guide, x, 100, method="exact")
    with pytest.raises(ValueError, match=r"runs in torch.float64 alone"):
        log_px(ppca.model, ppca.guide, x, method="exact", dtype=torch.float32)
