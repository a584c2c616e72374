"""Several layers of latents: densities against quadrature, both orders, all that a VAE can do."""

import copy
import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae
from pyrovae import VAE, HierarchicalVAE, LadderVAE, cli, guides, likelihoods, nets, priors, program
from pyrovae.compiled import with_gradients
from pyrovae.hierarchical import _product
from pyrovae.objectives import ELBO

NET = nets.MLP((6,), activation="tanh")
KINDS = [HierarchicalVAE, LadderVAE]
EITHER = pytest.mark.parametrize("kind", KINDS)


def make(
    kind: type[HierarchicalVAE],
    dims: tuple[int, ...] = (4, 3, 2),
    shape: tuple[int, ...] = (2, 3),
    net: nets.Net = NET,
    prior: Any = None,
    missing: bool = False,
    shake: float = 0.0,
) -> HierarchicalVAE:
    layers = [guides.Normal(shape, dims[0], net)]
    for dim in dims[1:]:
        layers.append(guides.Normal(kind.shape_above(layers[-1]), dim, net))
    conditionals = [guides.Normal((above,), dim, net) for dim, above in pairwise(dims)]
    top = prior(layers[-1].shape, dims[-1]) if prior else priors.StandardNormal(dims[-1])
    likelihood = likelihoods.Bernoulli(shape, dims[0], net)
    vae = kind(top, conditionals, likelihood, layers, missing)
    with torch.no_grad():
        for param in vae.parameters():
            param.add_(shake * torch.randn_like(param))
    return vae


def data(num: int = 5, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    return (torch.rand(num, *shape) < 0.5).to(torch.get_default_dtype())


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# A truth ------------------------------------------------------------------------------------------


class Plane:
    """Two layers of one latent each, on a grid: log densities of shape (z1, z2, data).

    Posteriors are written down here a second time, by precisions.
    """

    def __init__(self, vae: HierarchicalVAE, x: Tensor, size: int = 301, limit: float = 14.0):
        axis = torch.linspace(-limit, limit, size)
        z, points = axis[:, None], axis[:, None, None]
        self.area = (axis[1] - axis[0]).square()
        p1 = vae.conditionals[0](z)
        px = vae.likelihood(z).base_dist.log_prob(x.nan_to_num()[:, None])
        log_px = torch.where(x.isnan()[:, None], 0.0, px).flatten(2).sum(-1).T
        log_pz = p1.log_prob(points) + vae.prior().log_prob(z)
        self.log_joint = log_pz[..., None] + log_px[:, None]
        q1, q2 = vae.encoders
        first = q1(x.nan_to_num())
        if isinstance(vae, LadderVAE):
            log_q2 = q2(q1.net(x.nan_to_num())).log_prob(points)
            precision = first.variance[:, 0].reciprocal() + p1.variance.reciprocal()
            weighted = (first.mean / first.variance)[:, 0] + p1.mean / p1.variance
            self.log_q = log_q2 + dist.Normal(weighted / precision, precision**-0.5).log_prob(
                points
            )
        else:
            log_q2 = q2(z).log_prob(points).T
            self.log_q = log_q2[..., None] + first.log_prob(points)[:, None]

    def log_px(self) -> Tensor:
        return self.log_joint.flatten(0, 1).logsumexp(0) + self.area.log()

    def elbo(self) -> Tensor:
        return self.area * (self.log_q.exp() * (self.log_joint - self.log_q)).sum((0, 1))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("missing", [False, True])
@EITHER
def test_bounds_are_those_of_quadrature(kind: Any, missing: bool) -> None:
    vae, x = make(kind, (1, 1), missing=missing, shake=0.2), data()
    for encoder in vae.encoders:  # wide guides, whose weights have a variance
        encoder.net.bias.data[1] += 1.0
    if missing:
        x[0, 1, 2], x[1] = torch.nan, torch.nan
    plane = Plane(vae, x)
    torch.testing.assert_close(plane.log_q.exp().sum((0, 1)) * plane.area, torch.ones(5))
    log_w = program.log_weights(vae.model, vae.guide, (x,), 20_000).detach()
    error = log_w.std(0) / math.sqrt(len(log_w))
    assert ((log_w.mean(0) - plane.elbo()) / error).abs().max() < 4.5
    found = pyrovae.log_px(vae.model, vae.guide, x, 20_000, seed=0, progress=False)
    gap = found.values - plane.log_px()
    assert (gap.abs() < 4.5 * found.std_error + 1e-5).all()
    assert found.std_error.max() < 0.1
    assert (plane.elbo() < found.values).all()
    if missing:
        torch.testing.assert_close(plane.log_px()[1], torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("analytic", [False, True])
@EITHER
def test_gradients_are_those_of_quadrature(kind: Any, analytic: bool) -> None:
    vae, x = make(kind, (1, 1), shake=0.5), data(3)
    params, objective = list(vae.parameters()), ELBO(1000, analytic_kl=analytic)
    exact = -Plane(vae, x).elbo().sum()
    true = torch.cat(
        [exact.detach()[None], *map(torch.flatten, torch.autograd.grad(exact, params))]
    )
    found = []
    for _ in range(60):
        loss = objective.surrogate(vae.model, vae.guide, (x,))[0]
        grads = torch.autograd.grad(loss, params)
        found.append(torch.cat([loss.detach()[None], *map(torch.flatten, grads)]))
    values = torch.stack(found)
    error = values.std(0) / math.sqrt(len(values)) + 1e-9
    assert ((values.mean(0) - true) / error).abs().max() < 5


@EITHER
def test_the_kl_is_taken_in_closed_form_where_latents_come_in_the_order_of_the_model(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    vae = make(kind)
    with caplog.at_level(logging.WARNING):
        ELBO(analytic_kl=True).surrogate(vae.model, vae.guide, (data(),))
    said = [record for record in caplog.records if "another order" in record.getMessage()]
    assert len(said) == (0 if kind is LadderVAE else 3)


def test_a_product_of_normals_has_the_product_of_their_densities() -> None:
    a = dist.Normal(torch.tensor([0.5, -2.0]), torch.tensor([0.3, 2.0])).to_event(1)
    b = dist.Normal(torch.tensor([[1.5, 1.0]]), torch.tensor([[4.0, 0.1]])).to_event(1)
    z = torch.randn(50, 1, 2)
    ratio = _product(a, b).log_prob(z) - a.log_prob(z) - b.log_prob(z)
    torch.testing.assert_close(ratio, ratio[:1].expand(50, 1), rtol=1e-4, atol=1e-4)


@EITHER
def test_one_layer_is_a_plain_vae(kind: Any) -> None:
    layered, x = make(kind, (2,)), data()
    plain = VAE(layered.prior, layered.likelihood, layered.encoders[0])
    bounds = [pyrovae.elbo(vae.model, vae.guide, x, 10, seed=1) for vae in (layered, plain)]
    assert torch.equal(*bounds)
    assert torch.equal(layered.encode(x), plain.encode(x))


# As a VAE -----------------------------------------------------------------------------------------


@EITHER
def test_sites_and_their_order(kind: Any) -> None:
    vae, x = make(kind, missing=True), data()
    sites = {}
    for name, fn in (("model", vae.model), ("guide", vae.guide)):
        nodes = poutine.trace(fn).get_trace(x).nodes
        sites[name] = {n: tuple(nodes[n]["value"].shape) for n in nodes if n[0] in "xz"}
    up = {"z1": (5, 4), "z2": (5, 3), "z3": (5, 2)}
    down = dict(reversed(up.items()))
    assert list(sites["model"].items()) == [*down.items(), ("x", (5, 2, 3))]
    assert list(sites["guide"].items()) == list((down if kind is LadderVAE else up).items())
    assert vae.latent_dims == (4, 3, 2)


@pytest.mark.parametrize("lead", [(), (5,), (3, 5)])
@EITHER
def test_shapes(kind: Any, lead: tuple[int, ...]) -> None:
    vae = make(kind)
    q = vae.posterior(data(15).reshape(-1, 2, 3)[: math.prod(lead)].reshape(*lead, 2, 3))
    assert (q.batch_shape, q.event_shape) == (lead, (4,))
    assert vae.decode(torch.randn(*lead, 4)).shape == (*lead, 2, 3)
    assert vae.sample(7).shape == vae.sample(7, mean=True).shape == (7, 2, 3)
    assert vae.sample_latent(7).shape == (7, 4)
    assert vae.reconstruct(data()).shape == (5, 2, 3)
    assert vae.interpolate(data(), data(), 3).shape == (3, 5, 2, 3)


@EITHER
def test_codes_are_means_along_the_means_of_the_layers_above(kind: Any) -> None:
    vae, x = make(kind, shake=0.3), data()
    q1, q2, q3 = vae.encoders
    expected = q1(x).mean
    if kind is LadderVAE:
        p1, p2 = vae.conditionals
        z2 = _product(q2(q1.net(x)), p2(q3(q2.net(q1.net(x))).mean)).mean
        expected = _product(q1(x), p1(z2)).mean
    torch.testing.assert_close(vae.encode(x), expected.detach())


def test_samples_come_from_the_top() -> None:
    """The moments of z1 in the model's own trace."""
    vae = make(HierarchicalVAE, shake=1.0)
    with torch.no_grad():
        z = poutine.trace(vae.model).get_trace(data(20_000)).nodes["z1"]["value"]
    drawn = vae.sample_latent(20_000)
    error = (z.var(0) / 20_000 * 2).sqrt()
    assert ((z.mean(0) - drawn.mean(0)) / error).abs().max() < 4
    torch.testing.assert_close(drawn.std(0), z.std(0), rtol=0.05, atol=0)
    assert z.std() > 1.1


@pytest.mark.parametrize("analytic", [False, True])
@EITHER
def test_a_step_moves_every_parameter(kind: Any, analytic: bool) -> None:
    vae, x = make(kind, shake=0.1), data()
    before = copy.deepcopy(dict(vae.named_parameters()))
    adam = pyro.optim.Adam({"lr": 0.01})
    pyro.infer.SVI(vae.model, vae.guide, adam, ELBO(analytic_kl=analytic)).step(x)
    assert all((param != before[name]).any() for name, param in vae.named_parameters())


@EITHER
@pytest.mark.slow
def test_a_traced_step_has_the_gradients_of_an_eager_one(kind: Any) -> None:
    vae, x = make(kind, shake=0.1), data()
    loss = lambda x: ELBO(analytic_kl=True).surrogate(vae.model, vae.guide, (x,))  # noqa: E731
    step = with_gradients(loss, list(vae.parameters()))
    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        torch.manual_seed(2)
        eager = step(data())
        torch.manual_seed(2)
        torch.testing.assert_close(graph(data()), eager)


@EITHER
def test_two_models_in_one_store_both_learn(kind: Any) -> None:
    x, first = data(), make(kind)
    for vae in (first, make(kind), copy.deepcopy(first)):
        before = copy.deepcopy(dict(vae.named_parameters()))
        pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ELBO()).step(x)
        assert all((param != before[name]).any() for name, param in vae.named_parameters())


@EITHER
def test_training_improves_the_bound(kind: Any) -> None:
    vae, x = make(kind), data(1)
    x = torch.where(torch.rand(200, 1, 1) < 0.5, x, 1 - x)
    history = pyrovae.fit(vae, x, epochs=30, batch_size=50, lr=0.02, progress=False, compile=False)
    assert history[-1]["elbo"] > -2.5 > history[0]["elbo"]


@EITHER
def test_copied_and_saved(kind: Any, tmp_path: Path) -> None:
    vae, x = make(kind, shake=0.3), data()
    pyrovae.save(vae, tmp_path)
    values = [
        pyrovae.log_px(one.model, one.guide, x, 20, seed=0, progress=False).values
        for one in (vae, copy.deepcopy(vae), pyrovae.load(tmp_path))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert isinstance(pyrovae.load(tmp_path), kind)
    vae.encoders[0] = guides.Normal((2, 3), 4, NET)
    pyrovae.save(vae, tmp_path / "changed")
    with pytest.raises(ValueError, match="not made of pyrovae parts"):
        pyrovae.load(tmp_path / "changed")


class OfTheGuide(priors.Prior):
    """A prior that is the top guide's posterior at one learned place."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int):
        super().__init__(latent_dim)
        self.shape = tuple(shape)
        self.place = nn.Parameter(torch.zeros(self.shape))
        self.linked: tuple[Any, ...] = ()

    def connect(self, guide: nn.Module) -> None:
        self.linked = (guide,)

    def initialize(self, x: Tensor) -> None:
        with torch.no_grad():
            self.place.copy_(x.mean(0))

    def forward(self) -> Any:
        return self.linked[0](self.place)


@EITHER
def test_a_prior_made_of_the_guide_is_made_of_the_top_layer_s(kind: Any) -> None:
    vae, x = make(kind, prior=OfTheGuide), data(20)
    assert vae.prior.linked[0] is vae.encoders[-1]
    vae.initialize(x)
    q1, q2, _ = vae.encoders
    read = q2.net(q1.net(x)) if kind is LadderVAE else q2(q1(x).mean).mean
    torch.testing.assert_close(vae.prior.place, read.mean(0))
    assert pyrovae.log_px(vae.model, vae.guide, x, 5, progress=False).values.isfinite().all()


def normal(*shape_and_dim: int) -> guides.Normal:
    *shape, dim = shape_and_dim
    return guides.Normal(tuple(shape), dim, NET)


class Drawn(guides.Normal):
    scorable = False


class Another(guides.Normal):
    is_diagonal_normal = False


@pytest.mark.parametrize(
    ("kind", "conditionals", "layers", "message"),
    [
        (HierarchicalVAE, [], [normal(6, 4), normal(4, 2)], "one distribution less than guides"),
        (HierarchicalVAE, [], [], "one distribution less than guides, which has 0 layers"),
        (HierarchicalVAE, normal(2, 4), [normal(6, 4)], "conditionals must be a list"),
        (HierarchicalVAE, [nn.Linear(2, 4)], [normal(6, 4), normal(4, 2)], "a list of modules"),
        (HierarchicalVAE, [normal(2, 4)], [normal(5, 4), normal(4, 2)], r"likelihood has shape"),
        (HierarchicalVAE, [normal(2, 3)], [normal(6, 3), normal(3, 2)], "likelihood has latent_d"),
        (HierarchicalVAE, [normal(3, 4)], [normal(6, 4), normal(4, 3)], "prior has latent_dim 2"),
        (HierarchicalVAE, [normal(2, 4)], [normal(6, 4), normal(8, 2)], r"guides\[1\] has shape"),
        (
            HierarchicalVAE,
            [normal(3, 4)],
            [normal(6, 4), normal(4, 2)],
            r"conditionals\[0\] has sh",
        ),
        (
            HierarchicalVAE,
            [normal(2, 3)],
            [normal(6, 4), normal(4, 2)],
            r"conditionals\[0\] has la",
        ),
        (HierarchicalVAE, [Drawn((2,), 4)], [normal(6, 4), normal(4, 2)], "only its own draws"),
        (LadderVAE, [normal(2, 4)], [normal(6, 4), normal(4, 2)], r"shape \(4,\).* need \(8,\)"),
        (LadderVAE, [Another((2,), 4)], [normal(6, 4), normal(8, 2)], r"conditionals\[0\] \(Anoth"),
        (LadderVAE, [normal(2, 4)], [Another((6,), 4), normal(8, 2)], "is no diagonal normal"),
    ],
)
def test_refused(kind: Any, conditionals: Any, layers: Any, message: str) -> None:
    likelihood = likelihoods.Bernoulli((6,), 4, NET)
    with pytest.raises((ValueError, TypeError), match=message):
        kind(priors.StandardNormal(2), conditionals, likelihood, layers)


def test_the_top_guide_of_a_ladder_may_be_any() -> None:
    likelihood = likelihoods.Bernoulli((6,), 4, NET)
    layers = [normal(6, 4), Drawn((8,), 2)]
    LadderVAE(priors.StandardNormal(2), [normal(2, 4)], likelihood, layers)


# The command --------------------------------------------------------------------------------------


FAST = ("train", "--epochs", "1", "--num-particles", "3", "--net.hidden", "5", "--out", "run")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("images.npz", x=rng.integers(0, 256, (40, 6, 7)).astype(np.uint8))
    np.save("table.npy", rng.normal(size=(40, 4)).astype(np.float32))
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_run_with_layers(capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "images.npz")
    assert cli.main([*FAST, *data, "--latent-dim", "4,2", "--inference", "top-down"]) == 0
    assert "LadderVAE with 4 + 2 latents" in " ".join(capsys.readouterr().out.split())
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"]["latent_dim"] == [4, 2]
    assert config["model"]["class_path"] == "pyrovae.LadderVAE"
    assert {p.stem for p in Path("run/figures").glob("*.png")} >= {"latent_space", "samples"}
    assert not Path("run/figures/manifold.png").exists()
    for command in ("encode", "sample", "log-px"):
        assert cli.main([command, "run"]) == 0
    assert np.load("run/codes.npz")["scale"].shape[1] == 4
    assert np.load("run/samples.npz")["x"].shape == (64, 1, 6, 7)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "kind", "dims"),
    [
        ("--latent-dim [4,3,2]", HierarchicalVAE, (4, 3, 2)),
        ("--latent-dim=3,2 --net Conv --inference=bottom-up", HierarchicalVAE, (3, 2)),
        ("--latent-dim 3,2 --guide Normal --guide.net Conv", HierarchicalVAE, (3, 2)),
        ("--latent-dim [3]", VAE, (3,)),
    ],
)
@pytest.mark.usefixtures("folder")
def test_layers_by_flags(
    words: str, kind: Any, dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrovae.plotting.figures", lambda *_: {})
    flags = [word for word in FAST if "Conv" not in words or word not in ("--net.hidden", "5")]
    assert cli.main([*flags, "--data", "images.npz", *words.split()]) == 0
    vae = pyrovae.load("run")
    assert type(vae) is kind
    assert vae.latent_dims == dims


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--latent-dim 3,0", "--latent-dim must be at least 1, got 3,0"),
        ("--latent-dim 3,x", "--latent-dim must be a whole number or numbers like 50,20, got"),
        ("--latent-dim []", "--latent-dim must be at least 1, got nothing"),
        ("--latent-dim 3 --inference top-down", "--inference is for several layers"),
        ("--latent-dim 3,2 --inference up", "--inference must be bottom-up or top-down, got 'up'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_refused_by_the_command(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*FAST, "--data", "table.npy", *words.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
