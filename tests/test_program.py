"""Programs as densities per datum: what is counted, what is refused."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import PPCA
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyrovae import program

SUM = {"enumerate": "parallel"}
P = PPCA()
X = P.sample(6)


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def weights(model, guide, x, num_particles=3, **kwargs):
    args = x if isinstance(x, tuple) else (x,)
    program.check(model, guide, args, alone=True)
    with torch.no_grad():
        return program.log_weights(model, guide, args, num_particles, **kwargs)


# The same model, written in many ways: with the exact posterior every weight is p(x).


def plain_model(x):
    weight, bias = (
        pyro.param("weight", P.weight.detach().clone()),
        pyro.param("bias", P.bias.detach().clone()),
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ weight.T + bias, P.noise), obs=x)


def plain_guide(x):
    tril = pyro.param("tril", lambda: P.posterior(X).scale_tril[0].detach())
    gain = pyro.param("gain", lambda: (P.weight @ tril @ tril.T / P.noise**2).detach())
    with pyro.plate("data", len(x)):
        loc = (x - P.bias.detach()) @ gain
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


class AsPyroModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroParam(P.weight.detach().clone())
        self.noise = PyroParam(torch.tensor(P.noise), dist.constraints.positive)
        self.shift = nn.Parameter(P.bias.detach().clone())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ self.weight.T + self.shift, self.noise), obs=x)


class Convolutional(PPCA):
    """The same decoder as a convolution of images, which knows only batches of rows."""

    def likelihood(self, z):
        image = z.view(-1, 2, 1, 1)
        x = nn.functional.conv_transpose2d(image, self.weight.T[:, None, None, :])
        return normal(x.view(-1, 5) + self.bias, self.noise)


class Subsampled(PPCA):
    def model(self, x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            pyro.sample("z", self.posterior(x))


class Masked(PPCA):
    """A second observation of nonsense that is masked out, row by row."""

    def model(self, x):
        super().model(x)
        off = torch.zeros(len(x), dtype=torch.bool)
        with pyro.plate("more", len(x)), poutine.mask(mask=off):
            pyro.sample("nonsense", normal(torch.zeros(5)), obs=x)
        with pyro.plate("again", len(x)), poutine.mask(mask=False):
            pyro.sample("nonsense2", normal(torch.zeros(5)), obs=x)


class Scaled(PPCA):
    def model(self, x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", self.prior())
            with poutine.scale(scale=3.0):
                pyro.sample("x", self.likelihood(z), obs=x)

    guide = poutine.scale(PPCA.guide, scale=0.1)


class TwoLatents(PPCA):
    """z in two parts, the second's guide given the first."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", normal(torch.zeros(1)))
            second = pyro.sample("second", normal(torch.zeros_like(first)))
            pyro.sample("x", self.likelihood(torch.cat([first, second], -1)), obs=x)

    def guide(self, x):
        q = self.posterior(x)
        loc, cov = q.loc, q.covariance_matrix
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", normal(loc[:, :1], cov[:, :1, 0].sqrt()))
            slope = cov[:, 1:, 0] / cov[:, :1, 0]
            rest = cov[:, 1:, 1] - slope * cov[:, :1, 1]
            pyro.sample("second", normal(loc[:, 1:] + slope * (first - loc[:, :1]), rest.sqrt()))


class InnerPlate(PPCA):
    """Entries in a plate of their own, in front of the rows."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            loc = z @ self.weight.T + self.bias
            with pyro.plate("entries", 5):
                pyro.sample("x", dist.Normal(loc.T, self.noise), obs=x.T)


class InnerLatents(PPCA):
    """Latents in a plate of their own, unused by the data: they must cancel."""

    def local(self, x):
        with pyro.plate("more", len(x)), pyro.plate("entries", 4):
            pyro.sample("w", dist.Normal(1.0, 2.0))

    def model(self, x):
        super().model(x)
        self.local(x)

    def guide(self, x):
        super().guide(x)
        self.local(x)


class SequentialPlate(PPCA):
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            loc = z @ self.weight.T + self.bias
            for i in pyro.plate("entries", 5):
                pyro.sample(f"x{i}", dist.Normal(loc[:, i], self.noise), obs=x[:, i])


class NoPlate(PPCA):
    def model(self, x):
        z = pyro.sample("z", self.prior().expand([len(x)]))
        pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.sample("z", self.posterior(x))


class Factor(PPCA):
    def model(self, x):
        pyro.deterministic("norm", self.weight.norm())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.deterministic("loc", z @ self.weight.T + self.bias)
            half = self.likelihood(z).log_prob(x) / 2
            pyro.factor("half", half)
            pyro.factor("other", half)
            pyro.sample("one", dist.Bernoulli(torch.ones(len(x))), obs=torch.ones(len(x)))


class Wrapped(PPCA):
    """Handlers around, and a decorator that hides whose function it is."""

    def __init__(self):
        super().__init__()
        self.model = poutine.infer_config(super().model, lambda site: site["infer"])
        self.guide = functools.partial(super().guide)


class Renamed:
    """No nn.Module itself, but it holds one."""

    def __init__(self):
        self.parts = {"all": [PPCA()]}

    def model(self, x):
        self.parts["all"][0].model(x)

    def guide(self, x):
        self.parts["all"][0].guide(x)


SAME = {
    "methods": lambda: PPCA(),
    "plain": lambda: program.Program(plain_model, plain_guide),
    "PyroModule": lambda: program.Program(AsPyroModule(), P.guide),
    "mixed": lambda: program.Program(P.model, plain_guide),
    "convolution": Convolutional,
    "subsampled": Subsampled,
    "masked": Masked,
    "scaled": Scaled,
    "two latents": TwoLatents,
    "inner plate": InnerPlate,
    "inner latents": InnerLatents,
    "sequential plate": SequentialPlate,
    "no plate": NoPlate,
    "factor": Factor,
    "wrapped": Wrapped,
    "holder": Renamed,
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_every_way_to_write_it_gives_the_closed_form(name, num_particles):
    vae = SAME[name]()
    log_w = weights(vae.model, vae.guide, X, num_particles)
    assert log_w.shape == (num_particles, 6)
    torch.testing.assert_close(log_w.double(), P.log_px(X).expand_as(log_w), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SAME)
def test_draws_in_chunks_are_all_draws(name):
    vae = SAME[name]()
    log_w = weights(vae.model, vae.guide, X, 7, max_rows=13)  # two at a time, then one
    assert log_w.shape == (7, 6)
    torch.testing.assert_close(log_w.double(), P.log_px(X).expand_as(log_w), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_draws_are_scored_again_like_the_first_time(name, num_particles):
    vae = SAME[name]()
    drawn = program.draw(vae.guide, (X,), num_particles)
    values = {name: z.detach() for name, z in drawn.values.items()}
    again = program.rescore(vae.guide, (X,), drawn, values)
    assert again.keys() == drawn.scores.keys()
    torch.testing.assert_close(program.total(again), drawn.log_q.flatten())


def test_other_values_than_the_draws_are_scored():
    narrow, z = PPCA(width=0.5), torch.randn(18, 2)
    expected = narrow.posterior(X.repeat(3, 1)).log_prob(z)
    for by_rows in (False, True):
        drawn = program.draw(narrow.guide, (X,), 3, by_rows)
        again = program.rescore(narrow.guide, (X,), drawn, {"z": z})
        torch.testing.assert_close(again["z"].log_prob, expected)


def test_simulated_data_and_latents_are_those_of_the_model():
    x = torch.zeros(50_000, 5)
    (new,), latents = program.simulate(P.model, (x,))
    assert new.shape == x.shape
    assert not new.requires_grad
    both = torch.cat([latents["z"], new], -1)
    w = P.weight.detach()
    cov = torch.cat([torch.eye(2), w]) @ torch.cat([torch.eye(2), w]).T
    cov[2:, 2:] += P.noise**2 * torch.eye(5)
    torch.testing.assert_close(both.T.cov(), cov, rtol=0.05, atol=0.05)
    torch.testing.assert_close(new.mean(0), P.bias.detach(), rtol=0, atol=0.05)


def test_what_the_model_is_merely_given_is_not_simulated():
    def model(x, y, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.full((len(x),), 0.5)), obs=y)
            z = pyro.sample("z", dist.Normal(scale, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    args = torch.zeros(100), torch.zeros(100), torch.ones(100)
    (x, y, scale), latents = program.simulate(model, args)
    assert x is args[0]
    assert scale is args[2]
    assert 0 < y.mean() < 1
    assert latents.keys() == {"z"}


def test_draws_differ_and_are_scored():
    narrow = PPCA(width=0.5)
    for by_rows in (False, True):
        drawn = program.draw(narrow.guide, (X,), 4, by_rows)
        z = drawn.values["z"]
        assert z.shape == (24, 2)
        assert len(z.unique(dim=0)) == 24
        expected = narrow.posterior(X.repeat(4, 1)).log_prob(z)
        torch.testing.assert_close(drawn.log_q.flatten(), expected, rtol=0, atol=1e-4)
        joint = program.log_joint(P.model, (X.repeat(4, 1),), drawn.values)
        by_hand = P.prior().log_prob(z) + P.likelihood(z).log_prob(X.repeat(4, 1))
        torch.testing.assert_close(joint, by_hand, rtol=0, atol=1e-4)


def test_a_guide_with_one_latent_runs_once():
    calls = []

    def guide(x):
        calls.append(len(x))
        P.guide(x)

    with torch.no_grad():
        program.log_weights(P.model, guide, (X,), 100, max_rows=60)
    assert calls == [6]


def test_scale_is_kept_for_objectives():
    vae = Scaled()
    drawn = program.draw(vae.guide, (X,))
    scores = program.score_sites(vae.model, (X,), drawn.values)
    found = (scores["z"].scale, scores["x"].scale, drawn.scores["z"].scale)
    assert found == pytest.approx((0.1, 3.0, 0.1))
    assert [name for name, score in scores.items() if score.observed] == ["x"]


def test_gradients_pass_through():
    vae = PPCA(width=0.8)
    program.log_weights(vae.model, vae.guide, (X,), 3).mean().backward()
    assert vae.weight.grad.abs().sum() > 0


# Labels: p(x) is a mixture of as many Gaussians as there are labels.

PROBS = torch.tensor([0.5, 0.3, 0.2])
OFFSETS = torch.tensor([[0.0, 0, 0, 0, 0], [1, -1, 0, 2, 0], [0, 0.5, 3, 0, -1]])


def mixture(x):
    parts = [P.log_px(x - offset) for offset in OFFSETS]
    return (torch.stack(parts, -1) + PROBS.double().log()).logsumexp(-1)


def label_model(x, mark=True, latent=True):
    infer = SUM if mark else {}
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PROBS), infer=infer)
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ P.weight.T + P.bias + OFFSETS[y], P.noise), obs=x)


def depends_on_label(x, mark=True):
    with pyro.plate("data", len(x)):
        logits = x @ torch.arange(15.0).view(5, 3) / 20
        y = pyro.sample("y", dist.Categorical(logits=logits), infer=SUM if mark else {})
        pyro.sample("z", P.posterior(x - OFFSETS[y]))


def by_importance(model, guide, x, truth, count=20_000, tolerance=4.0):
    """The estimate within so many standard errors, and those small: a wrong constant shows."""
    log_w = weights(model, guide, x, count).double()
    ratio = (log_w - truth).exp()
    error = ratio.std(0) / math.sqrt(count)
    assert (error < 0.05).all()
    assert ((ratio.mean(0) - 1).abs() < tolerance * error + 1e-4).all()


WIDE = P.marginal().sample((6,)).float()  # near the middle, so that one guide serves all labels


@pytest.mark.parametrize("has_label", [True, False])
def test_a_label_is_summed_whether_the_guide_has_it_or_not(has_label):
    def broad(x):
        with pyro.plate("data", len(x)):
            if has_label:
                pyro.sample("y", dist.Categorical(PROBS.expand(len(x), 3)), infer=SUM)
            pyro.sample("z", normal(P.posterior(x).loc, 1.2))

    by_importance(label_model, broad, WIDE, mixture(WIDE))


@pytest.mark.parametrize("marked", [(True, False), (False, False)])
def test_a_label_drawn_and_not_summed_is_right_on_average(marked):
    in_model, in_guide = marked
    model = functools.partial(label_model, mark=in_model)

    def guide(x):
        with pyro.plate("data", len(x)):
            infer = SUM if in_guide else {}
            y = pyro.sample("y", dist.Categorical(PROBS.expand(len(x), 3)), infer=infer)
            pyro.sample("z", P.posterior(x - OFFSETS[y]))

    log_w = weights(model, guide, X, 20_000).double()
    ratio = (log_w - mixture(X)).exp()
    error = ratio.std(0) / math.sqrt(20_000)
    assert (error < 0.05).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


def test_all_latents_discrete_is_exact():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(PROBS), infer=SUM)
            pyro.sample("x", normal(OFFSETS[y], P.noise), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 3)), infer=SUM)

    parts = torch.stack([normal(offset, P.noise).log_prob(X) for offset in OFFSETS], -1)
    truth = (parts + PROBS.log()).logsumexp(-1)
    for k in (1, 3):
        torch.testing.assert_close(weights(model, guide, X, k), truth.expand(k, -1))
    assert program.draw(guide, (X,), 3).scores == {}


def test_two_labels_are_both_summed():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(PROBS), infer=SUM)
            flip = pyro.sample("flip", dist.Bernoulli(0.2 + 0.2 * y), infer=SUM)
            z = pyro.sample("z", normal(torch.zeros(2)))
            loc = z @ P.weight.T + P.bias + OFFSETS[y] + flip[..., None]
            pyro.sample("x", normal(loc, P.noise), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 3)), infer=SUM)
            flip = pyro.sample("flip", dist.Bernoulli(torch.full((len(x),), 0.5)), infer=SUM)
            pyro.sample("z", P.posterior(x - OFFSETS[y] - flip[..., None]))

    truth = torch.stack(
        [
            P.log_px(X - OFFSETS[y] - flip) + math.log(PROBS[y] * (p if flip else 1 - p))
            for y, p in enumerate((0.2, 0.4, 0.6))
            for flip in (0, 1)
        ]
    ).logsumexp(0)
    log_w = weights(model, guide, X, 3)
    torch.testing.assert_close(log_w.double(), truth.expand(3, -1), rtol=0, atol=2e-4)

    def only_y(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 3)), infer=SUM)
            pyro.sample("z", normal(P.posterior(x - OFFSETS[y]).loc, 1.0))

    by_importance(model, only_y, X, truth)


def test_a_one_hot_label_and_its_values_expanded():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(PROBS), infer=SUM)
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ P.weight.T + P.bias + y @ OFFSETS, P.noise), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            infer = {**SUM, "expand": True}
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3)), infer=infer)
            pyro.sample("z", P.posterior(x - y @ OFFSETS))

    log_w = weights(model, guide, X)
    torch.testing.assert_close(log_w.double(), mixture(X).expand(3, -1), rtol=0, atol=2e-4)


def test_config_enumerate_marks_a_label():
    bare = functools.partial(label_model, mark=False)
    log_w = weights(config_enumerate(bare), depends_on_label, X)
    torch.testing.assert_close(log_w.double(), mixture(X).expand(3, -1), rtol=0, atol=2e-4)


def test_a_given_label_is_conditioned_on():
    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(PROBS), obs=y)
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ P.weight.T + P.bias + OFFSETS[y], P.noise), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", P.posterior(x - OFFSETS[y]))

    y = torch.arange(6) % 3
    truth = P.log_px(X - OFFSETS[y]) + PROBS[y].log()
    log_w = weights(model, guide, (X, y))
    torch.testing.assert_close(log_w.double(), truth.expand(3, -1), rtol=0, atol=2e-4)


def test_a_discrete_latent_may_be_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", normal(bits @ OFFSETS, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("bits", dist.Bernoulli(torch.full((len(x), 3), 0.4)).to_event(1))

    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    prior = dist.Bernoulli(0.3).log_prob(bits).sum(-1)
    like = normal(bits @ OFFSETS, 1.0).log_prob(X[:, None])
    truth = (prior + like).logsumexp(-1)
    log_w = weights(model, guide, X, 20_000)
    estimate = log_w.logsumexp(0) - math.log(20_000)
    error = (log_w - truth).exp().std(0) / math.sqrt(20_000)
    assert (error < 0.1).all()
    assert ((estimate - truth).abs() < 4 * error).all()


def test_latents_of_no_size():
    def more(x):
        with pyro.plate("data", len(x)):
            pyro.sample("empty", normal(torch.zeros(len(x), 0)))

    def model(x):
        P.model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("empty", normal(torch.zeros(0)))

    def guide(x):
        P.guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("empty", normal(torch.zeros(0)))

    log_w = weights(model, guide, X)
    torch.testing.assert_close(log_w.double(), P.log_px(X).expand(3, -1), rtol=0, atol=2e-4)


# What is refused, each with its reason.


def model_of(latent=None, observed=None):
    """The model, with a site or two written otherwise."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = (latent or (lambda x: pyro.sample("z", normal(torch.zeros(2)))))(x)
            px = normal(z @ P.weight.T + P.bias, P.noise)
            (observed or (lambda px, x: pyro.sample("x", px, obs=x)))(px, x)

    return model


def guide_of(latent):
    def guide(x):
        with pyro.plate("data", len(x)):
            latent(x)

    return guide


def posterior(x):
    return pyro.sample("z", P.posterior(x))


def extra_latent(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    return pyro.sample("z", normal(torch.zeros(2)))


def global_latent(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    P.guide(x)


def global_in_model(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    P.model(x)


def outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(torch.zeros(2)))
    pyro.sample("x", dist.Normal(z @ P.weight.T + P.bias, P.noise).to_event(2), obs=x)


def forgotten(px, x):
    pyro.sample("x", px.base_dist, obs=x)


def forgotten_one(px, x):
    """Broadcast by the plate to rows x rows."""
    pyro.sample("x", dist.Normal(px.mean[:, :1], 1.0), obs=x[:, :1])


def summed_forgotten_one(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(PROBS), infer=SUM)
        z = pyro.sample("z", normal(torch.zeros(2)))
        forgotten_one(normal(z @ P.weight.T), x)


def entries_last(x):
    """The rows' plate in front: its log densities end in entries."""
    z = pyro.sample("z", normal(torch.zeros(len(x), 2)))
    with pyro.plate("entries", 5), pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z @ P.weight.T, 1.0), obs=x)


def enumerated_beside(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PROBS), infer=SUM)
        z = pyro.sample("z", normal(torch.zeros(2)))
        loc = z @ P.weight.T + P.bias + OFFSETS[y]
        with pyro.plate("entries", 5):
            pyro.sample("x", dist.Normal(loc.transpose(-1, -2), P.noise), obs=x.T)


def partly(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(torch.zeros(2)))
        with pyro.plate("entries", 5, subsample_size=3) as index:
            loc = (z @ P.weight.T + P.bias)[:, index]
            pyro.sample("x", dist.Normal(loc.T, P.noise), obs=x[:, index].T)


def markov(x):
    with pyro.plate("data", len(x)):
        y = 0
        for i in pyro.markov(range(3)):
            y = pyro.sample(f"y{i}", dist.Categorical(PROBS), infer=SUM)
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ P.weight.T + OFFSETS[y], P.noise), obs=x)


def labelled(values, num_samples=None):
    infer = SUM if num_samples is None else {**SUM, "num_samples": num_samples}

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(len(x), values)), infer=infer)
            pyro.sample("z", P.posterior(x))

    return guide


def count_model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Poisson(1.0))
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ P.weight.T + y[..., None], P.noise), obs=x)


def positive(x):
    return pyro.sample("z", dist.Exponential(torch.ones(2)).to_event(1))


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(normal(torch.zeros(5, 2)))

    def forward(self, x):
        weight = self.weight
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", normal(z @ weight.T, 1.0), obs=x)


def half_masked(px, x):
    mask = torch.ones(len(x), dtype=torch.bool)
    pyro.sample("x", px, obs=x, obs_mask=mask)


def hidden_latent(x):
    def noisy():
        return pyro.sample("w", normal(torch.zeros(2)))

    return pyro.sample("z", normal(torch.zeros(2))) + poutine.block(noisy)()


STORED = P.sample(100, seed=5)


def stored_data(px, x):
    pyro.sample("x", px, obs=STORED[: len(x)])


def noisy_data(px, x):
    pyro.sample("x", px, obs=x + torch.randn_like(x))


def standardized(px, x):
    pyro.sample("x", px, obs=x - x.mean(0))


REFUSED = {
    "missing in guide": (model_of(extra_latent), P.guide, "latent 'w' is not in the guide.*enumer"),
    "missing in model": (
        P.model,
        guide_of(lambda x: (posterior(x), pyro.sample("w", dist.Normal(0.0, 1.0)))),
        "latent 'w' is not in the model",
    ),
    "auxiliary": (
        P.model,
        guide_of(
            lambda x: (
                posterior(x),
                pyro.sample("w", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}),
            )
        ),
        "latent 'w' is not in the model",
    ),
    "delta": (
        P.model,
        guide_of(lambda x: pyro.sample("z", dist.Delta(P.posterior(x).loc).to_event(1))),
        "'z' is a Delta",
    ),
    "autoguide": (P.model, AutoNormal(P.model), "has parameters for each datum"),
    "guide of nothing": (P.model, lambda x: None, "the guide samples nothing"),
    "guide observes": (
        P.model,
        guide_of(lambda x: (posterior(x), pyro.sample("y", dist.Normal(x[:, 0], 1), obs=x[:, 1]))),
        "the guide observes 'y'",
    ),
    "factor in guide": (
        P.model,
        guide_of(lambda x: (posterior(x), pyro.factor("f", x[:, 0]))),
        "the guide observes 'f'",
    ),
    "guide samples data": (
        P.model,
        guide_of(lambda x: (posterior(x), pyro.sample("x", normal(x)))),
        "the guide samples 'x', which the model observes",
    ),
    "global": (global_in_model, global_latent, "'w' has log densities of shape .* for 7 rows"),
    "Bayesian weights": (Bayesian(), P.guide, "latent 'weight' is not in the guide"),
    "outside the plate": (outside, P.guide, r"'x' has log densities of shape \(\) for 7 rows"),
    "forgotten to_event": (model_of(observed=forgotten), P.guide, "the model fails.*[Ss]hape"),
    "one entry": (
        model_of(observed=forgotten_one),
        P.guide,
        r"'x' has log densities of .*\(7, 7\)",
    ),
    "one entry, label": (summed_forgotten_one, P.guide, "'x' has log densities of"),
    "entries last": (entries_last, P.guide, r"'x' has log densities of shape \(7, 5\)"),
    "no data": (model_of(observed=lambda px, x: None), P.guide, "the model observes nothing"),
    "hidden data": (poutine.block(P.model, hide=["x"]), P.guide, "the model observes nothing"),
    "label beside plate": (enumerated_beside, labelled(3), "'y' is enumerated beside .*'entries'"),
    "label of model beside plate": (enumerated_beside, P.guide, "enumerated beside .*'entries'"),
    "subsampled entries": (partly, P.guide, "inner plate 'entries' takes a subsample"),
    "markov": (markov, P.guide, "inside pyro.markov"),
    "sampled label": (label_model, labelled(3, num_samples=2), "num_samples"),
    "fewer labels": (label_model, labelled(2), "'y' has 2 values in the guide and 3 in the model"),
    "endless labels": (count_model, labelled(4), "'y'.*(values in the guide|Poisson)"),
    "other space": (model_of(positive), P.guide, "outside the support of the model's 'z'"),
    "other event": (
        lambda x: one_by_one(x, to_event=False),
        lambda x: one_by_one(x, obs=False),
        "'z' has event",
    ),
    "obs_mask": (model_of(observed=half_masked), P.guide, "'x_unobserved' is not in the guide"),
    "hidden latent": (model_of(hidden_latent), P.guide, "'x' of the model gives a datum another"),
    "stored data": (model_of(observed=stored_data), P.guide, "'x' of the model gives a datum anot"),
    "random data": (model_of(observed=noisy_data), P.guide, "'x' of the model gives a datum anoth"),
    "batch statistics": (
        model_of(observed=standardized),
        P.guide,
        "'x' of the model gives a datum",
    ),
    "batch statistics of guide": (
        P.model,
        lambda x: P.guide(x - x.mean(0)),
        "'z' of the guide gives a datum another",
    ),
    "fixed plate": (lambda x: fixed(x, 60), P.guide, "the model fails on a batch of 7"),
    "plate by data": (
        lambda x: fixed(x, int(x.abs().sum())),
        P.guide,
        "fails on a batch of 7 rows",
    ),
    "too few arguments": (lambda: None, P.guide, r"the model takes \(\), and the data are x alone"),
}


def one_by_one(x, to_event=True, obs=True):
    with pyro.plate("data", len(x)):
        q = dist.Bernoulli(torch.full((len(x), 1), 0.5))
        pyro.sample("z", q.to_event(1) if to_event else q)
        if obs:
            pyro.sample("x", normal(torch.zeros(5)), obs=x)


def fixed(x, size):
    with pyro.plate("data", size):
        z = pyro.sample("z", normal(torch.zeros(2)))
        pyro.sample("x", normal(z @ P.weight.T), obs=x)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, guide, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as caught:
        program.check(model, guide, (X,), alone=True)
    assert "\n" not in str(caught.value)


def test_training_does_without_a_density_where_it_can():
    model, guide, reason = REFUSED["delta"]
    program.check(model, guide, (X,))
    with pytest.raises(ValueError, match=reason):
        program.check(model, guide, (X,), density=True)


def test_training_may_depend_on_the_batch():
    model, guide, _ = REFUSED["batch statistics"]
    program.check(model, guide, (X,))


@pytest.mark.parametrize("dim", [1, 7, 14])
def test_entries_that_look_like_rows_are_refused(dim):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(dim)), obs=x)

    with pytest.raises(ValueError, match=r"log densities|fail"):
        program.check(model, P.guide, (torch.zeros(9, dim),))


class OfTwo(PyroModule):
    def forward(self, x, *, y):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def of_one(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "parts", "reason"),
    [
        (of_one, of_one, 2, r"the model takes \(x\), and the data are 2 tensors, as \(x, y\) is"),
        (lambda x, y=None: of_one(x), of_one, 2, r"the guide takes \(x\), and the data are 2"),
        (OfTwo(), of_one, 1, r"the model takes \(x, \*, y\), and the data are x alone"),
    ],
    ids=["model", "guide", "module"],
)
def test_data_of_other_parts_than_the_program_takes_are_refused(model, guide, parts, reason):
    for check in (program.check, program.observed_support):
        with pytest.raises(ValueError, match=reason):
            check(model, guide, (torch.zeros(3, 2),) * parts)


def test_what_a_decorator_supplies_is_not_asked_of_the_data():
    def with_scale(function):
        @functools.wraps(function)
        def of_data(x):
            return function(x, 1.0)

        return of_data

    @with_scale
    def model(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for wrapped in (model, poutine.scale(model, 1.0)):
        program.check(wrapped, guide, (torch.zeros(3),))


def test_a_scale_is_refused_on_request():
    vae = Scaled()
    program.check(vae.model, vae.guide, (X,))
    with pytest.raises(ValueError, match="has a scale"):
        program.check(vae.model, vae.guide, (X,), scaled=False)


def test_a_number_outside_the_support_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)))
            pyro.sample("x", dist.Bernoulli(logits=z @ P.weight.T).to_event(1), obs=x)

    assert program.observed_support(model, P.guide, (X,))[0] == "x"
    with pytest.raises(ValueError, match=r"the model fails.*support"):
        program.check(model, P.guide, (X,))


@pytest.mark.parametrize(
    ("x", "error", "reason"),
    [
        (3.0, TypeError, "must be a tensor"),
        ([X, 1], TypeError, "must be a tensor"),
        (torch.zeros(0, 5), ValueError, "empty"),
        ((), ValueError, "empty"),
        (torch.tensor(1.0), ValueError, "empty"),
        ((X, X[:3]), ValueError, r"differ in their first dimension: \[3, 6\]"),
    ],
)
def test_arguments_are_tensors_of_one_length(x, error, reason):
    with pytest.raises(error, match=reason):
        program.as_args(x)


# Modules: found, put in a mode, left as they were.


class Normalized(PPCA):
    """Its encoder has batch statistics, and dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))

    def posterior(self, x):
        return normal(self.net(x), 0.9)


LIBRARY = {"nets": [Normalized()]}


def reached_through_globals(x):
    def inner():
        return LIBRARY["nets"][0].posterior(x)

    with pyro.plate("data", len(x)):
        pyro.sample("z", inner())


def closing_over(vae):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.posterior(x))

    return guide


class Callable:
    def __init__(self, vae):
        self.vae = vae

    def __call__(self, x):
        self.vae.guide(x)


GUIDES = {
    "method": lambda vae: vae.guide,
    "closure": closing_over,
    "default": lambda vae: lambda x, part=vae: part.guide(x),
    "partial": lambda vae: functools.partial(lambda part, x: part.guide(x), vae),
    "object": Callable,
    "handler": lambda vae: poutine.scale(vae.guide, scale=2.0),
}


@pytest.mark.parametrize("name", GUIDES)
def test_modules_are_found_and_left_alone(name):
    vae = Normalized()
    guide = GUIDES[name](vae)
    vae.net[1].eval()
    before = copy.deepcopy(vae.state_dict())
    random = torch.get_rng_state()
    keys = set(pyro.get_param_store().keys())
    assert vae in program.modules(guide)
    with program.in_mode(False, guide):
        assert not any(module.training for module in vae.modules())
    program.check(P.model, guide, (X,))
    assert [module.training for module in vae.net] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert name != "method" or set(pyro.get_param_store().keys()) == keys
    with program.undisturbed(guide):
        vae.net.train()(X)
        torch.rand(3)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_modules_are_found_through_globals_of_inner_functions():
    assert LIBRARY["nets"][0] in program.modules(reached_through_globals)
    program.check(P.model, reached_through_globals, (X,))


def test_layers_that_cannot_be_found_are_refused():
    registry = type("Registry", (dict,), {})(vae=Normalized())
    lookup = {"many": {i: None for i in range(2000)} | {"vae": registry["vae"]}}

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", lookup["many"]["vae"].posterior(x))

    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        program.check(P.model, guide, (X,))
    registry["vae"].eval()
    program.check(P.model, guide, (X,))


def test_an_untouched_buffer_is_not_written_to():
    vae = Normalized()
    version = vae.net[1].running_mean._version
    program.check(P.model, vae.guide, (X,))
    assert vae.net[1].running_mean._version == version


def test_modules_run_on_their_own_parameters():
    one, two = PPCA(seed=1), PPCA(seed=2)  # both register under one name
    for vae in (one, two, one):
        log_w = weights(vae.model, vae.guide, X)
        torch.testing.assert_close(log_w.double(), vae.log_px(X).expand(3, -1), rtol=0, atol=2e-4)
    assert not pyro.get_param_store().keys()


def test_plain_functions_use_the_store():
    weights(plain_model, plain_guide, X)
    with torch.no_grad():
        pyro.get_param_store()["bias"].add_(1.0)
    log_w = weights(plain_model, closing_over(PPCA(width=1.5)), X, 20_000).double()
    truth = P.log_px(X - 1.0)
    ratio = (log_w - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(20_000)).all()


def test_state_names_all_live_tensors():
    both = program.Program(Normalized().model, plain_guide)
    tensors = program.state(both.model, both.guide, (X,))
    assert {"tril", "gain", "0.weight", "0.net.1.running_mean"} <= tensors.keys()
    assert tensors["tril"] is pyro.get_param_store()["tril"]
    assert both.model(X) is None
    assert list(both.owners) == [both.model.__self__]
    with pytest.raises(TypeError, match="guide must be a Pyro function, got int"):
        program.Program(plain_model, 3)


def test_store_kept_takes_out_what_is_new():
    pyro.param("mine", torch.ones(2))
    with program.store_kept():
        pyro.param("new", torch.ones(2))
    assert set(pyro.get_param_store().keys()) == {"mine"}


# Found by a reader: each gave a wrong number or forgot a parameter without a word.


def test_no_density_outside_the_support_of_a_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones(())))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.6))

    x = torch.ones(4000)
    with program.validation(False):
        log_w = program.log_weights(model, guide, (x,), 50)
    grid = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    joint = (-grid - (1 - grid).square() / 2).exp() / (2 * torch.pi) ** 0.5
    truth = torch.trapezoid(joint, grid)
    w = log_w.exp().double()
    assert (log_w == -torch.inf).any()
    assert abs(w.mean() - truth) < 4 * w.std() / w.numel() ** 0.5


class WithStray(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def model(self, x):
        scale = pyro.param("stray", torch.ones(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))


def test_a_parameter_of_the_store_in_a_method_is_refused():
    owner = WithStray()
    with pytest.raises(ValueError, match=r"pyro.param 'stray' .* would be forgotten"):
        program.check(owner.model, owner.guide, (torch.randn(5),))
