"""fit: what it learns, what it leaves behind, and what it leaves alone."""

import copy
import gc
import itertools
import math
import random
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

import pyrovae
from pyrovae import VAE, Program, data, guides, likelihoods, nets, objectives, priors, training
from pyrovae.data.preprocess import Preprocess
from pyrovae.data.split import dynamic_split
from pyrovae.training import SCHEDULES, NonFiniteLoss, Options

IMAGE = (1, 4, 4)
LIKELIHOODS = {
    "Bernoulli": (likelihoods.Bernoulli, lambda x: x.round()),
    "ContinuousBernoulli": (likelihoods.ContinuousBernoulli, lambda x: x),
    "Normal": (likelihoods.Normal, lambda x: 3 * x - 1),
    "Poisson": (likelihoods.Poisson, lambda x: (5 * x).round()),
}
NETS = {
    "MLP": nets.MLP((6,)),
    "MLP batch norm": nets.MLP((6,), batch_norm=True),
    "Conv": nets.Conv((3,), 6, activation="tanh"),
    "Conv batch norm": nets.Conv((3,), 6, activation="tanh", batch_norm=True),
}


def make_vae(likelihood="Bernoulli", net="MLP", seed=0):
    torch.manual_seed(seed)
    family, _ = LIKELIHOODS[likelihood]
    return VAE(
        priors.StandardNormal(2),
        family(IMAGE, 2, NETS[net]),
        guides.Normal(IMAGE, 2, NETS[net]),
    ).float()


def make_data(likelihood="Bernoulli", size=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return LIKELIHOODS[likelihood][1](torch.rand(size, *IMAGE, generator=generator))


def fit(vae, train, **options):
    given = {"epochs": 2, "batch_size": 10, "lr": 0.01, "progress": False, "accelerator": "cpu"}
    return pyrovae.fit(vae, train, **given | options)


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def differing(module, before):
    now = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def parameters(module):
    return {name for name, _ in module.named_parameters()}


# Everything learns, by either road.


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_parameter_moves_in_one_step(likelihood, net):
    x = make_data(likelihood)
    vae = make_vae(likelihood, net)
    vae.initialize(x)
    again = copy.deepcopy(vae)
    before = weights(vae)
    fit(vae, x, epochs=1, batch_size=20)
    assert parameters(vae) <= differing(vae, before)
    SVI(again.model, again.guide, Adam({"lr": 0.01}), loss=Trace_ELBO()).step(x)
    assert parameters(again) <= differing(again, before)


@pytest.mark.parametrize("road", ["fit", "svi", "svi with our objective"])
def test_two_vaes_trained_one_after_the_other_both_learn(road):
    x = make_data()
    for vae in (make_vae(seed=0), make_vae(seed=1)):
        before = weights(vae)
        if road == "fit":
            fit(vae, x)
        else:
            loss = Trace_ELBO() if road == "svi" else objectives.ELBO()
            SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=loss).step(x)
        assert parameters(vae) <= differing(vae, before)


def test_fit_and_svi_take_turns_on_one_vae():
    vae, x = make_vae(), make_data()
    for _ in range(2):
        for road in ("svi", "fit"):
            before = weights(vae)
            if road == "fit":
                fit(vae, x, epochs=1)
            else:
                SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=Trace_ELBO()).step(x)
            assert parameters(vae) <= differing(vae, before)


def plain_model(x):
    loc = pyro.param("loc", lambda: torch.randn(3))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + loc, scale).to_event(1), obs=x)


def plain_guide(x):
    weight = pyro.param("weight", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.7).to_event(1))


def test_plain_functions_keep_their_parameters_in_the_store():
    x = torch.randn(20, 3)
    store = pyro.get_param_store()
    fit(Program(plain_model, plain_guide), x, epochs=1, batch_size=20, lr=0.1, schedule="constant")
    first = {name: store[name].detach().clone() for name in store}
    assert set(first) == {"loc", "scale", "weight"}
    # Adam's first step is lr long: log(scale) and the weight have left their starts by 0.1.
    assert first["scale"].log().abs().min() == pytest.approx(0.1, rel=1e-3)
    assert abs(first["weight"].item() - 0.5) == pytest.approx(0.1, rel=1e-3)
    fit(Program(plain_model, plain_guide), x, epochs=1, batch_size=20, lr=0.1, schedule="constant")
    # It goes on from there, and not from their starts.
    assert (store["scale"] / first["scale"]).detach().log().abs().min() == pytest.approx(
        0.1, rel=1e-3
    )
    assert abs(store["weight"].item() - first["weight"].item()) == pytest.approx(0.1, rel=1e-3)


def test_the_seed_also_starts_parameters_that_functions_make():
    x, found = torch.randn(20, 3), []
    for caller_seed in (1, 2):
        pyro.clear_param_store()
        torch.manual_seed(caller_seed)
        fit(Program(plain_model, plain_guide), x, epochs=1, seed=5)
        found.append(pyro.param("loc").detach().clone())
    assert torch.equal(*found)


class Constrained(PyroModule):
    """A PyroModule whose noise is a constrained parameter."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.full((3,), 2.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, self.scale).to_event(1), obs=x)


class LinearGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.7).to_event(1))


@pytest.mark.parametrize("objective", [objectives.ELBO, Trace_ELBO])
def test_pyro_modules_train_one_after_the_other(objective):
    x = torch.randn(20, 3)
    for _ in range(2):  # under the same names in Pyro's store
        program = Program(Constrained(), LinearGuide())
        before = weights(program)
        fit(program, x, objective=objective())
        assert differing(program, before) == parameters(program)
        assert (program.model.scale > 0).all()
    assert not list(pyro.get_param_store())


def test_a_guide_of_ones_own_beside_a_model_of_ours():
    x, vae = make_data(), make_vae()
    encoder = nn.Linear(16, 4)

    def my_guide(x):
        pyro.module("my_encoder", encoder)
        loc, raw = encoder(x.flatten(1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    before, mine = weights(vae), weights(encoder)
    fit(Program(vae.model, my_guide), x)
    assert differing(encoder, mine) == {"weight", "bias"}
    moved = differing(vae, before)
    assert {n for n in moved if n.startswith("encoder")} == set()
    assert {n for n in parameters(vae) if n.startswith("likelihood")} <= moved


def test_frozen_parameters_stay_and_tied_ones_move_together():
    vae, x = make_vae(), make_data()
    vae.encoder.net.head.weight.requires_grad_(False)
    body = vae.encoder.net.body
    vae.likelihood.extra = body  # under two names
    before = weights(vae)
    fit(vae, x)
    moved = differing(vae, before)
    assert "encoder.net.head.weight" not in moved
    assert "likelihood.extra.1.weight" in moved
    assert vae.likelihood.extra[1].weight is vae.encoder.net.body[1].weight
    for p in vae.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(vae, x)


class Oddly(nn.Module):
    """Parameters whose gradients come transposed and expanded."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 5))
        self.shift = nn.Parameter(torch.zeros(4))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            mean = (self.kernel.T @ z.T).T + self.shift.sum()
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :3], 0.7).to_event(1))


def test_one_step_is_that_of_stock_svi_whatever_the_layout_of_gradients():
    x = torch.randn(20, 5)
    ours, theirs = Oddly(), Oddly()
    theirs.load_state_dict(ours.state_dict())

    class Recorded(objectives.ELBO):
        def surrogate(self, model, guide, args, kl_weight=1.0):
            self.batch = args
            torch.manual_seed(7)
            return super().surrogate(model, guide, args, kl_weight)

    recorded = Recorded()
    fit(ours, x, epochs=1, batch_size=20, schedule="constant", objective=recorded, lr=0.1)
    torch.manual_seed(7)
    Trace_ELBO().differentiable_loss(theirs.model, theirs.guide, *recorded.batch).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Adam's first step is -lr * sign(gradient).
        torch.testing.assert_close(one - other, -0.1 * other.grad.sign(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.grad * 20, other.grad, rtol=1e-4, atol=1e-4)


# The schedule of a run.


class Spy(objectives.ELBO):
    """The ELBO, noting what it is given."""

    def __init__(self):
        super().__init__()
        self.kl_weights, self.batches = [], []

    def surrogate(self, model, guide, args, kl_weight=1.0):
        if torch.is_grad_enabled():
            self.kl_weights.append(float(kl_weight))
            self.batches.append(args[0])
        return super().surrogate(model, guide, args, kl_weight)


def test_kl_warmup_rises_step_by_step():
    spy = Spy()
    history = fit(make_vae(), make_data(size=40), epochs=3, kl_warmup=2, objective=spy)
    steps = spy.kl_weights[1:]  # after the dry run
    assert steps == pytest.approx([t / 8 for t in range(1, 9)] + [1.0] * 4)
    assert [row["kl_weight"] for row in history] == pytest.approx([0.5, 1.0, 1.0])
    for row in history:
        assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "weights"), [(None, [1 / 3, 2 / 3] + [1.0] * 10), (Trace_ELBO(), [1.0] * 12)]
)
def test_a_quarter_of_the_epochs_warms_the_kl_up_by_default(objective, weights):
    history = fit(make_vae(), make_data(), epochs=12, objective=objective)
    assert [row["kl_weight"] for row in history] == pytest.approx(weights)


def test_schedule_reaches_the_optimizer(monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]) or step(self),
    )
    history = fit(make_vae(), make_data(), epochs=3, lr=0.5, schedule="cosine")
    expected = [0.5 * SCHEDULES["cosine"](t / 6) for t in range(6)]
    assert rates == pytest.approx(expected)
    assert [row["lr"] for row in history] == pytest.approx(expected[1::2])
    rates.clear()
    fit(make_vae(), make_data(), epochs=1, lr=0.5, schedule=lambda t: 1 - t)
    assert rates == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_peak_at_the_learning_rate_and_end_low_or_constant(name):
    values = [SCHEDULES[name](t / 1000) for t in range(1001)]
    assert max(values) == pytest.approx(1)
    assert all(0 <= value <= 1 for value in values)
    assert name == "constant" or values[-1] < 1e-3
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.01


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def spying(self):
        grads = [p.grad.flatten() for p in self.param_groups[0]["params"]]
        norms.append(torch.cat(grads).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spying)
    fit(make_vae(), make_data(), clip_norm=0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    norms.clear()
    fit(make_vae(), make_data())
    assert min(norms) > 0.02


def scripted(monkeypatch, scores):
    """Make validation give these ELBOs, one an epoch."""
    left = iter(scores)
    monkeypatch.setattr(
        "pyrovae.loop.Loop._validate", lambda self: self.valid and {"elbo": next(left)}
    )


@pytest.mark.parametrize(
    ("scores", "kl_warmup", "epochs", "best"),
    [
        ([-3, -2, -2.5, -2.6, 0], 0, 4, 2),
        ([-3, -2, -2, -2, 0], 0, 4, 2),
        ([-1, -3, -2, -4, -5, 0], 2, 5, 1),
        ([math.nan, -2, math.nan, -3, 0], 0, 4, 2),
        ([-3, -math.inf, -2, -4, -1, -1], 0, 6, 5),
    ],
)
def test_early_stopping_and_the_best_weights(monkeypatch, scores, kl_warmup, epochs, best):
    scripted(monkeypatch, scores)
    vae, snapshots = make_vae(), []
    history = fit(
        vae,
        make_data(),
        valid=make_data(),
        epochs=6,
        patience=2,
        kl_warmup=kl_warmup,
        on_epoch=lambda module, row: snapshots.append(weights(module)),
    )
    assert len(history) == len(snapshots) == epochs
    assert not differing(vae, snapshots[best - 1])
    assert differing(vae, snapshots[best - 2])


def test_validation_is_reported_and_changes_nothing_but_the_choice():
    snapshots = {True: [], False: []}
    for validated in snapshots:
        history = fit(
            make_vae(net="MLP batch norm"),
            make_data(),
            valid=make_data(seed=2) if validated else None,
            epochs=3,
            on_epoch=lambda module, row, v=validated: snapshots[v].append(weights(module)),
        )
        assert ("valid_elbo" in history[0]) == validated
    for one, other in zip(*snapshots.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_validation_elbo_is_that_of_the_weights_in_evaluation_mode():
    vae, valid, found = make_vae(net="MLP batch norm"), make_data(size=300, seed=2), []

    def on_epoch(module, row):
        torch.manual_seed(0)
        module.eval()
        found.append(pyrovae.elbo(module.model, module.guide, valid, 200).mean().item())
        module.train()

    history = fit(vae, make_data(), valid=valid, on_epoch=on_epoch)
    # One draw for each of 300 data, of spread below one nat: 0.06 is one standard error.
    for row, value in zip(history, found, strict=True):
        assert row["valid_elbo"] == pytest.approx(value, abs=0.25)
        assert row["valid_elbo"] == pytest.approx(row["valid_reconstruction"] - row["valid_kl"])


# Data of every form.


def test_data_of_every_form_give_the_same_weights():
    x = make_data()
    forms = {
        "tensor": x,
        "array": x.numpy(),
        "uint8": x.to(torch.uint8),
        "tuple": (x,),
        "split": data.as_split(x),
        "dataset": torch.utils.data.TensorDataset(x),
        "labelled": torch.utils.data.TensorDataset(x, torch.arange(len(x))),
    }
    found = {}
    for name, form in forms.items():
        vae = make_vae()
        fit(vae, form, valid=form)
        found[name] = weights(vae)
    for name, value in found.items():
        torch.testing.assert_close(value, found["tensor"], rtol=0, atol=0, msg=name)


def test_two_tensors_are_two_arguments():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def model(self, x, c):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + self.w * c, 1.0).to_event(1), obs=x)

        def guide(self, x, c):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.5 * (x - self.w * c), 0.7).to_event(1))

    c = torch.randn(200, 3)
    x = torch.tensor([1.0, -2.0, 0.5]) * c + torch.randn(200, 3)
    program = Regression()
    fit(program, (x, c), epochs=60, batch_size=50, lr=0.05)
    # The weights of a regression with noise sqrt(2) on 200 data: 0.1 is one standard error.
    assert (program.w - torch.tensor([1.0, -2.0, 0.5])).abs().max() < 0.4


def test_a_ragged_last_batch_waits_and_each_epoch_has_an_order_of_its_own():
    spy = Spy()
    x = torch.arange(23.0)[:, None].expand(23, 16).reshape(23, *IMAGE) / 23
    fit(make_vae("Normal"), x, epochs=2, objective=spy)
    sizes = [len(batch) for batch in spy.batches[1:]]
    assert sizes == [10] * 4
    rows = [(23 * torch.cat(spy.batches[i : i + 2])[:, 0, 0, 0]).round().tolist() for i in (1, 3)]
    assert all(len(set(epoch)) == 20 for epoch in rows)
    assert rows[0] != rows[1]


def test_a_batch_larger_than_the_data_is_all_of_them():
    spy = Spy()
    fit(make_vae(), make_data(size=7), batch_size=100, objective=spy)
    assert [len(batch) for batch in spy.batches] == [7] * 3


def test_binarization_is_drawn_afresh_in_every_epoch():
    grey = torch.full((8, *IMAGE), 128, dtype=torch.uint8)
    preprocess = Preprocess("grey", IMAGE, 255.0, binarize="dynamic")
    spy = Spy()
    split = dynamic_split(grey, None, "train", preprocess, "grey")
    fit(make_vae(), split, batch_size=8, epochs=3, objective=spy)
    seen = spy.batches[1:]
    assert all(set(batch.unique().tolist()) == {0.0, 1.0} for batch in seen)
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# What is left alone, and what is left behind.


def test_a_seed_fixes_the_weights_bit_for_bit():
    found = []
    for seed, caller in ((3, 1), (3, 2), (4, 1)):
        vae = make_vae()
        torch.manual_seed(caller)
        fit(vae, make_data(), seed=seed)
        found.append(weights(vae))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not any(torch.equal(found[0][n], found[2][n]) for n in parameters(make_vae()))


@pytest.mark.parametrize("pyros", [True, False])
@pytest.mark.parametrize("torchs", [True, False])
def test_random_states_switches_and_modes_come_back(pyros, torchs):
    validation = torch.distributions.Distribution
    before = validation._validate_args
    vae = make_vae(net="MLP batch norm")
    vae.encoder.eval()
    modes = [m.training for m in vae.modules()]
    try:
        with pyro.validation_enabled(pyros):
            validation.set_default_validate_args(torchs)
            random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
            states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
            fit(vae, make_data(), valid=make_data())
            assert random.getstate() == states[0]
            assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
            assert torch.equal(torch.get_rng_state(), states[2])
            assert validation._validate_args == torchs
            assert pyro.infer.util.is_validation_enabled() == pyros
            assert pyro.poutine.util.is_validation_enabled() == pyros
    finally:
        validation.set_default_validate_args(before)
    assert [m.training for m in vae.modules()] == modes
    assert nets.autocast.get() is nets.nullcontext


def test_batch_statistics_move_with_training_steps_alone():
    x, vae = make_data(size=30), make_vae(net="MLP batch norm")
    fit(vae, x, valid=x, epochs=1, schedule=lambda t: 1e-9)
    norm = next(m for m in vae.encoder.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.num_batches_tracked == 3
    hidden = vae.encoder.net.body[1](x.flatten(1))
    # Three steps of momentum 0.1 from zero towards the mean of batches that cover the data.
    expected = (1 - 0.9**3) * hidden.mean(0)
    assert (norm.running_mean - expected).abs().max() < 0.05
    assert norm.running_mean.abs().max() > 0.05


def test_weights_start_at_the_data_once():
    calls = []

    class Watched(VAE):
        def initialize(self, x):
            calls.append(x)
            super().initialize(x)

    torch.manual_seed(0)
    net = NETS["MLP"]
    parts = likelihoods.Bernoulli(IMAGE, 2, net), guides.Normal(IMAGE, 2, net)
    vae = Watched(priors.StandardNormal(2), *parts).float()
    x = make_data()
    fit(vae, (x,), epochs=1, schedule=lambda t: 1e-9)
    assert len(calls) == 1
    mean = vae.likelihood.net.bias.sigmoid()
    torch.testing.assert_close(mean, x.mean(0).clamp(0.001, 0.999), rtol=1e-4, atol=1e-4)
    after = weights(vae)
    fit(vae, 1 - x, epochs=1, schedule=lambda t: 1e-9)
    torch.testing.assert_close(weights(vae), after, rtol=1e-5, atol=1e-5)


def test_a_second_fit_goes_on_from_the_weights():
    vae, x = make_vae(), make_data(size=100)
    first = fit(vae, x, epochs=20)
    second = fit(vae, x, epochs=1, seed=1, schedule=lambda t: 1e-9)
    assert first[-1]["elbo"] - first[0]["elbo"] > 0.5
    # 100 data, each off by about a nat.
    assert second[0]["elbo"] == pytest.approx(first[-1]["elbo"], abs=0.5)


def test_rows_say_what_happened():
    history = fit(make_vae(), make_data(), valid=make_data())
    terms = ["elbo", "reconstruction", "kl"]
    valid = [*(f"valid_{n}" for n in terms), "valid_active_units"]
    names = ["epoch", *terms, *valid, "lr", "kl_weight", "seconds"]
    assert [list(row) for row in history] == [names] * 2
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(isinstance(value, (int, float)) for row in history for value in row.values())


def test_report_is_in_nats_per_datum():
    spy = Spy()
    vae, x = make_vae(), make_data(size=200)
    (row,) = fit(vae, x, epochs=1, batch_size=50, schedule=lambda t: 1e-9, objective=spy)
    value = pyrovae.elbo(vae.model, vae.guide, x, 100).mean().item()
    # 200 draws of spread below one nat: 0.07 is one standard error.
    assert row["elbo"] == pytest.approx(value, abs=0.28)


def test_the_bar_shows_the_elbo_and_its_terms(capfd):
    fit(make_vae(), make_data(), progress=True, valid=make_data())
    shown = capfd.readouterr().err
    for name in ("epoch=2/2", "elbo=", "reconstruction=", "kl=", "valid_elbo="):
        assert name in shown


def test_graphs_do_not_pile_up():
    kept = []

    class Leaky(objectives.ELBO):
        def surrogate(self, *args, **kwargs):
            loss, terms = super().surrogate(*args, **kwargs)
            if torch.is_grad_enabled():
                kept.append(weakref.ref(loss))
            return loss, terms | {"extra": loss}  # not detached

    alive = []

    def on_epoch(module, row):
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))

    fit(make_vae(), make_data(), epochs=3, objective=Leaky(), on_epoch=on_epoch)
    assert alive == [0, 0, 0]


# bf16.


def test_bf16_keeps_densities_and_last_layers_in_float32():
    seen = {}

    class Watched(objectives.ELBO):
        def surrogate(self, model, guide, args, kl_weight=1.0):
            with torch.random.fork_rng():
                drawn = pyrovae.program.draw(guide, args)
            scores = pyrovae.program.score_sites(model, args, drawn.values)
            every = (*drawn.scores.values(), *scores.values())
            seen["densities"] = {score.log_prob.dtype for score in every}
            return super().surrogate(model, guide, args, kl_weight)

    def watch(name, part):
        # Validation and dry checks run in float32: only what is differentiated counts.
        part.register_forward_hook(
            lambda _, __, out: seen.update({name: out.dtype}) if torch.is_grad_enabled() else None
        )

    vae, x = make_vae("Normal"), make_data("Normal")
    watch("hidden", vae.likelihood.net.body[1])
    watch("last", vae.likelihood.net.head)
    rows = {}
    for precision in ("bf16-mixed", "32-true"):
        (rows[precision],) = fit(
            copy.deepcopy(vae),
            x,
            epochs=1,
            batch_size=20,
            precision=precision,
            objective=Watched() if precision == "bf16-mixed" else None,
        )
        if precision == "bf16-mixed":
            assert seen == {
                "hidden": torch.bfloat16,
                "last": torch.float32,
                "densities": {torch.float32},
            }
    # bfloat16 has 8 bits: hidden units of size one are off by 0.004, and so is each of 16 means.
    assert rows["bf16-mixed"]["elbo"] == pytest.approx(rows["32-true"]["elbo"], abs=0.1)


# What goes wrong.


class Sharp(nn.Module):
    """A density that overflows on large data, through a loss that is finite on others."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 3), 1.0).to_event(1))


def test_a_loss_that_is_not_finite_names_epoch_step_and_site():
    x = torch.randn(40, 3)
    x[17] = 1e30
    program, start = Sharp(), torch.zeros(3)
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step \d: site 'x' of the model") as raised:
        fit(program, x)
    assert "\n" not in str(raised.value)
    assert torch.equal(program.loc, start)


class Poisoned(objectives.ELBO):
    """Turns infinite at one step (the dry run is step 0), in value or in gradient alone."""

    def __init__(self, at, gradient_only=False):
        super().__init__()
        self.at, self.gradient_only, self.count = at, gradient_only, -1

    def surrogate(self, *args, **kwargs):
        loss, terms = super().surrogate(*args, **kwargs)
        if torch.is_grad_enabled():
            self.count += 1
        if self.count == self.at:
            loss = loss + (loss - loss).sqrt() if self.gradient_only else loss * math.inf
        return loss, terms


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize(
    ("gradient_only", "step", "cause"),
    [(False, 1, "no site"), (True, 2, "a step left .* not finite"), (True, 3, "a step left")],
)
def test_an_error_leaves_the_last_good_weights(valid, gradient_only, step, cause):
    """Two epochs of three steps are good; the third is not."""
    vae, x, snapshots = make_vae(), make_data(size=30), []
    # A gradient that is not finite shows in the next step, or at the end of the epoch.
    at = 6 + (step if not gradient_only else min(step - 1, 2) if step == 2 else 3)
    where = f"epoch 3, step {step}: {cause}"
    with pytest.raises(NonFiniteLoss, match=where):
        fit(
            vae,
            x,
            valid=x if valid else None,
            epochs=4,
            objective=Poisoned(at, gradient_only),
            on_epoch=lambda module, row: snapshots.append((row, weights(module))),
        )
    assert len(snapshots) == 2
    best = max(snapshots, key=lambda s: s[0]["valid_elbo"]) if valid else snapshots[-1]
    assert not differing(vae, best[1])


def test_ctrl_c_leaves_the_weights_of_the_last_whole_epoch():
    class Interrupted(objectives.ELBO):
        count = 0

        def surrogate(self, *args, **kwargs):
            self.count += 1
            if self.count == 7:  # the dry run, two epochs of two steps, one step more
                raise KeyboardInterrupt
            return super().surrogate(*args, **kwargs)

    vae, snapshots = make_vae(), []
    with pytest.raises(KeyboardInterrupt):
        fit(
            vae,
            make_data(),
            epochs=5,
            objective=Interrupted(),
            on_epoch=lambda module, row: snapshots.append(weights(module)),
        )
    assert len(snapshots) == 2
    assert not differing(vae, snapshots[-1])


def test_errors_of_on_epoch_come_through():
    def on_epoch(module, row):
        raise RuntimeError("of the caller's own")

    with pytest.raises(RuntimeError, match="of the caller's own"):
        fit(make_vae(), make_data(), on_epoch=on_epoch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number, at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"clip_norm": -1.0}, "clip_norm must be"),
        ({"patience": 0}, "patience must be"),
        ({"patience": 1}, "patience needs validation data"),
        ({"kl_warmup": -1}, "kl_warmup must be"),
        ({"seed": -1}, "seed must be"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, one-cycle"),
        ({"schedule": 3}, "schedule must be one of"),
        ({"precision": "16"}, "precision must be one of"),
        ({"accelerator": "abacus"}, "accelerator 'abacus' is not to be had"),
        ({"resume": True}, "resume needs the checkpoint"),
        ({"checkpoint": "nowhere/at/all"}, "there is no folder nowhere/at"),
        ({"kl_warmup": 1, "objective": Trace_ELBO()}, "kl_warmup needs an objective of pyrovae"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        fit(make_vae(), make_data(), **options)
    assert "\n" not in str(raised.value)


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match=r"fit takes a module with .model and .guide, got Linear"):
        fit(nn.Linear(2, 2), make_data())
    with pytest.raises(TypeError, match="objective must be a Pyro ELBO"):
        fit(make_vae(), make_data(), objective=Trace_ELBO)


def test_data_outside_the_support_are_refused_and_nothing_moves():
    vae, x = make_vae(), make_data()
    x[19, 0, 0, 0] = 0.5
    before = weights(vae)
    for options in ({"train": x}, {"train": make_data(), "valid": x}):
        with pytest.raises(ValueError, match=r"outside the support.*'x' range from 0 to 1"):
            fit(vae, **options)
    assert not differing(vae, before)


def test_options_and_checks_are_where_they_are_looked_for():
    assert Options is training.Options
    assert {"fit", "check_data", "functions", "NonFiniteLoss"} <= set(training.__all__)


def test_support_is_checked_behind_missing_entries():
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli((4,), 2),
        guides.Normal((4,), 2),
        missing=True,
    )
    x = torch.ones(200, 4)
    x[100:] = 0.5
    with pytest.raises(ValueError, match=r"fails on data 0 to 199: .*support"):
        fit(vae, x, epochs=1, progress=False)


def test_a_support_of_its_own_for_each_row_is_checked_on_all_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=z.expand(-1, 3)).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.full((20, 3), 5.0)
    assert len(fit(Program(model, guide), x, epochs=1, progress=False)) == 1
    x[19, 0] = 17
    with pytest.raises(ValueError, match=r"fails on data 0 to 19: .*support"):
        fit(Program(model, guide), x, epochs=1, progress=False)


def test_a_module_that_nobody_registered_is_named():
    decoder = torch.nn.Linear(1, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.warns(UserWarning, match="Linear that model or guide uses is not trained"):
        fit(Program(model, guide), torch.randn(20, 3), epochs=1, progress=False)
    before = decoder.weight.clone()
    assert torch.equal(decoder.weight, before)


@pytest.mark.parametrize("objective", [pyro.infer.RenyiELBO(), pyro.infer.TraceGraph_ELBO()])
def test_objectives_without_a_differentiable_loss_are_refused(objective):
    with pytest.raises(TypeError, match="has no differentiable loss: take one of"):
        fit(make_vae(), make_data(), objective=objective, progress=False)
