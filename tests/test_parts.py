"""Priors, likelihoods and guides: one table, and every property on every entry."""

import json
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from table import (
    GUIDES,
    IMAGE,
    INDEPENDENT,
    LATENTS,
    LIKELIHOODS,
    NET,
    OBJECTIVES,
    PRIORS,
    TABLE,
)
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae import _flows, _sequences, guides, likelihoods, nets, objectives, priors
from pyrovae._config import from_config, parameters, to_config
from pyrovae._distributions import ContinuousBernoulli
from pyrovae._flows import Flowed
from pyrovae._part import Conditional
from pyrovae._sequences import Sequences

LEVELS = (torch.linspace(0, 1, 5), torch.ones(5))  # as the table has it, 0 to 4
FAR = torch.linspace(-18, 18, 40001, dtype=torch.float64).sinh()
GRIDS = {  # for each likelihood over one entry: points, weights
    "Bernoulli": (torch.tensor([0.0, 1.0]), torch.ones(2)),
    "Beta": (torch.linspace(-60, 36, 40001, dtype=torch.float64).sigmoid(), None),
    "Binomial": LEVELS,
    "Categorical": LEVELS,
    "ContinuousBernoulli": (torch.linspace(0, 1, 4001), None),
    "DiscretizedLogistic": LEVELS,
    "DiscretizedLogisticMixture": LEVELS,
    "Laplace": (FAR, None),
    "NegativeBinomial": (torch.arange(2000.0), torch.ones(2000)),
    "Normal": (torch.linspace(-40, 40, 20001), None),
    "Poisson": (torch.arange(200.0), torch.ones(200)),
    "StudentT": (FAR, None),
    "ZeroInflatedNegativeBinomial": (torch.arange(2000.0), torch.ones(2000)),
}


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def condition(part: nn.Module, lead: tuple[int, ...]) -> Tensor:
    shape = IMAGE if isinstance(part, guides.Guide) else (LATENTS,)
    return torch.randn(*lead, *shape)


def p(part: nn.Module, lead: tuple[int, ...] = (5,)) -> dist.TorchDistribution:
    return part() if isinstance(part, priors.Prior) else part(condition(part, lead))


def score(px: dist.TorchDistribution, x: Tensor) -> Tensor:
    """Without gradients, as a guide that is not scorable can do too for a draw of its own."""
    with torch.no_grad():
        return px.log_prob(x)


def shaken(part: nn.Module) -> nn.Module:
    """The part with other weights than it was born with."""
    with torch.no_grad():
        for param in part.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return part


def connected(*parts: nn.Module) -> None:
    """Priors get one guide, in their own precision, as `VAE` would give them."""
    guide = guides.Normal(IMAGE, LATENTS, NET)
    for part in parts:
        if isinstance(part, priors.Prior):
            part.connect(guide.to(next(part.parameters(), torch.zeros(())).dtype))


@pytest.mark.parametrize(
    ("module", "base", "table"),
    [
        (priors, priors.Prior, PRIORS),
        (likelihoods, likelihoods.Likelihood, LIKELIHOODS),
        (guides, guides.Guide, GUIDES),
        (objectives, objectives.Objective, OBJECTIVES),
    ],
    ids=["priors", "likelihoods", "guides", "objectives"],
)
def test_every_public_part_is_in_the_table(module: Any, base: type, table: dict[str, Any]) -> None:
    named = {name: getattr(module, name) for name in module.__all__}
    public = {name for name, part in named.items() if isinstance(part, type) and part is not base}
    defined = {
        part.__name__
        for part in vars(module).values()
        if isinstance(part, type) and issubclass(part, base) and part is not base
    }
    assert public == {name.split(",")[0] for name in table}
    assert public == {name for name in defined if not name.startswith("_")}
    assert all(make().__class__.__name__ == name.split(",")[0] for name, make in table.items())


@pytest.mark.parametrize("lead", [(), (5,), (3, 5)])
@pytest.mark.parametrize("name", TABLE)
def test_shapes(name: str, lead: tuple[int, ...]) -> None:
    part = TABLE[name]()
    lead = () if isinstance(part, priors.Prior) else lead
    event = IMAGE if isinstance(part, likelihoods.Likelihood) else (LATENTS,)
    px = p(part, lead)
    assert (px.batch_shape, px.event_shape) == (lead, event)
    assert px.sample((2,)).shape == (2, *lead, *event)
    assert score(px, px.sample()).shape == lead
    assert px.mean.shape == (*lead, *event)


@pytest.mark.parametrize("name", TABLE)
def test_draws_lie_in_the_support_and_have_finite_densities(name: str) -> None:
    part = shaken(TABLE[name]())
    px = p(part)
    x = px.sample((50,))
    assert px.support.check(x).all()
    assert score(px, x).isfinite().all()
    if isinstance(part, likelihoods.Likelihood):
        assert part.support.check(x).all()


BEHIND: dict[type, float] = {Flowed: _flows.NUM_FIXED, Sequences: _sequences.NUM_FIXED}
"""Draws behind a mean, for distributions that have no better one."""


@pytest.mark.parametrize("name", TABLE)
def test_the_mean_is_that_of_the_draws(name: str) -> None:
    px = p(shaken(TABLE[name]()), (2,))
    x = px.sample((20_000,))
    behind = BEHIND.get(type(px), math.inf)
    standard_error = x.std(0) * math.sqrt(1 / len(x) + 1 / behind) + 1e-12
    assert ((x.mean(0) - px.mean) / standard_error).abs().max() < 5


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_likelihood_sums_to_one(name: str) -> None:
    """Entry by entry, all but one where they are; test_likelihoods.py has those that depend."""
    part: Any = shaken(LIKELIHOODS[name]()).eval()
    base = part(torch.randn(4, LATENTS)).base_dist
    x, weight = GRIDS[name.split(",")[0]]
    density = base.log_prob(x[:, None, None, None, None].expand(-1, *base.batch_shape)).exp()
    total = density.sum(0) if weight is not None else torch.trapezoid(density, x, dim=0)
    # Float64 has no numbers nearer to 1 than 1e-16, where a Beta can have a thousandth of its mass.
    rtol = 1e-2 if name == "Beta" else 1e-5
    torch.testing.assert_close(total, torch.ones_like(total), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in TABLE if n[:5] in ("prior", "guide")])
def test_a_density_of_latents_integrates_to_one(name: str) -> None:
    part = shaken(TABLE[name]())
    if not getattr(part, "scorable", True):
        pytest.skip("test_guides.py has the truth for guides that score only their own draws")
    pz = p(part, ())
    grid = torch.linspace(-9, 9, 251)
    standard = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    density = score(pz, pz.mean + pz.stddev * standard).exp() * pz.stddev.prod()
    total = torch.trapezoid(torch.trapezoid(density, grid), grid)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_reach_every_parameter(name: str) -> None:
    part = shaken(TABLE[name]())
    px = p(part)
    if getattr(part, "scorable", True):
        log_prob = px.log_prob(px.sample()).sum()
    else:
        z = px.rsample()
        log_prob = px.log_prob(z).sum() + z.pow(3).sum()
    assert log_prob.requires_grad == any(True for _ in part.parameters())
    if log_prob.requires_grad:
        log_prob.backward()
    for label, param in part.named_parameters():
        assert param.grad is not None, label
        assert param.grad.isfinite().all(), label
        assert param.grad.any(), label
        assert param.grad.all() or label != "net.bias", "an output of the network is not used"


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_can_be_differentiated_through(name: str) -> None:
    part = shaken(GUIDES[name]())
    p(part).rsample().square().sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in part.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_state_and_configuration_make_the_same_part(name: str) -> None:
    part = shaken(TABLE[name]())
    again = from_config(json.loads(json.dumps(to_config(part))))
    assert type(again) is type(part)
    again.load_state_dict(part.state_dict())
    connected(part, again)
    c = () if isinstance(part, priors.Prior) else (condition(part, (5,)),)
    scores = []
    for px in (part(*c), again(*c)):
        torch.manual_seed(0)
        scores.append(score(px, px.sample()))
    assert torch.equal(*scores)
    assert to_config(again) == to_config(part)


@pytest.mark.parametrize("name", TABLE)
def test_parts_work_in_float32_and_without_a_batch(name: str) -> None:
    part = TABLE[name]().float()
    connected(part)
    for lead in ((), (5,)):
        given = () if isinstance(part, priors.Prior) else (condition(part, lead).float(),)
        px = part(*given)
        assert px.sample().dtype == torch.float32
        assert score(px, px.sample()).dtype == torch.float32


@pytest.mark.parametrize("name", TABLE)
def test_other_numbers_of_latents_and_shapes_are_refused(name: str) -> None:
    kind: Any = type(TABLE[name]())
    if issubclass(kind, priors.Prior):
        given = {"shape": IMAGE} if "shape" in parameters(kind) else {}
        with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
            kind(**given, latent_dim=0)
        return
    with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
        kind(IMAGE, 0)
    with pytest.raises(ValueError, match="shape must be positive integers"):
        kind((1, 0, 4), LATENTS)
    with pytest.raises(ValueError, match="shape is that of one datum"):
        kind((), LATENTS)
    with pytest.raises(ValueError, match=r"the network takes tensors of shape \(\.\.\., "):
        TABLE[name]()(torch.zeros(5, 7))


# Starting at the data -----------------------------------------------------------------------------

DATA: dict[str, Callable[[], Tensor]] = {
    "binary": lambda: (torch.rand(4000, *IMAGE) < 0.1 + 0.8 * torch.rand(IMAGE)).double(),
    "counts": lambda: torch.poisson((1 + 5 * torch.rand(IMAGE)).expand(4000, *IMAGE)),
    "grey": lambda: torch.rand(4000, *IMAGE) ** (3 * torch.rand(IMAGE)),
    "levels": lambda: (torch.rand(4000, *IMAGE) ** (3 * torch.rand(IMAGE)) * 4).round() / 4,
    "real": lambda: 3 + torch.randn(4000, *IMAGE) * torch.arange(1.0, 13).view(IMAGE),
}
TOLERANCE = {"Categorical": 1e-3, "ContinuousBernoulli": 0.04}
"""How far the mean may start from the data's: for two of them it is met approximately."""


def data_for(part: Any) -> Tensor:
    return DATA[part.kind]()


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("missing", [False, True])
def test_initialize_starts_the_mean_at_the_data(name: str, missing: bool) -> None:
    part: Any = LIKELIHOODS[name]()
    x = data_for(part)
    if missing:
        x = x.masked_fill(torch.rand_like(x) < 0.3, math.nan)
    part.initialize(x)
    at_zero = part(torch.zeros(LATENTS)).mean
    tolerance = TOLERANCE.get(name, 1e-6)
    torch.testing.assert_close(at_zero, x.nanmean(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_initialize_leaves_trained_networks_alone(name: str) -> None:
    part = shaken(LIKELIHOODS[name]())
    before = {key: value.clone() for key, value in part.state_dict().items()}
    part.initialize(data_for(part))
    assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_initialize_takes_an_entry_that_is_never_seen(name: str) -> None:
    part: Any = LIKELIHOODS[name]()
    x = data_for(part)
    x[:, 0, 0, 0] = math.nan
    part.initialize(x)
    assert all(value.isfinite().all() for value in part.state_dict().values())


@pytest.mark.parametrize("name", ["Laplace", "Normal, per-pixel", "Normal, amortized", "StudentT"])
def test_an_entry_that_is_never_seen_starts_at_unit_variance(name: str) -> None:
    part: Any = LIKELIHOODS[name]()
    x = 0.5 + 0.1 * torch.randn(4000, *IMAGE)
    x[:, 0, 0, 0] = math.nan
    part.initialize(x)
    spread = part(torch.zeros(LATENTS)).base_dist.stddev.flatten()
    torch.testing.assert_close(spread[0], torch.tensor(1.0))
    assert spread[1:].max() < 0.2


# Single parts -------------------------------------------------------------------------------------


def test_normal_starts_its_noise_at_the_spread_of_the_data() -> None:
    x = DATA["real"]()
    per_pixel = likelihoods.Normal(IMAGE, LATENTS, NET, scale="per-pixel")
    per_pixel.initialize(x)
    torch.testing.assert_close(per_pixel.scale, x.std(0, correction=0), rtol=1e-3, atol=1e-3)
    learned = likelihoods.Normal(IMAGE, LATENTS, NET)
    learned.initialize(x)
    expected = x.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(learned.scale, expected, rtol=1e-3, atol=1e-3)
    fixed = likelihoods.Normal(IMAGE, LATENTS, NET, scale=0.5)
    fixed.initialize(x)
    assert fixed.scale == 0.5
    assert fixed(torch.zeros(3, LATENTS)).base_dist.scale.unique() == 0.5


@pytest.mark.parametrize(("scale", "shape"), [("learned", ()), ("per-pixel", IMAGE), (0.5, None)])
def test_the_noise_of_normal_is_learned_where_it_says_so(scale: Any, shape: Any) -> None:
    part = likelihoods.Normal(IMAGE, LATENTS, NET, scale=scale)
    found = [param.shape for name, param in part.named_parameters() if "scale" in name]
    assert found == ([] if shape is None else [shape])


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "fixed", True])
def test_normal_refuses_other_noise(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        likelihoods.Normal(IMAGE, LATENTS, NET, scale=scale)


def test_every_kind_of_data_has_a_first_choice() -> None:
    from pyrovae.data.preprocess import KINDS

    assert sorted(likelihoods.DEFAULT) == sorted(KINDS)
    assert all(part.kind == kind for kind, part in likelihoods.DEFAULT.items())


def test_a_part_of_ones_own_needs_only_its_distribution() -> None:
    class Laplace(likelihoods.Likelihood):
        num_params = 2

        def distribution(self, params: Tensor) -> dist.TorchDistribution:
            loc, log_scale = self.split(params)
            return dist.Laplace(loc, log_scale.exp()).to_event(3)

    px = Laplace((3, 4, 5), LATENTS, nets.Conv(channels=(4,)))(torch.zeros(7, LATENTS))
    assert (px.batch_shape, px.event_shape) == ((7,), (3, 4, 5))
    with pytest.raises(NotImplementedError):
        Conditional((2,), (3,))(torch.zeros(2))


def test_supports_say_what_data_a_likelihood_takes() -> None:
    x = torch.tensor([0.0, 1.0, 0.5, 2.0, -1.0])
    taken = {
        name: make().support.check(x).tolist()
        for name, make in LIKELIHOODS.items()
        if "," not in name
    }
    counts, levels, grey = [1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]
    assert taken == {
        "Bernoulli": [1, 1, 0, 0, 0],
        "Beta": [0, 0, 1, 0, 0],
        "Binomial": levels,
        "Categorical": levels,
        "ContinuousBernoulli": grey,
        "DiscretizedLogistic": levels,
        "DiscretizedLogisticMixture": levels,
        "Laplace": [1] * 5,
        "NegativeBinomial": counts,
        "Normal": [1] * 5,
        "Poisson": counts,
        "RecurrentBernoulli": [1, 1, 0, 0, 0],
        "RecurrentNormal": [1] * 5,
        "StudentT": [1] * 5,
        "ZeroInflatedNegativeBinomial": counts,
    }


# The continuous Bernoulli against arithmetic with 60 digits ---------------------------------------

LOGITS = [0, 1e-8, 1e-4, -1e-3, 0.01, 0.0999, 0.1001, -0.2, 1, 5, -10, 20, -50, 100, -300, 1000]


def _exact(logit: float, x: float) -> tuple[float, float]:
    """Log density and mean."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        t = Decimal(logit)
        if abs(t) < Decimal("1e-12"):
            return 0.0, 0.5
        log_p = t * Decimal(x) + (t / (t.exp() - 1)).ln()
        return float(log_p), float(1 / (1 - (-t).exp()) - 1 / t)


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_continuous_bernoulli_is_exact(dtype: torch.dtype, tolerance: float, x: float) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    exact = torch.tensor([_exact(t, x) for t in logits.tolist()], dtype=torch.float64)
    px = ContinuousBernoulli(logits)
    log_prob = px.log_prob(torch.full_like(logits, x))
    (slope,) = torch.autograd.grad(log_prob.sum(), logits)
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(log_prob.detach().double(), exact[:, 0], **near)
    torch.testing.assert_close(px.mean.detach().double(), exact[:, 1], **near)
    torch.testing.assert_close(slope.double(), x - exact[:, 1], **near)


def test_continuous_bernoulli_draws_what_it_scores() -> None:
    px = ContinuousBernoulli(torch.tensor(LOGITS))
    x = px.sample((50_000,))
    assert px.support is constraints.unit_interval
    assert ((x.mean(0) - px.mean) / (px.variance / len(x)).sqrt()).abs().max() < 5
    torch.testing.assert_close(x.var(0), px.variance, rtol=0.05, atol=0)
    single = ContinuousBernoulli(torch.tensor(LOGITS, dtype=torch.float32)).sample((10_000,))
    assert single.min() >= 0
    assert single.max() <= 1


def test_continuous_bernoulli_expands_and_checks_its_values() -> None:
    px = ContinuousBernoulli(torch.zeros(3), validate_args=True)
    assert px.expand((2, 3)).sample().shape == (2, 3)
    assert px.expand((2, 3)).log_prob(torch.ones(3)).shape == (2, 3)
    with pytest.raises(ValueError, match="support"):
        px.log_prob(torch.tensor(1.5))
