"""The VAE: what it gives, what it leaves alone, what it refuses."""

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae import VAE, guides, likelihoods, nets, priors

SHAPE = (1, 4, 5)


def make(
    shape: tuple[int, ...] = SHAPE,
    kind: Any = likelihoods.Normal,
    missing: bool = False,
    **options: Any,
) -> VAE:
    net = nets.MLP(hidden=(8,), batch_norm=True)
    likelihood = kind(shape, 2, net)
    return VAE(priors.StandardNormal(2), likelihood, guides.Normal(shape, 2, net), missing)


def data(num: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(num, *shape)


METHODS = {
    "encode": lambda vae: vae.encode(data()),
    "decode": lambda vae: vae.decode(torch.randn(6, 2)),
    "reconstruct": lambda vae: vae.reconstruct(data()),
    "sample": lambda vae: vae.sample(6),
    "sample, mean": lambda vae: vae.sample(6, mean=True),
    "interpolate": lambda vae: vae.interpolate(data(), data(), 3),
}
SHAPES = {
    "encode": (6, 2),
    "decode": (6, *SHAPE),
    "reconstruct": (6, *SHAPE),
    "sample": (6, *SHAPE),
    "sample, mean": (6, *SHAPE),
    "interpolate": (3, 6, *SHAPE),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_evaluation_changes_nothing(name: str, training: bool) -> None:
    vae = make().train(training)
    vae.likelihood.eval()
    before = copy.deepcopy(vae.state_dict())
    out = METHODS[name](vae)
    assert out.shape == SHAPES[name]
    assert not out.requires_grad
    assert vae.training == vae.encoder.training == training
    assert not vae.likelihood.training
    after = vae.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_modes_come_back_after_an_error() -> None:
    vae = make().train()
    with pytest.raises(ValueError, match="the network takes tensors"):
        vae.encode(torch.zeros(2, 3))
    assert all(module.training for module in vae.modules())


def test_encode_and_decode_are_the_means_of_the_parts() -> None:
    vae, x = make().eval(), data()
    torch.testing.assert_close(vae.encode(x), vae.posterior(x).mean)
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood(vae.posterior(x).mean).mean)
    assert vae.decode(torch.zeros(2)).shape == SHAPE
    assert vae.decode(torch.zeros(3, 4, 2)).shape == (3, 4, *SHAPE)


def test_interpolation_ends_at_the_reconstructions() -> None:
    vae, start, end = make(), data(), data()
    path = vae.interpolate(start, end, steps=7)
    torch.testing.assert_close(path[0], vae.reconstruct(start))
    torch.testing.assert_close(path[-1], vae.reconstruct(end))
    middle = vae.decode((vae.encode(start) + vae.encode(end)) / 2)
    torch.testing.assert_close(path[3], middle)
    with pytest.raises(ValueError, match="steps must be at least 2"):
        vae.interpolate(start, end, steps=1)
    with pytest.raises(ValueError, match="path must be straight or spherical, got 'curved'"):
        vae.interpolate(start, end, path="curved")  # type: ignore[arg-type]


def test_a_spherical_path_decodes_its_codes() -> None:
    vae, start, end = make(), data(), data()
    codes = vae.interpolate_latent(vae.encode(start), vae.encode(end), 5, "spherical")
    path = vae.interpolate(start, end, 5, path="spherical")
    assert torch.equal(path, vae.decode(codes))
    torch.testing.assert_close(path[0], vae.reconstruct(start))
    torch.testing.assert_close(path[-1], vae.reconstruct(end))
    assert not torch.allclose(path, vae.interpolate(start, end, 5))


def test_a_spherical_path_turns_at_constant_speed() -> None:
    first, last = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    first, last = (3 * code / code.norm(dim=-1, keepdim=True) for code in (first, last))
    codes = VAE.interpolate_latent(first, last, 9, "spherical")
    assert codes.shape == (9, 3, 7, 16)
    torch.testing.assert_close(codes.norm(dim=-1), torch.full_like(codes[..., 0], 3.0))
    stride = codes.diff(dim=0).norm(dim=-1)
    torch.testing.assert_close(stride, stride[:1].expand_as(stride))
    torch.testing.assert_close(
        codes[4] * (first + last).norm(dim=-1, keepdim=True) / 3, first + last
    )
    torch.testing.assert_close(codes[[0, -1]], torch.stack([first, last]))


@pytest.mark.parametrize("scale", [1.0, 2.0, -1.0])
def test_without_an_arc_a_spherical_path_is_straight(scale: float) -> None:
    first = torch.randn(5, 4)
    straight, spherical = (
        VAE.interpolate_latent(first, scale * first, 6, path) for path in ("straight", "spherical")
    )
    torch.testing.assert_close(spherical, straight)


class Linear(nets.Net):
    """x = W z + 1, without hidden layers."""

    def __call__(self, in_shape: Any, out_shape: Any) -> nn.Module:
        layer = nn.Linear(in_shape[0], out_shape[0])
        nn.init.constant_(layer.bias, 1.0)
        return layer


def test_samples_have_the_moments_of_the_model() -> None:
    """Linear decoder: x ~ N(1, W W' + 0.25 I)."""
    likelihood = likelihoods.Normal((3,), 2, Linear(), scale=0.5)
    vae = VAE(priors.StandardNormal(2), likelihood, guides.Normal((3,), 2))
    x, means = vae.sample(40_000), vae.sample(40_000, mean=True)
    weight = likelihood.net.weight.detach()
    cov = weight @ weight.T
    torch.testing.assert_close(x.mean(0), torch.ones(3), rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), cov + 0.25 * torch.eye(3), rtol=0.05, atol=0.03)
    torch.testing.assert_close(means.T.cov(), cov, rtol=0.05, atol=0.03)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        vae.sample(0)


# As a Pyro program --------------------------------------------------------------------------------


def test_model_and_guide_have_the_sites_of_the_contract() -> None:
    vae, x = make(), data()
    model, guide = (pyro.poutine.trace(fn).get_trace(x) for fn in (vae.model, vae.guide))
    assert {"data", "z", "x"} <= set(model.nodes)
    assert {"data", "z"} <= set(guide.nodes)
    model.compute_log_prob()
    assert model.nodes["x"]["log_prob"].shape == model.nodes["z"]["log_prob"].shape == (6,)
    assert model.nodes["x"]["is_observed"]


def names(vae: VAE) -> set[str]:
    with pyro.get_param_store().scope() as store:
        vae.model(data(2))
        vae.guide(data(2))
    return set(store["params"])


def test_each_instance_has_names_of_its_own_in_the_store() -> None:
    vae = make()
    copies = [copy.deepcopy(vae), copy.copy(vae), pickle.loads(pickle.dumps(vae)), make()]
    found = [names(one) for one in (vae, *copies)]
    assert all(len(one) == len(list(vae.parameters())) for one in found)
    assert len(set.union(*found)) == sum(len(one) for one in found)
    assert names(vae) == found[0]


def test_two_models_trained_one_after_the_other_both_learn() -> None:
    x = data(8)
    for vae in (make(), make()):
        before = copy.deepcopy(dict(vae.named_parameters()))
        svi = pyro.infer.SVI(
            vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()
        )
        svi.step(x)
        assert all(not torch.equal(p, before[name]) for name, p in vae.named_parameters())


def test_a_copy_is_independent() -> None:
    vae, x = make().eval(), data()
    twin = copy.deepcopy(vae)
    assert torch.equal(vae.encode(x), twin.encode(x))
    with torch.no_grad():
        twin.encoder.net.bias.add_(1)
    assert not torch.equal(vae.encode(x), twin.encode(x))


# Missing entries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), SHAPE], ids=str)
@pytest.mark.parametrize("name", ["Normal", "Bernoulli", "ContinuousBernoulli", "Poisson"])
def test_missing_entries_are_left_out_of_the_density(name: str, shape: tuple[int, ...]) -> None:
    vae = make(shape, getattr(likelihoods, name), missing=True).double().eval()
    x, z = torch.ones(5, *shape, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    gone = torch.rand_like(x) < 0.5
    gone[0], gone[1] = True, False
    trace = pyro.poutine.trace(pyro.poutine.condition(vae.model, {"z": z})).get_trace(
        x.masked_fill(gone, torch.nan)
    )
    trace.compute_log_prob()
    per_entry = vae.likelihood(z).base_dist.log_prob(x).masked_fill(gone, 0)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], per_entry.flatten(1).sum(1))


def test_missing_entries_are_zero_to_the_guide_and_filled_by_reconstruct() -> None:
    vae, x = make(missing=True).eval(), data()
    with_nan = x.masked_fill(x > 0.5, torch.nan)
    torch.testing.assert_close(vae.encode(with_nan), vae.encode(x.masked_fill(x > 0.5, 0.0)))
    assert vae.reconstruct(with_nan).isfinite().all()


def test_a_gradient_with_missing_entries_is_finite() -> None:
    vae = make(missing=True)
    x = data(8).masked_fill(data(8) > 0, torch.nan)
    pyro.infer.Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


class Together(likelihoods.Likelihood):
    """A likelihood whose entries depend on each other."""

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Full covariance."""
        return dist.MultivariateNormal(params, torch.eye(params.shape[-1]))


def test_missing_entries_need_independent_ones() -> None:
    vae = make((4,), Together, missing=True)
    with pytest.raises(ValueError, match="entries are independent given z, not MultivariateNormal"):
        vae.model(torch.zeros(3, 4))


# Parts that do not fit ----------------------------------------------------------------------------


def test_parts_that_disagree_are_refused() -> None:
    prior, likelihood = priors.StandardNormal(2), likelihoods.Normal((4,), 2)
    with pytest.raises(ValueError, match="latent_dim: prior 2, likelihood 2, guide 3"):
        VAE(prior, likelihood, guides.Normal((4,), 3))
    with pytest.raises(ValueError, match=r"shape: likelihood \(4,\), guide \(2, 2\)"):
        VAE(prior, likelihood, guides.Normal((2, 2), 2))
    with pytest.raises(TypeError, match=r"prior must be a module of pyrovae.priors, got <class"):
        VAE(priors.StandardNormal, likelihood, guides.Normal((4,), 2))  # type: ignore[arg-type]


def test_shapes_of_any_kind_agree() -> None:
    x = torch.zeros(3, 4)
    parts = likelihoods.Normal([4], 2), guides.Normal(x.shape[1:], 2)  # type: ignore[arg-type]
    assert VAE(priors.StandardNormal(2), *parts).reconstruct(x).shape == (3, 4)


def test_modules_of_ones_own_do_as_parts() -> None:
    class Prior(nn.Module):
        def forward(self) -> dist.TorchDistribution:
            return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)

    parts: Any = (Prior(), likelihoods.Normal((4,), 2), guides.Normal((4,), 2))
    vae = VAE(*parts)
    vae.initialize(torch.ones(5, 4))
    torch.testing.assert_close(vae.decode(torch.zeros(2)), torch.ones(4))
    assert pyrovae.elbo(vae.model, vae.guide, torch.zeros(3, 4)).shape == (3,)
