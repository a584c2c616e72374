"""Priors against arithmetic: mixtures by hand, the guide inside VampPrior, flows, training."""

import copy
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from table import IMAGE, LATENTS, NET, PRIORS
from torch import Tensor

import pyrovae
from pyrovae import VAE, data, guides, likelihoods, nets, objectives, priors, program
from pyrovae._distributions import diagonal_normal
from pyrovae._mixture import Mixture
from pyrovae.compiled import make_fx, with_gradients


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(prior: priors.Prior, guide: guides.Guide | None = None) -> VAE:
    guide = guide or guides.Normal(IMAGE, LATENTS, NET)
    return VAE(prior, likelihoods.Bernoulli(IMAGE, LATENTS, NET), guide)


def vamp(num_components: int = 5, guide: guides.Guide | None = None) -> VAE:
    return make(priors.VampPrior(IMAGE, LATENTS, num_components), guide)


def binary(num: int = 20) -> Tensor:
    return (torch.rand(num, *IMAGE) < 0.3).to(torch.get_default_dtype())


# Mixtures -----------------------------------------------------------------------------------------


def full_rank(given: Tensor) -> dist.TorchDistribution:
    tril = torch.tensor([[1.0, 0.0], [0.7, 0.4]]).to(given)
    return dist.MultivariateNormal(
        given, scale_tril=tril * (1 + given[..., :1, None].tanh().square())
    )


def diagonal(given: Tensor) -> dist.TorchDistribution:
    return diagonal_normal(given, given.flip(-1).abs(), 1)


@pytest.mark.parametrize("family", [full_rank, diagonal])
@pytest.mark.parametrize("batch", [(), (7,), (3, 7)])
def test_a_mixture_is_that_of_torch(family: Any, batch: tuple[int, ...]) -> None:
    logits, given = torch.randn(4), torch.randn(4, 2)
    mixture = Mixture(logits, given, family).expand(batch)
    other = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), family(given)
    )
    assert (mixture.batch_shape, mixture.event_shape) == (batch, (2,))
    for z in (torch.randn(6, *batch, 2), torch.randn(*batch, 2), torch.randn(2)):
        expected = other.log_prob(z).expand(torch.broadcast_shapes(z.shape[:-1], batch))
        torch.testing.assert_close(mixture.log_prob(z), expected)
    torch.testing.assert_close(mixture.mean, other.mean.expand(*batch, 2))
    torch.testing.assert_close(mixture.variance, other.variance.expand(*batch, 2))
    assert mixture.sample((6,)).shape == (6, *batch, 2)
    with pytest.raises(ValueError, match="support"):
        mixture.log_prob(torch.full((2,), math.nan))


@pytest.mark.parametrize("family", [full_rank, diagonal])
def test_a_mixture_draws_what_it_scores(family: Any) -> None:
    mixture = Mixture(torch.tensor([0.0, 1.0, -1.0]), torch.randn(3, 2), family)
    z = mixture.expand((10,)).sample((5_000,)).flatten(0, 1)
    error = (mixture.variance / len(z)).sqrt()
    assert ((z.mean(0) - mixture.mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), mixture.variance, rtol=0.05, atol=0)
    _same_in_quadrants(mixture, z)


def _same_in_quadrants(pz: dist.TorchDistribution, z: Tensor) -> None:
    """How many draws of two latents lie in each quadrant, against the integral of the density."""
    grid = (torch.arange(320) - 159.5) * 0.075
    at = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    density = pz.log_prob(at).exp().detach() * 0.075**2
    weight = torch.stack([grid < 0, grid > 0]).to(density)
    expected = weight @ density @ weight.T
    side = torch.stack([z < 0, z > 0]).double()
    found = torch.einsum("in,jn->ij", side[..., 0], side[..., 1]) / len(z)
    error = (expected * (1 - expected) / len(z)).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_narrow_normals_are_scored_to_the_last_digit(scale: float) -> None:
    raw = torch.full((30, 20), math.log(math.expm1(scale)))
    loc = torch.randn(30, 20)
    z = loc + scale * torch.randn(30, 20)
    params = torch.cat([loc, raw], -1).float()
    single = Mixture(torch.zeros(30).float(), params, priors.normal._normal).log_prob(z.float())
    normals = diagonal_normal(*params.chunk(2, -1), 1)
    exact = dist.Normal(normals.base_dist.loc.double(), normals.base_dist.scale.double())
    log_p = exact.log_prob(z.float().double()[:, None]).sum(-1).logsumexp(-1) - math.log(30)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), log_p, rtol=1e-6, atol=1e-4)


def test_gradients_of_a_mixture_are_those_of_finite_differences() -> None:
    weights, params, z = torch.randn(3), torch.randn(3, 4), torch.randn(6, 2)
    given = [tensor.requires_grad_() for tensor in (weights, params, z)]
    assert torch.autograd.gradcheck(
        lambda w, p, z: Mixture(w, p, priors.normal._normal).log_prob(z), given
    )


@pytest.mark.parametrize("count", [0, 2.5])
@pytest.mark.parametrize(
    ("kind", "name"), [(priors.GaussianMixture, "num_components"), (priors.Flow, "transforms")]
)
def test_num_components_and_transforms_are_counts(kind: Any, name: str, count: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive integers, got {count}"):
        kind(2, **{name: count})


@pytest.mark.parametrize("latent_dim", [1, 2, 50])
def test_learned_priors_start_near_the_standard_normal(latent_dim: int) -> None:
    z = torch.randn(200, latent_dim)
    standard = priors.StandardNormal(latent_dim)().log_prob(z)
    torch.testing.assert_close(priors.Normal(latent_dim)().log_prob(z), standard)
    if latent_dim > 1:
        near = priors.Flow(latent_dim)().log_prob(z)
        assert 0 < (near - standard).abs().mean() < 0.01 * latent_dim
    start = priors.GaussianMixture(latent_dim, 200)()
    assert start.mean.abs().max() < 0.25
    torch.testing.assert_close(start.variance, torch.ones(latent_dim), rtol=0.2, atol=0)


def test_the_learned_normal_has_its_kl_in_closed_form(caplog: Any) -> None:
    vae = make(priors.Normal(LATENTS))
    with torch.no_grad():
        vae.prior.loc.add_(0.5)
        vae.prior.raw_scale.add_(0.3)
    x = binary(1).repeat(20_000, 1, 1, 1)
    kl = [
        objectives.ELBO(analytic_kl=exact).surrogate(vae.model, vae.guide, (x,))[1]["kl"] / len(x)
        for exact in (True, False)
    ]
    torch.testing.assert_close(*kl, rtol=0, atol=0.03)
    assert not caplog.records


# VampPrior ----------------------------------------------------------------------------------------

GUIDES = [
    guides.Normal,
    guides.FullRankNormal,
    guides.NormalMixture,
    guides.NeuralSplineCoupling,
]


@pytest.mark.parametrize("kind", GUIDES)
def test_vamp_is_the_mixture_of_the_guide_at_its_pseudo_inputs(kind: Any) -> None:
    vae = vamp(guide=kind(IMAGE, LATENTS, NET))
    z = torch.randn(6, LATENTS)
    each = [vae.encoder(u).log_prob(z) for u in vae.prior.pseudo_inputs]
    by_hand = torch.stack(each).logsumexp(0) - math.log(5)
    torch.testing.assert_close(vae.prior().expand((6,)).log_prob(z), by_hand)
    means = torch.stack([vae.encoder(u).mean for u in vae.prior.pseudo_inputs])
    torch.testing.assert_close(vae.prior().mean, means.mean(0))
    draws = vae.prior().sample((4_000,))
    error = draws.std(0) / math.sqrt(len(draws)) + draws.std(0) / math.sqrt(256)
    assert ((draws.mean(0) - vae.prior().mean).abs() < 5 * error).all()


def test_gradients_reach_pseudo_inputs_and_guide() -> None:
    vae = vamp()
    vae.prior().log_prob(torch.randn(20, LATENTS)).sum().backward()
    for param in (vae.prior.pseudo_inputs, *vae.encoder.parameters()):
        assert param.grad is not None
        assert param.grad.any()


def test_the_guide_is_registered_once() -> None:
    vae = vamp()
    assert list(vae.prior.state_dict()) == ["pseudo_inputs"]
    assert [name for name, _ in vae.named_parameters() if "prior" in name] == [
        "prior.pseudo_inputs"
    ]
    assert sum(module is vae.encoder for module in vae.modules()) == 1


def test_a_copy_has_a_guide_of_its_own() -> None:
    vae = vamp()
    again = copy.deepcopy(vae)
    z = torch.randn(3, LATENTS)
    before = vae.prior().log_prob(z)
    with torch.no_grad():
        for param in again.encoder.parameters():
            param.add_(1.0)
    assert torch.equal(vae.prior().log_prob(z), before)
    assert (again.prior().log_prob(z) - before).abs().min() > 1e-3
    assert vae.float().prior().log_prob(z.float()).dtype == torch.float32


@pytest.mark.parametrize("name", PRIORS)
def test_saved_and_loaded_it_gives_the_same_log_px(name: str, tmp_path: Path) -> None:
    vae, x = make(PRIORS[name]()), binary(8)
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    scores = [pyrovae.log_px(m.model, m.guide, x, num_particles=30, seed=0) for m in (vae, again)]
    assert torch.equal(scores[0].values, scores[1].values)


def test_vamp_refuses_a_guide_that_scores_only_its_own_draws() -> None:
    reason = r"VampPrior scores every z under q\(z\|u\), and the guide Planar scores only its own"
    with pytest.raises(ValueError, match=reason) as error:
        vamp(guide=guides.Planar(IMAGE, LATENTS, NET))
    assert "\n" not in str(error.value)


def test_vamp_refuses_other_shapes_and_to_be_alone() -> None:
    prior = priors.VampPrior(IMAGE, LATENTS)
    with pytest.raises(ValueError, match="made of a guide: VAE"):
        prior()
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 4\) and the guide Normal \(5,\)"):
        prior.connect(guides.Normal((5,), LATENTS))
    with pytest.raises(ValueError, match="has latent_dim 2 and the guide Normal 3"):
        prior.connect(guides.Normal(IMAGE, 3))
    with pytest.raises(ValueError, match="the parts disagree on shape"):
        make(priors.VampPrior((5,), LATENTS))
    with pytest.raises(ValueError, match="num_components must be positive integers, got 0"):
        priors.VampPrior(IMAGE, LATENTS, num_components=0)


def test_pseudo_inputs_start_at_the_data_once() -> None:
    vae, x = vamp(), torch.rand(21, *IMAGE)
    x[0, 0, 0, 0] = math.nan
    vae.double().initialize(x)
    u = vae.prior.pseudo_inputs.detach().clone()
    torch.testing.assert_close(u, x.nan_to_num()[[0, 5, 10, 15, 20]], rtol=0, atol=0.01)
    vae.initialize(x + 1)
    assert torch.equal(vae.prior.pseudo_inputs, u)
    few = vamp(num_components=50).float()
    few.initialize(x[:3].float())
    u = few.prior.pseudo_inputs
    assert len(u.unique(dim=0)) == 50
    torch.testing.assert_close(u[[0, 49]].double(), x[[0, 2]].nan_to_num(), rtol=0, atol=0.05)


# Flow ---------------------------------------------------------------------------------------------


def test_a_flow_needs_two_latents() -> None:
    with pytest.raises(ValueError, match="Flow changes latents given others: latent_dim must be"):
        priors.Flow(1)


def test_a_flow_draws_what_it_scores() -> None:
    prior = priors.Flow(2, transforms=2, hidden=8)
    with torch.no_grad():
        for param in prior.parameters():
            param.add_(0.3 * torch.randn_like(param))
    with torch.no_grad():
        pz = prior()
        z = pz.sample((50_000,))
    _same_in_quadrants(pz, z)


# In training --------------------------------------------------------------------------------------


def _loss_and_gradients(vae: VAE) -> Any:
    objective = objectives.ELBO()
    step = with_gradients(
        lambda x: objective.surrogate(vae.model, vae.guide, (x,)), list(vae.parameters())
    )

    def seeded(x: Tensor) -> Any:
        torch.manual_seed(0)
        with program.validation(False):
            return step(x)

    return seeded


@pytest.mark.parametrize("name", ["GaussianMixture", "VampPrior", "Flow"])
@pytest.mark.slow
def test_a_traced_step_is_that_of_eager(name: str) -> None:
    vae = make(PRIORS[name]())
    step, x = _loss_and_gradients(vae), binary(7)
    graph = make_fx(step)(x)
    with torch.no_grad():
        for param in vae.parameters():  # which the graph must follow
            param.add_(0.1 * torch.randn_like(param))
        torch.manual_seed(0)
        losses, grads = graph(x)
    expected, exact = step(x)
    torch.testing.assert_close(losses, expected)
    for grad, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "StandardNormal"])
def test_priors_train_on_the_digits(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    digits = data.load("digits")
    shape, net = digits.shape, nets.MLP(hidden=(32,))
    kinds = {
        "VampPrior": lambda: priors.VampPrior(shape, 4, num_components=20),
        "GaussianMixture": lambda: priors.GaussianMixture(4),
    }
    prior = kinds.get(name, lambda: getattr(priors, name)(4))()
    vae = VAE(prior, likelihoods.Bernoulli(shape, 4, net), guides.Normal(shape, 4, net))
    vae.initialize(digits.train[slice(0, 1000)])
    before = [param.detach().clone() for param in prior.parameters()]
    history = pyrovae.fit(
        vae, digits.train, epochs=3, batch_size=100, lr=5e-3, progress=False, compile=False
    )
    assert history[-1]["elbo"] > history[0]["elbo"] + 0.3
    for old, new in zip(before, prior.parameters(), strict=True):
        assert not torch.equal(old, new)
    score = pyrovae.log_px(vae.model, vae.guide, digits.test.subset(slice(0, 20)), 50)
    bound = pyrovae.elbo(vae.model, vae.guide, digits.test.subset(slice(0, 20)), 50)
    assert score.mean > bound.mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GaussianMixture", "VampPrior", "Flow"])
def test_latents_of_two_kinds_need_a_prior_that_bends(name: str) -> None:
    """A linear decoder keeps p(x) normal under a normal prior; the data are two clusters."""
    torch.set_default_dtype(torch.float32)
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.4, 0.6])),
        dist.Normal(torch.tensor([[-2.0, 1.0, 0.0], [2.0, -1.0, 0.0]]), 0.5).to_event(1),
    )
    train, test = truth.sample((2_000,)), truth.sample((500,))
    kinds = {
        "GaussianMixture": lambda: priors.GaussianMixture(2, num_components=3),
        "VampPrior": lambda: priors.VampPrior((3,), 2, num_components=20),
        "Flow": lambda: priors.Flow(2),
        "StandardNormal": lambda: priors.StandardNormal(2),
    }
    exact = {}
    for kind in (name, "StandardNormal"):
        torch.manual_seed(0)
        vae = VAE(
            kinds[kind](),
            likelihoods.Normal((3,), 2, nets.MLP(hidden=())),
            guides.Normal((3,), 2, nets.MLP(hidden=(16,))),
        )
        pyrovae.fit(vae, train, epochs=30, lr=1e-2, progress=False, compile=False)
        exact[kind] = _by_quadrature(vae.double(), test.double()).mean()
    best = truth.log_prob(test).mean()
    assert exact[name] > exact["StandardNormal"] + 0.3
    assert best - 0.2 < exact[name] < best + 0.05


@torch.no_grad()
def _by_quadrature(vae: VAE, x: Tensor) -> Tensor:
    """Log p(x) of each datum, for a model with two latents."""
    grid = torch.linspace(-8, 8, 161).double()
    z = torch.cartesian_prod(grid, grid)[:, None]
    log_p = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)
    return log_p.logsumexp(0) + 2 * (grid[1] - grid[0]).log()
