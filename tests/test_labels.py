"""Labels given, few or summed out: bounds and gradients known exactly, and what models do."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from table import GUIDES, LIKELIHOODS
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyrovae
from pyrovae import (
    VAE,
    AuxiliaryVAE,
    Classifier,
    ConditionalVAE,
    Program,
    SemiSupervisedVAE,
    compiled,
    data,
    guides,
    likelihoods,
    loop,
    nets,
    priors,
    program,
)
from pyrovae._config import from_config, parameters, to_config
from pyrovae.objectives import ELBO, SemiSupervised

CLASSES, LATENTS, SHAPE, PIXELS = 3, 2, (1, 2, 3), 6
NET = nets.MLP((5,), activation="tanh")
SUMMED = {"enumerate": "parallel"}
LINE = torch.linspace(-9, 9, 121, dtype=torch.float64)
LOG_STEP = float((LINE[1] - LINE[0]).log())


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(module: Any, size: float = 0.3) -> Any:
    """The module with other weights than it was born with."""
    with torch.no_grad():
        for param in module.parameters():
            param.add_(size * torch.randn_like(param))
    return module


def wide(vae: Any) -> Any:
    """The model with guides wider than posteriors, whose weights have a variance."""
    with torch.no_grad():
        for role in ("encoder", "auxiliary_guide"):
            if hasattr(vae, role):
                guide = getattr(vae, role)
                guide.net.head.weight *= 0.4
                guide.net.bias[:] = torch.tensor([0.0, 1.2]).repeat_interleave(guide.latent_dim)
    return vae


def binary(count: int = 5) -> Tensor:
    return (torch.rand(count, *SHAPE) < 0.5).double()


def classes(count: int = 5) -> Tensor:
    return torch.arange(count) % CLASSES


def conditional(**given: Any) -> ConditionalVAE:
    parts: dict[str, Any] = {
        "prior": priors.StandardNormal(LATENTS),
        "likelihood": likelihoods.Bernoulli(SHAPE, LATENTS + CLASSES, NET),
        "guide": guides.Normal((PIXELS + CLASSES,), LATENTS, NET),
        "num_classes": CLASSES,
    }
    return shaken(ConditionalVAE(**parts | given))


def semi(**given: Any) -> SemiSupervisedVAE:
    parts: dict[str, Any] = {
        "prior": priors.StandardNormal(LATENTS),
        "likelihood": likelihoods.Bernoulli(SHAPE, LATENTS + CLASSES, NET),
        "guide": guides.Normal((PIXELS + CLASSES,), LATENTS, NET),
        "classifier": Classifier(SHAPE, CLASSES, NET),
    }
    return shaken(SemiSupervisedVAE(**parts | given))


def auxiliary(skip: bool = True, a: int = 1, z: int = 1, **given: Any) -> AuxiliaryVAE:
    x = PIXELS if skip else 0
    parts: dict[str, Any] = {
        "prior": priors.StandardNormal(z),
        "auxiliary_prior": likelihoods.Normal((a,), z + CLASSES, NET, scale="amortized"),
        "likelihood": likelihoods.Bernoulli(SHAPE, a + (z + CLASSES if skip else 0), NET),
        "guide": guides.Normal((x + a + CLASSES,), z, NET),
        "auxiliary_guide": guides.Normal(SHAPE, a, NET),
        "classifier": Classifier((x + a,), CLASSES, NET),
        "skip": skip,
    }
    return shaken(AuxiliaryVAE(**parts | given))


stacked = functools.partial(auxiliary, skip=False)
KINDS: dict[str, Any] = {
    "conditional": conditional,
    "semi-supervised": semi,
    "auxiliary": auxiliary,
    "stacked": stacked,
}
PARTLY = {name: KINDS[name] for name in ("semi-supervised", "auxiliary", "stacked")}


def flat_grads(loss: Tensor, params: list[Tensor]) -> Tensor:
    """A loss and its gradients, as one vector."""
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach()[None], *(grad.flatten() for grad in found)])


def check_mean(draws: list[Tensor], exact: Tensor, factor: float = 5.0) -> None:
    """The mean of the draws is the exact vector, but for their noise, which is small beside it."""
    values = torch.stack(draws)
    error = values.std(0) / math.sqrt(len(values)) + 1e-7
    assert error.norm() < 0.1 * exact.norm()
    assert ((values.mean(0) - exact) / error).abs().max() < factor


# A truth ------------------------------------------------------------------------------------------


class M2(nn.Module):
    """p(y) N(z; 0, I) N(x; W z + b_y, s^2 I), and a guide of which every bound is a closed form.

    Columns of W are orthogonal, so that the posterior is a normal with diagonal covariance.
    """

    noise = 0.8

    def __init__(self, posterior: bool = False, told: bool = False):
        super().__init__()
        columns = torch.linalg.qr(torch.randn(4, 2))[0] * torch.tensor([1.5, 0.7])
        values = {
            "w": columns,
            "b": torch.randn(CLASSES, 4),
            "log_py": torch.randn(CLASSES).log_softmax(0),
            "gain": 0.3 * torch.randn(4, 2),
            "shift": 0.3 * torch.randn(CLASSES, 2),
            "log_scale": -0.5 + 0.3 * torch.randn(2),
            "slope": 0.5 * torch.randn(4, CLASSES),
            "offset": 0.5 * torch.randn(CLASSES),
        }
        precision = values["w"].square().sum(0) / self.noise**2 + 1
        to_z = values["w"] / self.noise**2 / precision
        if posterior:
            values |= {"gain": to_z, "shift": -values["b"] @ to_z}
            values["log_scale"] = -0.5 * precision.log()
        if told:
            inverse = torch.linalg.inv(self.covariance(values["w"]))
            values["slope"] = inverse @ values["b"].T
            square = torch.einsum("ci,ij,cj->c", values["b"], inverse, values["b"])
            values["offset"] = values["log_py"] - square / 2
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def covariance(self, w: Tensor) -> Tensor:
        return w @ w.T + self.noise**2 * torch.eye(4)

    def q(self, x: Tensor, y: Any) -> dist.TorchDistribution:
        return dist.Normal(x @ self.gain + self.shift[y], self.log_scale.exp()).to_event(1)

    def log_qy(self, x: Tensor) -> Tensor:
        return (x @ self.slope + self.offset).log_softmax(-1)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.log_py), obs=y, infer=SUMMED)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            px = dist.Normal(z @ self.w.T + self.b[y], self.noise).to_event(1)
            pyro.sample("x", px, obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.Categorical(logits=self.log_qy(x)), infer=SUMMED)
            pyro.sample("z", self.q(x, y))

    def log_pxy(self, x: Tensor) -> Tensor:
        """Log p(x, y) for every y: `(N, classes)`."""
        each = [
            dist.MultivariateNormal(b, self.covariance(self.w)).log_prob(x) + log_py
            for b, log_py in zip(self.b, self.log_py.log_softmax(0), strict=True)
        ]
        return torch.stack(each, -1)

    def bounds(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """L(x, y) for every y: `(N, classes)`."""
        found = []
        for y in range(CLASSES):
            q = self.q(x, y).base_dist
            px = dist.Normal(q.loc @ self.w.T + self.b[y], self.noise)
            spread = (self.w * q.scale[:1]).square().sum() / (2 * self.noise**2)
            kl = kl_divergence(q, dist.Normal(0.0, 1.0)).sum(-1)
            found.append(
                self.log_py.log_softmax(0)[y] + px.log_prob(x).sum(-1) - spread - weight * kl
            )
        return torch.stack(found, -1)

    def losses(
        self,
        x: Tensor,
        y: Tensor | None,
        alpha: float,
        weight: float = 1.0,
        warm: bool = True,
        top_k: int = CLASSES,
    ) -> Tensor:
        """The loss of each datum, with a label or without."""
        bounds, log_qy = self.bounds(x, weight), self.log_qy(x)
        if y is None:
            log_qy, top = log_qy.topk(top_k)
            bounds, log_qy = bounds.gather(1, top), log_qy.log_softmax(1)
            log_qy = log_qy if warm else log_qy.detach()
            return -(log_qy.exp() * (bounds - log_qy)).sum(-1)
        return -(bounds + alpha * log_qy).gather(1, y[:, None])[:, 0]

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        y = dist.Categorical(logits=self.log_py).sample((count,))
        x = dist.MultivariateNormal(self.b[y], self.covariance(self.w)).sample()
        return x.detach(), y


def surrogate(goal: SemiSupervised, vae: Any, args: tuple[Tensor, ...], seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return goal.surrogate(vae.model, vae.guide, args)[0]


def test_under_the_posterior_every_bound_is_the_closed_form() -> None:
    m2 = M2(posterior=True, told=True)
    x, y = m2.sample(6)
    log_pxy = m2.log_pxy(x).detach()
    log_px, labelled = log_pxy.logsumexp(1), log_pxy.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(m2.log_qy(x), log_pxy.log_softmax(1))
    for args, expected in (((x,), log_px), ((x, y), labelled)):
        bound = pyrovae.elbo(m2.model, m2.guide, args, 2, seed=0)
        torch.testing.assert_close(bound, expected)
        found = pyrovae.log_px(m2.model, m2.guide, args, 3, seed=0)
        torch.testing.assert_close(found.values, expected)
    goal = SemiSupervised(alpha=0.7)
    torch.testing.assert_close(surrogate(goal, m2, (x,)), -log_px.sum())
    cross_entropy = -(labelled - log_px).sum()
    loss, terms = goal.surrogate(m2.model, m2.guide, (x, y))
    torch.testing.assert_close(loss, -labelled.sum() + 0.7 * cross_entropy)
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy)
    torch.testing.assert_close(terms["elbo"], labelled.sum())
    right = (log_pxy.argmax(1) == y).double().sum()
    torch.testing.assert_close(terms["accuracy"], right)
    assert not any(term.requires_grad for term in terms.values())


def test_log_px_sums_labels_out_or_takes_them_as_given() -> None:
    m2 = M2()
    x, y = m2.sample(6)
    with torch.no_grad():
        m2.log_scale += 0.8
    log_pxy = m2.log_pxy(x).detach()
    for args, exact in (
        ((x,), log_pxy.logsumexp(1)),
        ((x, y), log_pxy.gather(1, y[:, None])[:, 0]),
    ):
        found = pyrovae.log_px(m2.model, m2.guide, args, 20_000, seed=0)
        assert ((found.values - exact).abs() < 4.5 * found.std_error + 1e-3).all()
        assert found.std_error.max() < 0.1
        torch.testing.assert_close(
            pyrovae.log_px(m2.model, m2.guide, args, method="exact").values, exact
        )


def test_the_posterior_of_the_label_is_had_from_both_evidences() -> None:
    """p(y|x) = p(x, y) / p(x)."""
    m2 = M2(posterior=True)
    x, _ = m2.sample(4)
    both = [
        pyrovae.log_px(m2.model, m2.guide, (x, torch.full((4,), y)), 1).values
        for y in range(CLASSES)
    ]
    alone = pyrovae.log_px(m2.model, m2.guide, x, 1).values
    expected = m2.log_pxy(x).softmax(1)
    torch.testing.assert_close((torch.stack(both, 1) - alone[:, None]).exp(), expected.detach())


@pytest.mark.parametrize(("beta", "kl_weight"), [(1.0, 1.0), (0.5, 0.6)])
@pytest.mark.parametrize("arranged", ["x", "x, y", "first rows"])
def test_loss_and_gradients_are_exact_in_the_mean(
    arranged: str, beta: float, kl_weight: float
) -> None:
    m2, alpha, weight, warm = M2(), 0.4, beta, kl_weight == 1
    x, y = m2.sample(5)
    goal = SemiSupervised(num_particles=300, alpha=alpha, beta=beta)
    given, others = m2.losses(x, y, alpha, weight), m2.losses(x, None, alpha, weight, warm)
    exact, args = (others.sum(), (x,)) if arranged == "x" else (given.sum(), (x, y))
    if arranged == "first rows":
        goal.arrange(2, 0.3)
        bound = m2.losses(x, y, 0.0, weight)[:2].mean()
        classified = -m2.log_qy(x).gather(1, y[:, None])[:2].mean()
        exact = 5 * (0.3 * bound + alpha * classified + 0.7 * others[2:].mean())
        args = (x, torch.where(torch.arange(5) < 2, y, -1))
    params = list(m2.parameters())
    draws = [
        flat_grads(goal.surrogate(m2.model, m2.guide, args, torch.tensor(kl_weight))[0], params)
        for _ in range(40)
    ]
    check_mean(draws, flat_grads(exact, params))


@pytest.mark.parametrize("warm", [True, False])
def test_the_most_probable_labels_are_summed_alone(warm: bool) -> None:
    m2, goal = M2(), SemiSupervised(num_particles=300, top_k=2)
    x, _ = m2.sample(5)
    params = list(m2.parameters())
    weight = torch.tensor(1.0 if warm else 0.6)
    draws = [
        flat_grads(goal.surrogate(m2.model, m2.guide, (x,), weight)[0], params) for _ in range(40)
    ]
    check_mean(draws, flat_grads(m2.losses(x, None, 0.0, warm=warm, top_k=2).sum(), params))


def test_a_bound_of_the_most_probable_labels_is_below_that_of_all() -> None:
    m2 = M2(posterior=True, told=True)
    x, y = m2.sample(6)
    log_pxy = m2.log_pxy(x).detach()
    for top_k in (2, CLASSES, CLASSES + 1):
        goal = SemiSupervised(top_k=top_k)
        bound = log_pxy.topk(min(top_k, CLASSES)).values.logsumexp(1)
        loss, terms = goal.surrogate(m2.model, m2.guide, (x,))
        torch.testing.assert_close(loss, -bound.sum())
        torch.testing.assert_close(terms["elbo"], bound.sum())
        of_labels = goal.surrogate(m2.model, m2.guide, (x, y))[0]
        torch.testing.assert_close(of_labels, surrogate(SemiSupervised(), m2, (x, y)))


@pytest.mark.parametrize("share", [None, 0.5, 0.0, 1.0])
def test_a_batch_stands_for_all_data(share: float | None) -> None:
    """Under the posterior of z nothing is random but the order: weights alone count."""
    m2, alpha = M2(posterior=True), 3.0
    x, y = m2.sample(13)
    x[:3] += 4.0  # data with labels are of another kind
    partly = torch.where(torch.arange(13) < 3, y, -1)
    split = data.known_or_not(data.as_split((x, partly)))
    order = split.order(5)
    assert (order.given, order.batch_size, order.share) == (1, 5, 3 / 13)
    weight = 3 / 13 if share is None else share
    others = (1 - weight) * m2.losses(x[3:], None, 0.0).mean()
    bound = weight * m2.losses(x[:3], y[:3], 0.0).mean() + others
    classified = -m2.log_qy(x[:3]).gather(1, y[:3, None]).mean()
    params = list(m2.parameters())
    whole = flat_grads(bound + alpha * classified, params)
    goal, draws = SemiSupervised(alpha=alpha, share=share), []
    goal.arrange(order.given, order.share)
    for _ in range(60):
        each = []
        for rows in order.epoch():
            loss, _ = goal.surrogate(m2.model, m2.guide, (x[rows], partly[rows]))
            each.append(flat_grads(loss / 5, params))
        draws.append(torch.stack(each).mean(0))
    check_mean(draws, whole)


def test_training_reports_the_evidence_of_either_kind() -> None:
    m2 = M2(posterior=True, told=True)
    x, y = m2.sample(16)
    partly = torch.where(torch.arange(16) < 4, y, -1)
    log_pxy = m2.log_pxy(x).detach()
    (row,) = pyrovae.fit(
        Program(m2.model, m2.guide), (x, partly), objective=SemiSupervised(), valid=(x, y),
        epochs=1, batch_size=4, lr=1e-12, progress=False,
    )  # fmt: skip
    known = log_pxy.gather(1, y[:, None])[:, 0]
    assert row["elbo"] == pytest.approx(float(log_pxy[4:].logsumexp(1).mean()))
    assert row["labelled_elbo"] == pytest.approx(float(known[:4].mean()))
    told = log_pxy[:4].log_softmax(1).gather(1, y[:4, None])
    assert row["cross_entropy"] == pytest.approx(-float(told.mean()))
    assert row["accuracy"] == float((log_pxy[:4].argmax(1) == y[:4]).double().mean())
    assert row["valid_elbo"] == pytest.approx(float(known.mean()))


class Twice(M2):
    """Whether the noise is large is a label of the model's own."""

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.log_py), obs=y, infer=SUMMED)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            large = pyro.sample("large", dist.Bernoulli(torch.tensor(0.3)), infer=SUMMED)
            scale = torch.where(large[..., None] == 1, 3 * self.noise, self.noise)
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b[y], scale).to_event(1), obs=x)


def test_what_the_model_alone_sums_out_stays_inside_the_logarithm() -> None:
    m2 = Twice()
    x, y = m2.sample(5)
    for args in ((x,), (x, y)):
        ours, theirs = [], []
        for seed in range(20):
            ours.append(surrogate(SemiSupervised(200, alpha=0.0), m2, args, seed).detach())
            torch.manual_seed(seed)
            many = tuple(arg.repeat(200, *[1] * (arg.dim() - 1)) for arg in args)
            loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
                lambda *a: m2.model(*a), lambda *a: m2.guide(*a), *many
            )
            theirs.append(loss.detach() / 200)
        first, second = torch.stack(ours), torch.stack(theirs)
        error = math.sqrt((first.var() + second.var()) / 20)
        assert abs(first.mean() - second.mean()) < 4 * error
        assert error < 0.01 * first.mean().abs()


# Pyro's own objectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTLY)
def test_without_labels_it_is_trace_enum_elbo(kind: str) -> None:
    vae, x = PARTLY[kind](), binary(3)
    params, goal = list(vae.parameters()), SemiSupervised(num_particles=100)
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    found: list[list[Tensor]] = [[], []]
    for _ in range(25):
        loss = goal.surrogate(vae.model, vae.guide, (x,))[0]
        found[0].append(flat_grads(loss, params))
        loss = theirs.differentiable_loss(vae.model, vae.guide, x.repeat(100, 1, 1, 1)) / 100
        found[1].append(flat_grads(loss, params))
    ours, others = map(torch.stack, found)
    error = ((ours.var(0) + others.var(0)) / 25).sqrt() + 1e-9
    assert ((ours.mean(0) - others.mean(0)) / error).abs().max() < 5
    assert error.norm() < 0.1 * ours.mean(0).norm()


def test_with_labels_it_is_trace_elbo_and_the_cross_entropy() -> None:
    vae, x, y = semi(class_probs=(0.5, 0.3, 0.2)), binary(), classes()
    params, goal = list(vae.parameters()), SemiSupervised(alpha=0.6)
    ours = flat_grads(surrogate(goal, vae, (x, y)), params)
    torch.manual_seed(1)
    bound = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x, y)
    cross_entropy = nn.functional.cross_entropy(vae.classifier.net(x), y, reduction="sum")
    torch.testing.assert_close(ours, flat_grads(bound + 0.6 * cross_entropy, params))


@pytest.mark.parametrize("kind", ["semi-supervised", "auxiliary"])
@pytest.mark.parametrize("goal", [SemiSupervised(), TraceEnum_ELBO(max_plate_nesting=1)])
def test_stock_svi_trains_it(kind: str, goal: Any) -> None:
    vae, x = PARTLY[kind](), binary(12)
    y = (x.flatten(1).sum(1) / 2.5).long()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.08}), goal)
    before = copy.deepcopy(dict(vae.named_parameters()))
    losses = [svi.step(x) + svi.step(x, y) for _ in range(15)]
    assert all((param != before[name]).any() for name, param in vae.named_parameters())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


# Auxiliary latents --------------------------------------------------------------------------------


def one_hot(y: int) -> Tensor:
    return torch.eye(CLASSES)[y]


class Plane:
    """One auxiliary latent and one code on a grid: log densities of shape (classes, N, a, z)."""

    def __init__(self, vae: AuxiliaryVAE, x: Tensor, line: Tensor = LINE):
        self.area = (line[1] - line[0]).square()
        a, z = line[:, None, None].expand(-1, len(line), 1), line[None, :, None]
        z, rows = z.expand(len(line), -1, 1), x.flatten(1)[:, None]
        qa = vae.auxiliary_guide(x)
        self.log_qa = qa.log_prob(line[:, None, None]).T
        column = line[None, :, None].expand(len(x), -1, 1)
        read = torch.cat([rows.expand(-1, len(line), -1), column], -1) if vae.skip else column
        self.log_qy = vae.classifier(read).logits.movedim(-1, 0)
        log_p, log_qz = [], []
        for y in range(CLASSES):
            label = one_hot(y)
            pa = vae.auxiliary_prior(torch.cat([z, label.expand(*z.shape[:-1], -1)], -1))
            above = [a, z, label.expand(*z.shape[:-1], -1)] if vae.skip else [a]
            px = vae.likelihood(torch.cat(above, -1)).log_prob(x[:, None, None])
            log_pz = vae.prior().log_prob(z) + vae.class_probs[y].log()
            log_p.append(px + pa.log_prob(a) + log_pz)
            qz = vae.encoder(torch.cat([read, label.expand(*read.shape[:-1], -1)], -1))
            log_qz.append(qz.log_prob(line[:, None, None, None]).movedim(0, -1))
        self.log_p, self.log_qz = torch.stack(log_p), torch.stack(log_qz)

    def log_pxy(self) -> Tensor:
        """Log p(x, y): `(classes, N)`."""
        return self.log_p.flatten(2).logsumexp(-1) + self.area.log()

    def loss(self, y: Tensor | None, alpha: float) -> Tensor:
        """Of a batch, with labels or without."""
        log_q = self.log_qa[..., None] + self.log_qz
        log_qy = self.log_qy[..., None]
        if y is None:
            log_w = self.log_p - log_q - log_qy
            return -self.area * ((log_q + log_qy).exp() * log_w).sum()
        bound = self.area * (log_q.exp() * (self.log_p - log_q)).sum((2, 3))
        told = self.area.sqrt() * (self.log_qa.exp() * self.log_qy).sum(-1)
        return -(bound + alpha * told).gather(0, y[None]).sum()


@pytest.mark.parametrize("skip", [True, False])
def test_log_px_with_auxiliary_latents_is_that_of_quadrature(skip: bool) -> None:
    vae, x, y = wide(auxiliary(skip, class_probs=(0.5, 0.3, 0.2))), binary(4), classes(4)
    with torch.no_grad():
        log_pxy = Plane(vae, x).log_pxy()
    for args, exact in (((x,), log_pxy.logsumexp(0)), ((x, y), log_pxy.gather(0, y[None])[0])):
        found = pyrovae.log_px(vae.model, vae.guide, args, 6000, seed=0)
        assert ((found.values - exact).abs() < 4.5 * found.std_error + 1e-5).all()
        assert found.std_error.max() < 0.05


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_loss_and_gradients_with_auxiliary_latents_are_those_of_quadrature(
    skip: bool, labelled: bool
) -> None:
    vae, x, y = wide(auxiliary(skip)), binary(3), classes(3)
    params, args = list(vae.parameters()), (x, y) if labelled else (x,)
    exact = flat_grads(Plane(vae, x, LINE[::2]).loss(y if labelled else None, 0.4), params)
    goal = SemiSupervised(num_particles=200, alpha=0.4)
    draws = [flat_grads(goal.surrogate(vae.model, vae.guide, args)[0], params) for _ in range(40)]
    check_mean(draws, exact)


def pair(missing: bool = False) -> tuple[VAE, SemiSupervisedVAE]:
    """M1, and M2 on its codes."""
    m1 = VAE(
        priors.StandardNormal(4), likelihoods.Bernoulli(SHAPE, 4, NET),
        guides.Normal(SHAPE, 4, NET), missing,
    )  # fmt: skip
    m2 = SemiSupervisedVAE(
        priors.StandardNormal(2), likelihoods.Normal((4,), 2 + CLASSES, NET),
        guides.Normal((4 + CLASSES,), 2, NET), Classifier((4,), CLASSES, NET),
        class_probs=(0.5, 0.3, 0.2),
    )  # fmt: skip
    return shaken(m1), shaken(m2)


@pytest.mark.parametrize("missing", [False, True])
def test_two_vaes_are_stacked(missing: bool) -> None:
    m1, m2 = pair(missing)
    vae, x, y = AuxiliaryVAE.stacked(m1, m2), binary(), classes()
    if missing:
        x[0, 0, 1, 2] = torch.nan
    codes = m1.encode(x)
    assert (vae.prior, vae.encoder, vae.classifier) == (m2.prior, m2.encoder, m2.classifier)
    assert (vae.likelihood, vae.auxiliary_guide) == (m1.likelihood, m1.encoder)
    assert vae.auxiliary_prior is m2.likelihood
    assert vae.missing == missing
    torch.testing.assert_close(vae.class_probs, m2.class_probs)
    torch.testing.assert_close(vae.classify(x), m2.classify(codes))
    torch.testing.assert_close(vae.encode(x), m2.encode(codes))
    torch.testing.assert_close(vae.encode(x, y), m2.encode(codes, y))
    z = torch.randn(5, 2)
    torch.testing.assert_close(vae.decode(z, y), m1.decode(m2.decode(z, y)))


def test_samples_with_auxiliary_latents_draw_them() -> None:
    """Draws of data vary with a, their means at its mean do not."""
    vae, y = stacked(z=1), torch.tensor(1)
    with torch.no_grad():
        vae.auxiliary_prior.net.bias.copy_(torch.tensor([0.0, 1.0]))
        vae.likelihood.net.bias.zero_()
        torch.manual_seed(0)
        a = vae.auxiliary_prior(
            torch.cat([torch.randn(40_000, 1), one_hot(1).expand(40_000, -1)], 1)
        )
        expected = vae.likelihood(a.sample()).mean.mean(0)
    drawn = vae.sample(40_000, y).mean(0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.015)


# Quadrature for the others ------------------------------------------------------------------------


def log_px_given_y(vae: ConditionalVAE, x: Tensor, labels: Tensor) -> Tensor:
    """Log p(x|y) of each datum by quadrature over one latent, y as numbers `(N, label_dim)`."""
    found = []
    with torch.no_grad():
        for row, label in zip(x, labels, strict=True):
            z = LINE[:, None]
            px = vae.likelihood(torch.cat([z, label.expand(len(z), -1)], -1))
            seen = ~row.isnan()
            log_px = torch.where(seen, px.base_dist.log_prob(row.nan_to_num()), 0.0)
            pz = vae.prior() if isinstance(vae.prior, priors.Prior) else vae.prior(label)
            log_joint = log_px.flatten(1).sum(1) + pz.log_prob(z)
            found.append(log_joint.logsumexp(0) + LOG_STEP)
    return torch.stack(found)


GIVEN: dict[str, Any] = {
    "classes": {},
    "vector": {"num_classes": None, "label_dim": CLASSES},
    "prior given y": {"prior": lambda: guides.Normal((CLASSES,), 1, NET)},
    "VampPrior": {"prior": lambda: priors.VampPrior((PIXELS + CLASSES,), 1, num_components=4)},
    "convolution": {
        "guide": lambda: guides.Normal((1 + CLASSES, 2, 3), 1, nets.Conv((3,), hidden=4)),
    },
    "missing": {"missing": True},
}


def given_y(name: str) -> tuple[ConditionalVAE, Tensor, Tensor, Tensor]:
    """A model with one latent, data, labels, and their numbers."""
    parts = {
        "prior": priors.StandardNormal(1),
        "likelihood": likelihoods.Bernoulli(SHAPE, 1 + CLASSES, NET),
        "guide": guides.Normal((PIXELS + CLASSES,), 1, NET),
    }
    parts |= {key: part() if callable(part) else part for key, part in GIVEN[name].items()}
    vae, x = wide(conditional(**parts)), binary()
    y = torch.randn(5, CLASSES) if name == "vector" else classes()
    if name == "missing":
        x[0, 0, 1, 2], x[1] = torch.nan, torch.nan
    return vae, x, y, y if name == "vector" else torch.eye(CLASSES)[y]


@pytest.mark.parametrize("name", GIVEN)
def test_log_px_given_y_is_that_of_quadrature(name: str) -> None:
    vae, x, y, numbers = given_y(name)
    exact = log_px_given_y(vae, x, numbers)
    found = pyrovae.log_px(vae.model, vae.guide, (x, y), 5000, seed=0)
    assert ((found.values - exact).abs() < 4.5 * found.std_error + 1e-5).all()
    assert found.std_error.max() < 0.05
    if name == "missing":
        torch.testing.assert_close(exact[1], torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["classes", "prior given y", "convolution", "missing"])
def test_log_px_of_a_semi_supervised_vae_is_that_of_quadrature(name: str) -> None:
    given, x, y, numbers = given_y(name)
    parts = (given.prior, given.likelihood, given.encoder, Classifier(SHAPE, CLASSES, NET))
    probs = torch.tensor([0.5, 0.3, 0.2])
    vae = SemiSupervisedVAE(*parts, class_probs=probs.tolist(), missing=given.missing)
    each = torch.stack([log_px_given_y(vae, x, one_hot(k).expand(5, -1)) for k in range(CLASSES)])
    joint = each + probs.log()[:, None]
    for args, exact in (((x,), joint.logsumexp(0)), ((x, y), joint.gather(0, y[None])[0])):
        found = pyrovae.log_px(vae.model, vae.guide, args, 3000, seed=0)
        assert ((found.values - exact).abs() < 4.5 * found.std_error + 1e-5).all()
        assert found.std_error.max() < 0.05
    del numbers


# What models do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GIVEN)
def test_shapes_and_means(name: str) -> None:
    vae, x, y, numbers = given_y(name)
    assert vae.encode(x, y).shape == (5, 1)
    assert vae.posterior(x, y).batch_shape == (5,)
    planes = numbers[..., None, None].expand(-1, -1, *SHAPE[1:])
    one = name != "convolution"
    seen = x.nan_to_num()
    read = torch.cat([seen.flatten(1), numbers], 1) if one else torch.cat([seen, planes], 1)
    torch.testing.assert_close(vae.encode(x, y), vae.encoder(read).mean.detach())
    assert vae.latent_dims == (1,)
    assert vae.shape == SHAPE
    z = torch.randn(4, 5, 1)
    expected = vae.likelihood(torch.cat([z, numbers.expand(4, -1, -1)], -1)).mean
    torch.testing.assert_close(vae.decode(z, y), expected.detach())
    filled = vae.reconstruct(x, y)
    torch.testing.assert_close(filled, vae.decode(vae.encode(x, y), y))
    assert filled.isfinite().all()
    for label in (y, y[0]):
        assert vae.sample(5, label).shape == vae.sample(5, label, mean=True).shape == x.shape
    labels = y[:2] if name == "vector" else None
    changed = vae.analogies(x, y, labels)
    assert changed.shape == (5, CLASSES if labels is None else 2, *SHAPE)
    torch.testing.assert_close(changed[0, 0], filled[0])  # the first label is its own
    if labels is None:
        torch.testing.assert_close(changed[torch.arange(5), y], filled)


@pytest.mark.parametrize("name", GIVEN)
def test_initialize_starts_at_the_data(name: str) -> None:
    _, x, y, _ = given_y("vector" if name == "vector" else "classes")
    parts = {
        "prior": priors.StandardNormal(1),
        "likelihood": likelihoods.Bernoulli(SHAPE, 1 + CLASSES, NET),
        "guide": guides.Normal((PIXELS + CLASSES,), 1, NET),
        "num_classes": CLASSES,
    }
    parts |= {key: part() if callable(part) else part for key, part in GIVEN[name].items()}
    vae = ConditionalVAE(**parts)
    before = copy.deepcopy(vae.state_dict())
    vae.initialize(x, y)
    assert not torch.equal(vae.likelihood.net.bias, before["likelihood.net.bias"])
    if name == "VampPrior":
        first = torch.cat([x[0].flatten(), one_hot(0)])
        assert (vae.prior.pseudo_inputs[0] - first).abs().max() < 0.05


class Told(nets.Net):
    """A network, not one of ours, that puts out y's numbers, which come last, tenfold."""

    def __call__(self, in_shape: Any, out_shape: Any) -> nn.Module:
        class Last(nn.Module):
            def forward(self, c: Tensor) -> Tensor:
                return 10 * c[..., -out_shape[0] :]

        return Last()


@pytest.mark.parametrize("kind", [conditional, semi])
def test_data_of_a_class_are_drawn_for_it(kind: Any) -> None:
    given = {
        "likelihood": likelihoods.Normal((CLASSES,), LATENTS + CLASSES, Told(), scale=0.5),
        "guide": guides.Normal((2 * CLASSES,), LATENTS, NET),
    }
    if kind is semi:
        given["classifier"] = Classifier((CLASSES,), CLASSES, Told())
        given["class_probs"] = (0.7, 0.2, 0.1)
    vae, y = kind(**given), classes(60)
    assert torch.equal(vae.sample(60, y).argmax(1), y)
    assert (vae.sample(60, torch.tensor(2)).argmax(1) == 2).all()
    torch.testing.assert_close(vae.sample(60, 1, mean=True)[0], 10 * one_hot(1))
    x = vae.sample(5, y[:5])
    torch.testing.assert_close(vae.analogies(x, y[:5])[3], 10 * torch.eye(CLASSES))
    if kind is semi:
        assert torch.equal(vae.classify(x).argmax(1), y[:5])
        torch.testing.assert_close(vae.reconstruct(x), 10 * torch.eye(CLASSES)[y[:5]])
        counts = vae.sample(4000).argmax(1).bincount() / 4000
        torch.testing.assert_close(counts, vae.class_probs, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["classes", "prior given y", "VampPrior"])
def test_samples_draw_the_code_of_the_label(name: str) -> None:
    vae = given_y(name)[0]
    with torch.no_grad():
        pz = vae.latent(one_hot(1))
        z = pz.sample((5000,)[: 1 - len(pz.batch_shape)])
        means = vae.likelihood(torch.cat([z, one_hot(1).expand(5000, -1)], -1)).mean
    drawn = vae.sample(5000, torch.tensor(1), mean=True)
    torch.testing.assert_close(drawn.mean(0), means.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.std(0), means.std(0), rtol=0.1, atol=1e-3)
    assert means.std(0).max() > 0.02


@pytest.mark.parametrize("kind", PARTLY)
def test_methods_take_the_most_probable_class_where_none_is_given(kind: str) -> None:
    vae, x = PARTLY[kind](), binary()
    probs = vae.classify(x)
    assert probs.shape == (5, CLASSES)
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    y = probs.argmax(1)
    assert torch.equal(vae.encode(x), vae.encode(x, y))
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x, y))
    assert torch.equal(vae.analogies(x), vae.analogies(x, y))
    assert vae.sample().shape == (1, *SHAPE)
    assert vae.training


@pytest.mark.parametrize("name", KINDS)
def test_copied_and_saved(name: str, tmp_path: Path) -> None:
    vae, x, y = KINDS[name](), binary(), classes()
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    assert type(again) is type(vae)
    assert again.state_dict().keys() == vae.state_dict().keys()
    for args in ((x, y), (x,))[: 1 if name == "conditional" else 2]:
        values = [
            pyrovae.log_px(one.model, one.guide, args, 20, seed=0).values
            for one in (vae, copy.deepcopy(vae), again)
        ]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])


def test_stacked_vaes_are_saved(tmp_path: Path) -> None:
    vae, x = AuxiliaryVAE.stacked(*pair(missing=True)), binary()
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    assert (again.skip, again.missing) == (False, True)
    assert torch.equal(again.classify(x), vae.classify(x))


# Every part ---------------------------------------------------------------------------------------


def made(part: Any, **given: Any) -> Any:
    """The part as it is in the table, for other shapes."""
    config, takes = to_config(part), parameters(type(part))
    new = {key: given[key] for key in given if key in takes}
    return from_config(config | {"init_args": config["init_args"] | new})


@pytest.mark.parametrize(
    ("role", "name"),
    [("guide", name) for name in GUIDES] + [("likelihood", name) for name in LIKELIHOODS],
)
@pytest.mark.parametrize("kind", [conditional, semi])
def test_every_part_is_a_part_of_it(kind: Any, role: str, name: str) -> None:
    table, shape, dim = GUIDES, [PIXELS + CLASSES], LATENTS
    if role == "likelihood":
        table, shape, dim = LIKELIHOODS, list(SHAPE), LATENTS + CLASSES
    part = made(table[name](), shape=shape, latent_dim=dim, net=to_config(NET))
    vae, y = kind(**{role: part}), classes(6)
    with torch.no_grad():
        x = vae.likelihood(torch.randn(6, LATENTS + CLASSES)).sample()
    params = dict(vae.named_parameters())
    goal: Any = ELBO() if kind is conditional else SemiSupervised()
    if kind is semi:
        goal.arrange(3, 0.5)
    if kind is semi and name == "Delta":
        with pytest.raises(ValueError, match="is a Delta, which has no density"):
            goal.surrogate(vae.model, vae.guide, (x, y))
        return
    loss, terms = goal.surrogate(vae.model, vae.guide, (x, y))
    for label, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
        assert grad.isfinite().all(), label
        assert grad.any(), label
    assert all(term.isfinite() for term in terms.values())
    assert vae.sample(3, torch.tensor(1)).shape == (3, *SHAPE)
    assert vae.eval().encode(x, y).isfinite().all()


@pytest.mark.parametrize("name", PARTLY)
def test_fit_moves_every_parameter(name: str) -> None:
    vae, x = PARTLY[name](), binary(30)
    y = torch.where(torch.arange(30) < 6, classes(30), -1)
    before = copy.deepcopy(vae.state_dict())
    history = pyrovae.fit(vae, (x, y), valid=x, epochs=2, batch_size=8, progress=False)
    assert not any(
        torch.equal(value, before[key]) for key, value in vae.state_dict().items()
        if key != "class_probs"
    )  # fmt: skip
    assert {"elbo", "labelled_elbo", "cross_entropy", "accuracy", "valid_elbo"} <= {*history[0]}
    assert all(math.isfinite(value) for row in history for value in row.values())


def test_few_labels_teach_classes() -> None:
    """Two classes that are told apart by the data alone; each has five labels."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = 2.0 * (2 * y[:, None] - 1) + torch.randn(200, 4)
    vae = SemiSupervisedVAE(
        priors.StandardNormal(2), likelihoods.Normal((4,), 2 + 2, NET),
        guides.Normal((4 + 2,), 2, NET), Classifier((4,), 2, NET),
    )  # fmt: skip
    few = torch.where(torch.arange(200) < 10, y, -1)
    pyrovae.fit(
        vae, (x, few), objective=SemiSupervised(alpha=1.0), epochs=10, batch_size=50, lr=0.03,
        progress=False, compile=False,
    )  # fmt: skip
    assert (vae.classify(x).argmax(1) == y).double().mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_compiled_step_with_auxiliary_latents_is_the_eager_one(top_k: int | None) -> None:
    vae, goal = auxiliary(), SemiSupervised(alpha=0.5, top_k=top_k)
    goal.arrange(3, 0.4)

    def loss(kl_weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return goal.surrogate(vae.model, vae.guide, (x, y), kl_weight)

    step = compiled.with_gradients(loss, list(vae.parameters()))
    batches = [
        (torch.tensor(w), binary(8), torch.cat([torch.randperm(3), -torch.ones(5).long()]))
        for w in (0.7, 0.3)
    ]
    kept = functools.partial(program.undisturbed, vae.model, vae.guide)
    with program.validation(False):
        fast = compiled.compile_function(step, *batches, kept, "it")
        assert fast is not None
        results = []
        for run in (step, fast):
            torch.manual_seed(1)
            results.append(run(*batches[1]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_compiled_training_ends_where_eager_training_does() -> None:
    first, x = semi(), binary(30)
    second = copy.deepcopy(first)
    y = torch.where(torch.arange(30) < 6, classes(30), -1)
    how = {"epochs": 3, "batch_size": 8, "progress": False, "lr": 0.01}
    rows = [pyrovae.fit(v, (x, y), compile=c, **how) for v, c in ((first, False), (second, True))]
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert rows[0][-1]["accuracy"] == pytest.approx(rows[1][-1]["accuracy"])


def test_a_killed_run_ends_where_one_that_was_not_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    first, x = semi(), binary(30)
    second, path = copy.deepcopy(first), tmp_path / "state"
    y = torch.where(torch.arange(30) < 6, classes(30), -1)
    how = {"epochs": 4, "batch_size": 8, "progress": False, "lr": 0.01, "valid": x}

    class Killed(Exception):
        pass

    def kill(_: Any, row: Any) -> None:
        if row["epoch"] == 3:
            raise Killed

    whole = pyrovae.fit(first, (x, y), **how)
    with pytest.raises(Killed):
        pyrovae.fit(second, (x, y), checkpoint=path, on_epoch=kill, **how)
    resumed = pyrovae.fit(second, (x, y), checkpoint=path, resume=True, **how)
    assert [row["elbo"] for row in resumed] == [row["elbo"] for row in whole]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    other = torch.where(torch.arange(30) < 9, classes(30), -1)
    with pytest.raises(ValueError, match="labelled"):
        pyrovae.fit(second, (x, other), checkpoint=path, resume=True, **how)


def test_an_objective_forgets_how_batches_were_arranged() -> None:
    vae, x, y, goal = semi(), binary(12), classes(12), SemiSupervised()
    before = copy.deepcopy(vae.state_dict())
    fresh = surrogate(SemiSupervised(), vae, (x, y))
    few = torch.where(torch.arange(12) < 6, y, -1)
    pyrovae.fit(vae, (x, few), objective=goal, epochs=1, batch_size=4, progress=False)
    vae.load_state_dict(before)
    torch.testing.assert_close(surrogate(goal, vae, (x, y)), fresh)


def test_every_process_must_have_data_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._processes, "size", lambda: 2)
    args = binary(12), part_labels()
    few = args[0], torch.where(torch.arange(12) < 3, classes(12), -1)
    with pytest.raises(ValueError, match="labelled data of a batch: 1 data for 2 processes to sha"):
        pyrovae.fit(semi(), few, epochs=1, batch_size=4, progress=False)
    nearly = torch.where(torch.arange(12) < 11, classes(12), -1)
    with pytest.raises(ValueError, match="other data of a batch: 1 data for 2 processes to share"):
        pyrovae.fit(semi(), (args[0], nearly), epochs=1, batch_size=6, progress=False)


# Messages -----------------------------------------------------------------------------------------


def part_labels(count: int = 12, known: int = 6) -> Tensor:
    return torch.where(torch.arange(count) < known, classes(count), -1)


TRACE_ENUM = TraceEnum_ELBO(max_plate_nesting=1)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no labels": (semi, lambda x, y: x, "SemiSupervisedVAE learns classes from labels: give"),
    "no y": (conditional, lambda x, y: x, "ConditionalVAE takes data with labels: give"),
    "all hidden": (semi, lambda x, y: (x, 0 * y - 1), "no datum has a label: give some"),
    "below": (semi, lambda x, y: (x, y - 1), "labels must be 0, 1, ..., or -1 where not given; go"),
    "above": (semi, lambda x, y: (x, y + (y > 1)), "from 0 to 2, got values from 0 to 3: is num"),
    "one missed": (
        semi, lambda x, y: (x, torch.where(y == 1, -1, y)), "class 1 has no label: give at least",
    ),
    "column": (semi, lambda x, y: (x, y[:, None]), r"y must have shape \(batch,\), got \(12, 1\)"),
    "real": (semi, lambda x, y: (x, y.double()), "y must be classes as int64, .* torch.float64"),
    "bytes": (semi, lambda x, y: (x, y.abs().byte()), "as int64, .* got .* of torch.uint8"),
    "given column": (conditional, lambda x, y: (x, y[:, None]), r"y must have shape \(batch,\)"),
    "given real": (conditional, lambda x, y: (x, y.double()), "y must be classes as int64"),
    "given above": (conditional, lambda x, y: (x, y.abs() + 1), "from 0 to 2, got values from 1"),
    "vector of 2": (
        lambda: given_y("vector")[0], lambda x, y: (x, torch.zeros(12, 2)),
        r"y must be real numbers of shape \(batch, 3\), got \(12, 2\)",
    ),
    "vector of none": (
        lambda: given_y("vector")[0], lambda x, y: (x, torch.zeros(12)),
        r"y must have shape \(batch, 3\), got \(12,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_cannot_be_learnt_from_are_refused(name: str) -> None:
    make, labelled, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        pyrovae.fit(make(), labelled(binary(12), part_labels()), epochs=1, progress=False)


@pytest.mark.parametrize("make", [semi, conditional])
@pytest.mark.parametrize(("label", "found"), [(-1, "-1 to 2"), (3, "0 to 3")])
def test_validation_data_have_all_labels_or_none(make: Any, label: int, found: str) -> None:
    x, y = binary(30), classes(30)
    wrong = torch.where(torch.arange(30) == 20, label, y)
    with pytest.raises(ValueError, match=f"from 0 to 2, got values from {found}"):
        pyrovae.fit(make(), (x, y), valid=(x, wrong), epochs=1, progress=False)
    if make is conditional:
        with pytest.raises(ValueError, match="ConditionalVAE takes data with labels"):
            pyrovae.fit(make(), (x, y), valid=x, epochs=1, progress=False)


@pytest.mark.parametrize("goal", [ELBO(), TRACE_ENUM])
@pytest.mark.parametrize("make", [semi, conditional])
def test_other_objectives_refuse_labels_for_some(make: Any, goal: Any) -> None:
    with pytest.raises(ValueError, match=r"takes data that all have labels, or none: .*SemiSuper"):
        pyrovae.fit(make(), (binary(12), part_labels()), objective=goal, epochs=1, progress=False)


def test_a_split_with_hidden_labels_is_refused_by_what_knows_none() -> None:
    split = data.hide_labels(labelled_split(), 6)
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(SHAPE, 2), guides.Normal(SHAPE, 2)
    )  # fmt: skip
    with pytest.raises(ValueError, match="ELBO takes data that all have labels, or none"):
        pyrovae.fit(vae, split, epochs=1, progress=False)


def labelled_split(count: int = 12) -> Any:
    from dataclasses import replace

    return replace(data.as_split(binary(count)), y=classes(count))


def test_whole_numbers_below_zero_are_no_labels_to_a_program_without_any() -> None:
    x, _ = M2().sample(12)
    sign = torch.arange(12) % 2 * 4 - 2

    class Signed(M2):
        def model(self, x: Tensor, sign: Tensor) -> None:
            super().model(x + 0.1 * sign[:, None])

        def guide(self, x: Tensor, sign: Tensor) -> None:
            super().guide(x)

    (row,) = pyrovae.fit(Signed(), (x, sign), epochs=1, progress=False)
    assert math.isfinite(row["elbo"])


def test_programs_that_always_take_a_label_are_refused_where_it_may_be_left_out() -> None:
    reason = r"SemiSupervised leaves out a label .*, and the model takes \(x, y\)"
    with pytest.raises(ValueError, match=reason):
        pyrovae.fit(
            conditional(), (binary(6), classes(6)), objective=SemiSupervised(), epochs=1,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (lambda m2: lambda x, y=None: m2.guide(x), "'y' is summed out though its label is given"),
        (lambda m2: lambda x, y=None: m2.guide(x, x[:, 0].long() * 0), "it marks 0 sites"),
    ],
)
def test_guides_that_do_not_know_what_a_label_is_are_refused(guide: Any, reason: str) -> None:
    m2 = M2()
    args = m2.sample(4)
    with pytest.raises(ValueError, match=reason):
        SemiSupervised().surrogate(m2.model, guide(m2), args)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_weights_of_the_objective_are_numbers_from_0_on(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number from 0 on, got"):
        SemiSupervised(**{name: value})


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_the_share_of_labelled_data_is_one(share: float) -> None:
    with pytest.raises(ValueError, match="share must be a number from 0 to 1, got"):
        SemiSupervised(share=share)


@pytest.mark.parametrize("top_k", [1, 0, 2.5])
def test_one_label_alone_is_refused(top_k: Any) -> None:
    with pytest.raises(ValueError, match=r"top_k must be a whole number from 2 on, .*, got"):
        SemiSupervised(top_k=top_k)


def test_the_most_probable_values_are_those_of_one_site() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in ("y", "w"):
                pyro.sample(name, dist.Categorical(torch.ones(3)), infer=SUMMED)

    with pytest.raises(ValueError, match=r"one site, and this one sums out 'y' and 'w'"):
        program.draw(guide, (torch.zeros(4, 2),), top_k=2)


def normal(*shape_and_dim: int) -> guides.Normal:
    *shape, dim = shape_and_dim
    return guides.Normal(tuple(shape), dim, NET)


MISFITS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "both": (conditional, {"label_dim": 3}, "give either num_classes or label_dim"),
    "neither": (conditional, {"num_classes": None}, "give either num_classes or label_dim"),
    "no class": (conditional, {"num_classes": 0}, "num_classes must be positive integers, got 0"),
    "guide": (conditional, {"guide": normal(6, 2)}, r"guide reads x .* 3 of y: its shape must be"),
    "image": (semi, {"guide": normal(2, 2, 3, 2)}, r"\(9,\) or \(4, 2, 3\), got \(2, 2, 3\)"),
    "likelihood": (
        semi, {"likelihood": likelihoods.Bernoulli(SHAPE, 2)}, "reads 2 of z and 3 of y: made for",
    ),
    "prior": (semi, {"prior": priors.StandardNormal(3)}, "latent_dim: prior 3, guide 2"),
    "prior of x": (conditional, {"prior": normal(6, 2)}, "prior reads 3 of y: made for 3, got 6"),
    "flow": (
        conditional, {"prior": guides.Planar((3,), 2, NET)}, r"prior \(Planar\) scores only its",
    ),
    "classifier": (semi, {"classifier": Classifier((6,), 3)}, "classifier reads x of shape"),
    "probs": (semi, {"class_probs": (0.5, 0.5)}, "class_probs must be 3 positive numbers, got"),
    "zero": (semi, {"class_probs": (1.0, 0.0, 1.0)}, "class_probs must be 3 positive numbers"),
    "a": (auxiliary, {"auxiliary_guide": normal(6, 1)}, "auxiliary_guide reads x of shape"),
    "a prior": (
        auxiliary, {"auxiliary_prior": likelihoods.Normal((2,), 4)},
        r"auxiliary_prior must be of vectors of shape \(1,\)",
    ),
    "a of z": (
        auxiliary, {"auxiliary_prior": likelihoods.Normal((1,), 5)}, "reads 1 of z and 3 of y",
    ),
    "a classifier": (auxiliary, {"classifier": Classifier((6,), 3)}, "6 of x and 1 of a: made f"),
    "a guide": (stacked, {"guide": normal(6, 1)}, "guide reads 1 of a and 3 of y: made for 4"),
    "a decoder": (
        stacked, {"likelihood": likelihoods.Bernoulli(SHAPE, 4)}, "reads 1 of a: made for 1, got 4",
    ),
    "a z": (auxiliary, {"prior": priors.StandardNormal(2)}, "prior reads 1 of z: made for 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    make, given, reason = MISFITS[name]
    with pytest.raises(ValueError, match=reason):
        make(**given)


@pytest.mark.parametrize(
    ("make", "given", "reason"),
    [
        (semi, {"classifier": nn.Linear(6, 3)}, "must be a pyrovae.Classifier, got Linear"),
        (semi, {"classifier": None}, "must be a pyrovae.Classifier, got None"),
        (conditional, {"prior": nn.Linear(3, 2)}, "prior must be a module of pyrovae.guides"),
        (conditional, {"guide": None}, "guide must be a module of pyrovae.guides, got None"),
        (auxiliary, {"auxiliary_guide": None}, "auxiliary_guide must be a module, got None"),
    ],
)
def test_what_is_no_part_is_refused(make: Any, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        make(**given)


def test_wrong_labels_of_methods_are_refused() -> None:
    vae, x = conditional(), binary()
    with pytest.raises(ValueError, match="from 0 to 2, got values from 0 to 4: is num_classes"):
        vae.encode(x, torch.arange(5))
    with pytest.raises(ValueError, match="y must be one label or 3, one for each sample, got 2"):
        vae.sample(3, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        vae.sample(0, torch.tensor(1))
    with pytest.raises(ValueError, match="say which labels, shape"):
        given_y("vector")[0].analogies(x, torch.zeros(5, CLASSES))
    with pytest.raises(ValueError, match=r"the network takes tensors of shape \(\.\.\., 9\)"):
        vae.encode(torch.zeros(5, 1, 2, 2), classes())
