"""Guides against truths: Jacobians, inverses, quadrature, closed forms."""

import copy
import gc
import math
import subprocess
import sys
import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from table import GUIDES, IMAGE, NET
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import compiled, guides
from pyrovae._distributions import positive
from pyrovae._flows import Flowed, zuko
from pyrovae.guides.flows import _Reflections
from pyrovae.guides.mixture import ReparameterizedMixture

DIM = 4
FLOWS: dict[str, Any] = {
    "Planar": lambda dim=DIM: guides.Planar(IMAGE, dim, NET, transforms=3),
    "OrthogonalSylvester": lambda dim=DIM: guides.OrthogonalSylvester(IMAGE, dim, NET),
    "OrthogonalSylvester, narrow": lambda dim=DIM: guides.OrthogonalSylvester(
        IMAGE, dim, NET, num_ortho=2
    ),
    "HouseholderSylvester": lambda dim=DIM: guides.HouseholderSylvester(IMAGE, dim, NET),
    "IAF": lambda dim=DIM: guides.IAF(IMAGE, dim, NET),
    "NeuralSpline": lambda dim=DIM: guides.NeuralSpline(IMAGE, dim, NET),
    "NeuralSplineCoupling": lambda dim=DIM: guides.NeuralSplineCoupling(IMAGE, dim, NET),
}
INVERTIBLE = ["IAF", "NeuralSpline", "NeuralSplineCoupling"]
POINTS = [name for name, make in GUIDES.items() if isinstance(make(), guides.Delta)]
SPREAD = [name for name in GUIDES if name not in POINTS]
SCORABLE = [name for name, make in GUIDES.items() if make().scorable]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(part: Any, by: float = 0.05) -> Any:
    """The part with other weights than it was born with."""
    with torch.no_grad():
        for param in part.parameters():
            param.add_(by * torch.randn_like(param))
    return part


def test_what_can_be_scored_is_said() -> None:
    unscorable = {"Planar", "OrthogonalSylvester", "HouseholderSylvester", "Delta"}
    assert {name for name in GUIDES if name not in SCORABLE} == unscorable


# Flows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dim", [1, DIM])
def test_the_log_determinant_is_that_of_the_jacobian(name: str, dim: int) -> None:
    if "narrow" in name and dim == 1:
        pytest.skip("two columns need two latents")
    q = shaken(FLOWS[name](dim))(torch.randn(3, *IMAGE))
    noise = 2 * torch.randn(3, dim)
    _, log_det = q.transform.call_and_ladj(noise)
    blocks = jacobian(q.transform, noise, vectorize=True)[range(3), :, range(3)]
    torch.testing.assert_close(log_det, torch.linalg.slogdet(blocks)[1], rtol=1e-9, atol=1e-10)
    assert log_det.abs().max() > 0.005


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_score_of_a_draw_is_that_of_its_inverse(name: str) -> None:
    q = shaken(FLOWS[name]())(torch.randn(3, *IMAGE))
    z = q.rsample((5,))
    assert q.log_prob(z) is q.log_prob(z)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_scores_at_a_given_value_have_the_slope_of_finite_differences(name: str) -> None:
    guide, x = shaken(FLOWS[name]()), torch.randn(3, *IMAGE)
    value = guide(x).sample()
    directions = [0.1 * torch.randn_like(p) for p in guide.parameters()]

    def shifted(by: float) -> Tensor:
        moved = copy.deepcopy(guide)
        with torch.no_grad():
            for p, direction in zip(moved.parameters(), directions, strict=True):
                p.add_(by * direction)
            return moved(x).log_prob(value).sum()

    log_prob = guide(x).log_prob(value).sum()
    grads = torch.autograd.grad(log_prob, list(guide.parameters()))
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    h = 1e-6
    torch.testing.assert_close(slope, (shifted(h) - shifted(-h)) / (2 * h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in INVERTIBLE])
def test_a_draw_without_gradients_is_scored_with_them(name: str) -> None:
    guide = shaken(FLOWS[name]())
    q = guide(torch.randn(3, *IMAGE))
    z = q.sample()
    with torch.no_grad():
        remembered = q.log_prob(z)
    log_prob = q.log_prob(z)
    torch.testing.assert_close(log_prob, remembered, rtol=1e-9, atol=1e-9)
    assert not remembered.requires_grad
    assert log_prob.requires_grad


@pytest.mark.parametrize("name", [name for name in FLOWS if name not in INVERTIBLE])
def test_flows_without_an_inverse_score_their_own_draws_alone(name: str) -> None:
    q = FLOWS[name]()(torch.randn(3, *IMAGE))
    first = q.rsample((2,))
    assert q.log_prob(first).requires_grad
    q.rsample()
    for value in (first, torch.zeros(3, DIM), q.sample()):
        with pytest.raises(NotImplementedError, match="scores only the last draw it made"):
            q.log_prob(value)
    with torch.no_grad():
        assert q.log_prob(q.sample((7,))).shape == (7, 3)


@pytest.mark.parametrize("name", SPREAD)
def test_densities_of_draws_are_those_of_a_distribution(name: str) -> None:
    """E_q[r(z) / q(z)] = 1 for a density r that lies inside q."""
    with torch.no_grad():
        q = shaken(GUIDES[name]())(torch.randn(1, *IMAGE))
        z = q.rsample((40_000,))
        r = dist.Normal(z.mean(0), 0.4 * z.std(0)).to_event(1)
        ratio = (r.log_prob(z) - q.log_prob(z)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(z))
    assert ratio.std() / math.sqrt(len(z)) < 0.05


@pytest.mark.parametrize("name", ["IAF", "NeuralSpline", "NeuralSplineCoupling"])
def test_flows_made_of_networks_start_at_a_diagonal_normal(name: str) -> None:
    guide, x = FLOWS[name](), torch.randn(6, *IMAGE)
    params = guide.net(x)[..., : 2 * DIM]
    normal = guides.Normal(IMAGE, DIM, NET).distribution(params)
    assert kl_estimate(guide(x), normal).abs().max() < 0.01


def kl_estimate(q: Any, p: Any) -> Tensor:
    z = q.rsample((1000,))
    return (q.log_prob(z) - p.log_prob(z)).mean(0).detach()


def test_a_step_of_iaf_scales_by_a_tenth_to_ten_whatever_its_network_says() -> None:
    guide = FLOWS["IAF"]()
    noise, context = torch.randn(20, DIM), torch.randn(20, guide.context_dim)
    for step in guide.steps:
        with torch.no_grad():
            step.hyper[-1].weight.normal_(0, 1e4)
        blocks = jacobian(step(context), noise, vectorize=True)[range(20), :, range(20)]
        scale = blocks.diagonal(dim1=-2, dim2=-1)
        assert 0.1 - 1e-9 < scale.min() < 0.12
        assert 8 < scale.max() < 10 + 1e-9


@pytest.mark.parametrize("name", INVERTIBLE)
def test_every_latent_comes_to_depend_on_the_others(name: str) -> None:
    q = shaken(FLOWS[name]())(torch.randn(*IMAGE))
    slopes = jacobian(q.transform, torch.randn(DIM), vectorize=True)
    assert (slopes.abs().fill_diagonal_(0) > 1e-6).any(0).all()
    assert (slopes.abs().fill_diagonal_(0) > 1e-6).any(1).all()


def test_the_product_of_reflections_is_one_formula() -> None:
    v = nn.functional.normalize(torch.randn(3, 5, 4), dim=-2)
    product = torch.eye(5)
    for i in range(4):
        column = v[..., i : i + 1]
        product = product @ (torch.eye(5) - 2 * column @ column.mT)
    found = _Reflections.along(v)
    torch.testing.assert_close(found @ torch.eye(5), product.expand(3, 5, 5))
    torch.testing.assert_close(found.mT @ torch.eye(5), product.mT.expand(3, 5, 5))


def test_orthogonal_columns_are_orthonormal_and_turn_smoothly() -> None:
    """Also where the first entry of a column crosses zero, where a QR's own signs jump."""
    guide = guides.OrthogonalSylvester(IMAGE, DIM, NET, transforms=1, num_ortho=2)
    params = torch.randn(guide.param_shape())
    across = []
    for first in (-1e-6, 1e-6):
        params[2 * DIM] = first - 1  # the identity is added to it
        (step,) = guide.distribution(params).transform.transforms
        torch.testing.assert_close(step.q.mT @ step.q, torch.eye(2))
        across.append(step.q)
    torch.testing.assert_close(*across, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_planar_and_sylvester_maps_never_fold_space(scale: float) -> None:
    for name in FLOWS:
        if name in INVERTIBLE:
            continue
        guide = FLOWS[name]()
        params = (scale * torch.randn(20, *guide.param_shape())).requires_grad_()
        q = guide.distribution(params)
        noise = torch.randn(20, DIM)
        blocks = jacobian(q.transform, noise, vectorize=True)[range(20), :, range(20)]
        assert (torch.linalg.det(blocks) > 0).all() or scale == 100
        z = q.rsample()
        (grad,) = torch.autograd.grad(q.log_prob(z).sum() + z.sum(), params)
        assert z.isfinite().all()
        assert grad.isfinite().all()


# The distribution of a flow -----------------------------------------------------------------------


def test_moments_are_fixed_and_leave_the_generator_alone() -> None:
    q = shaken(FLOWS["IAF"]())(torch.randn(3, *IMAGE))
    before = torch.get_rng_state()
    first = q.mean, q.variance
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first[0], q.mean)
    assert torch.equal(first[1], q.variance)
    z = q.sample((5_000,))
    assert ((q.mean - z.mean(0)).abs() < 5 / 16 * z.std(0)).all()
    torch.testing.assert_close(q.stddev, z.std(0), rtol=0.25, atol=0)


def test_moments_of_an_affine_flow_are_those_of_its_normal() -> None:
    loc, scale = torch.randn(3, 2), 0.1 + torch.rand(3, 2)
    base = dist.Normal(torch.zeros(3, 2), torch.ones(3, 2)).to_event(1)
    q = Flowed(base, torch.distributions.AffineTransform(loc, scale, event_dim=1))
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, scale, rtol=0.2, atol=0)


@pytest.mark.parametrize("name", SCORABLE)
def test_values_broadcast_against_conditions(name: str) -> None:
    q = shaken(GUIDES[name]())(torch.randn(5, *IMAGE))
    value = torch.randn(3, 1, 2)
    both = q.log_prob(value)
    assert both.shape == (3, 5)
    for i in range(3):
        torch.testing.assert_close(both[i], q.log_prob(value[i].expand(5, 2)))
    wide = q.expand((4, 5))
    assert wide.rsample((2,)).shape == (2, 4, 5, 2)
    torch.testing.assert_close(wide.log_prob(value[0]), both[0].expand(4, 5))


def test_a_remembered_draw_holds_nothing_and_is_not_copied() -> None:
    q = FLOWS["Planar"]()(torch.randn(3, *IMAGE))
    z = q.rsample()
    assert copy.copy(q)._remembered is None
    with torch.no_grad():
        plain = FLOWS["Planar"]()(torch.randn(3, *IMAGE))
        plain.rsample()
        assert copy.deepcopy(plain).sample().shape == (3, DIM)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(z)
        del q, z
        assert gone() is None
    finally:
        gc.enable()


def test_a_flow_refuses_values_that_are_not_numbers() -> None:
    q = FLOWS["IAF"]()(torch.randn(3, *IMAGE))
    with pytest.raises(ValueError, match="support"):
        Flowed(q.base, q.transform, validate_args=True).log_prob(torch.full((3, DIM), math.nan))


@pytest.mark.slow
def test_importing_zuko_leaves_validation_on() -> None:
    code = (
        "import torch\n"
        "from torch.distributions import Distribution\n"
        "import pyrovae\n"
        "assert Distribution._validate_args\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert zuko.__name__ == "zuko"


# Mixtures -----------------------------------------------------------------------------------------


def mixture_of(params: Tensor, components: int = 3) -> ReparameterizedMixture:
    guide = guides.NormalMixture(IMAGE, DIM, NET, num_components=components)
    guide.event_shape = ((params.shape[-1] - components) // (2 + 2 * components),)
    q: Any = guide.distribution(params)
    return q


def rosenblatt(q: ReparameterizedMixture, z: Tensor) -> Tensor:
    """P(Z_d < z_d | z_1, ..., z_{d-1}), entry by entry."""
    weight = q.mixture_distribution.probs
    normal: Any = q.component_distribution
    below = []
    for d in range(z.shape[-1]):
        entry = torch.distributions.Normal(
            normal.base_dist.loc[..., d], normal.base_dist.scale[..., d]
        )
        at = z[..., d, None]
        below.append((weight * entry.cdf(at)).sum(-1) / weight.sum(-1))
        weight = weight * entry.log_prob(at).exp()
    return torch.stack(below, -1)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_draws_of_a_mixture_stay_where_their_distribution_function_puts_them(dim: int) -> None:
    params = torch.randn(6, 3 + 8 * dim)

    def place(params: Tensor) -> Tensor:
        torch.manual_seed(1)
        q = mixture_of(params)
        return rosenblatt(q, q.rsample((4,)))

    moved = jacobian(place, params)
    torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=1e-9)

    def at_a_fixed_value(params: Tensor) -> Tensor:
        return rosenblatt(mixture_of(params), torch.zeros(dim))

    assert jacobian(at_a_fixed_value, params).abs().max() > 0.01


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_of_a_mixture_agree_with_quadrature(dim: int) -> None:
    import numpy as np

    def f(z: Tensor) -> Tensor:
        return torch.sin(z.sum(-1)) + z[..., 0] * z[..., -1]

    params = torch.randn(3 + 8 * dim, requires_grad=True)
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(40))
    grid = torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim)
    weight = torch.cartesian_prod(*[weights] * dim).reshape(-1, dim).prod(-1)
    q = mixture_of(params)
    normal: Any = q.component_distribution.base_dist
    at = normal.loc.unsqueeze(-2) + normal.scale.unsqueeze(-2) * grid
    inner = (f(at) * weight).sum(-1) / weight.sum()
    expected = (q.mixture_distribution.probs * inner).sum()
    (truth,) = torch.autograd.grad(expected, params)
    many = params.detach().expand(40_000, -1).clone().requires_grad_()
    (each,) = torch.autograd.grad(f(mixture_of(many).rsample()).sum(), many)
    error = each.std(0) / math.sqrt(len(each))
    assert ((each.mean(0) - truth).abs() < 5 * error).all()
    assert (error < 0.1 * truth.abs().max()).all()


def test_one_component_is_a_normal() -> None:
    params = torch.randn(5, 1 + 4 * DIM, requires_grad=True)
    z = mixture_of(params, components=1).rsample((3,))
    shared, _, own = params.split([2 * DIM, 1, 2 * DIM], dim=-1)
    normal = guides.Normal(IMAGE, DIM, NET).distribution(shared + own / DIM**0.5)
    noise = ((z - normal.mean) / normal.stddev).detach()
    same = normal.mean + normal.stddev * noise
    torch.testing.assert_close(z, same)
    weight = torch.randn_like(z)
    (left,) = torch.autograd.grad((z * weight).sum(), params)
    (right,) = torch.autograd.grad((same * weight).sum(), params)
    torch.testing.assert_close(left, right)


def test_mixtures_stay_finite_with_many_latents() -> None:
    """Fifty latents and components tens of nats apart, where products of densities underflow."""
    size = torch.cat([torch.full((104,), 3.0), torch.full((400,), 20.0)])
    params = (size * torch.randn(200, 504)).float().requires_grad_()
    q = mixture_of(params, components=4)
    z = q.rsample()
    (grad,) = torch.autograd.grad(q.log_prob(z).sum() + z.square().sum(), params)
    assert z.isfinite().all()
    assert grad.isfinite().all()
    double = mixture_of(params.detach().double(), components=4).log_prob(z.detach().double())
    torch.testing.assert_close(q.log_prob(z).double(), double, rtol=1e-4, atol=1e-2)


def test_moments_of_a_mixture() -> None:
    q = mixture_of(torch.randn(2, 19))
    z = q.sample((200_000,))
    torch.testing.assert_close(q.mean, z.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(q.variance, z.var(0), rtol=0.03, atol=0)


# Normals and points -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LowRankNormal", "FullRankNormal"])
def test_kl_to_a_diagonal_normal_is_that_of_full_covariances(name: str) -> None:
    q = shaken(GUIDES[name]())(torch.randn(5, *IMAGE))
    loc, scale = torch.randn(2), 0.5 + torch.rand(2)
    p = dist.Normal(loc, scale).to_event(1)
    exact = kl_divergence(
        dist.MultivariateNormal(q.mean, covariance_matrix=q.covariance_matrix),
        dist.MultivariateNormal(loc, scale_tril=scale.diag_embed()),
    )
    torch.testing.assert_close(kl_divergence(q, p), exact)
    for other in (dist.Laplace(loc, scale).to_event(1), dist.Normal(loc, scale)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, other)


@pytest.mark.parametrize("name", ["LowRankNormal", "FullRankNormal"])
def test_covariances_are_those_of_the_draws(name: str) -> None:
    q = shaken(GUIDES[name]())(torch.randn(*IMAGE))
    z = q.sample((100_000,))
    torch.testing.assert_close(torch.cov(z.T), q.covariance_matrix, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("kind", [guides.LowRankNormal, guides.FullRankNormal])
def test_normals_without_covariances_are_diagonal(kind: Any) -> None:
    params = torch.randn(5, 2 * DIM)
    diagonal = guides.Normal(IMAGE, DIM, NET).distribution(params)
    entries = params[..., DIM:].diag_embed()
    row, column = torch.tril_indices(DIM, DIM)
    loc = params[..., :DIM]
    given = {
        guides.LowRankNormal: torch.cat([params, torch.zeros(5, 2 * DIM)], -1),
        guides.FullRankNormal: torch.cat([loc, entries[..., row, column]], -1),
    }[kind]
    options = {"rank": 2} if kind is guides.LowRankNormal else {}
    q = kind(IMAGE, DIM, NET, **options).distribution(given)
    torch.testing.assert_close(q.mean, diagonal.mean)
    torch.testing.assert_close(q.covariance_matrix, diagonal.variance.diag_embed())


def test_what_couples_latents_is_divided_by_its_size() -> None:
    params = torch.randn(5, 4 * DIM)
    raw, first, second = params[:, DIM:].chunk(3, dim=-1)
    low: Any = guides.LowRankNormal(IMAGE, DIM, NET, rank=2).distribution(params)
    coupling = sum(w.unsqueeze(-1) * w.unsqueeze(-2) for w in (first, second)) / (2 * DIM)
    expected = positive(raw).square().diag_embed() + coupling
    torch.testing.assert_close(low.covariance_matrix, expected)
    entries = torch.randn(5, DIM * (DIM + 1) // 2)
    given = torch.cat([params[:, :DIM], entries], dim=-1)
    full: Any = guides.FullRankNormal(IMAGE, DIM, NET).distribution(given)
    rows = entries.split(list(range(1, DIM + 1)), dim=-1)
    for i, row in enumerate(rows):
        torch.testing.assert_close(DIM * full.scale_tril[:, i, :i], row[:, :i])
        torch.testing.assert_close(full.scale_tril[:, i, i], positive(row[:, i]))


def test_delta_is_a_point_whose_log_density_counts_as_zero() -> None:
    guide = guides.Delta(IMAGE, DIM, NET)
    x = torch.randn(5, *IMAGE)
    q = guide(x)
    z = q.rsample((3,))
    torch.testing.assert_close(z, guide.net(x).expand(3, 5, DIM))
    assert torch.equal(q.log_prob(z), torch.zeros(3, 5))
    assert torch.equal(q.mean, guide.net(x))


# All of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.slow
def test_traced_gradients_are_those_of_eager_runs(name: str) -> None:
    guide, x = shaken(GUIDES[name]()), torch.randn(5, *IMAGE)

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q = guide(x)
        z = q.rsample((2,))
        mean = q.mean if name in ("Planar", "NormalMixture") else torch.zeros(())
        return (q.log_prob(z) + z.square().sum(-1)).sum() + mean.sin().sum(), {}

    step = compiled.with_gradients(loss, list(guide.parameters()))
    with pyro.validation_enabled(False):  # checks ask tensors for their values
        graph = torch.no_grad()(make_fx(step)(x))
    other = torch.randn(5, *IMAGE)
    torch.manual_seed(0)
    expected = step(other)
    torch.manual_seed(0)
    found = graph(other)
    for left, right in zip((expected[0], *expected[1]), (found[0], *found[1]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GUIDES)
def test_a_blank_datum_has_finite_gradients(name: str) -> None:
    """A network without biases puts out zeros for it."""
    guide = GUIDES[name]()
    params = torch.zeros(3, *guide.param_shape(), requires_grad=True)
    q: Any = guide.distribution(params)
    z = q.rsample()
    (q.log_prob(z).sum() + z.square().sum()).backward()
    assert z.isfinite().all()
    assert params.grad is not None
    assert params.grad.isfinite().all()


@pytest.mark.parametrize("name", SPREAD)
def test_copies_share_nothing(name: str) -> None:
    guide, x = GUIDES[name](), torch.randn(3, *IMAGE)
    guide(x).rsample()
    again = shaken(copy.deepcopy(guide))
    assert not torch.equal(guide(x).mean, again(x).mean)


def never(*shapes: Any) -> Any:
    """A network that must not be built."""
    raise AssertionError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guides.LowRankNormal(IMAGE, 2, never, 3), r"rank must be at most 2 .*, got 3"),
        (lambda: guides.LowRankNormal(IMAGE, 2, rank=0), "rank must be positive integers, got 0"),
        (lambda: guides.NormalMixture(IMAGE, 2, num_components=0), "num_components must be"),
        (lambda: guides.Planar(IMAGE, 2, transforms=0), "transforms must be positive"),
        (lambda: guides.IAF(IMAGE, 2, transforms=0), "transforms must be positive"),
        (lambda: guides.IAF(IMAGE, 2, transforms=2.5), "transforms must be positive .*, got 2.5"),
        (lambda: guides.IAF(IMAGE, 2, context_dim=0), "context_dim must be positive"),
        (lambda: guides.IAF(IMAGE, 2, hidden=(0,)), "hidden must be positive"),
        (lambda: guides.NeuralSpline(IMAGE, 2, bins=1), "bins must be at least 2, got 1"),
        (lambda: guides.NeuralSplineCoupling(IMAGE, 2, transforms=-1), "transforms must be"),
        (
            lambda: guides.OrthogonalSylvester(IMAGE, 2, never, num_ortho=3),
            "num_ortho must be at most 2",
        ),
        (lambda: guides.HouseholderSylvester(IMAGE, 2, num_reflections=0), "num_reflections must"),
    ],
)
def test_impossible_sizes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
