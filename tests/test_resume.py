"""A run that was killed ends where one that was not does."""

import json
import multiprocessing
import os
import random
import signal
import time

import pyro
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyrovae
from pyrovae import VAE, guides, likelihoods, loop, nets, objectives, priors
from pyrovae.checkpoint import Checkpoint
from pyrovae.data.preprocess import Preprocess
from pyrovae.data.split import dynamic_split

IMAGE = (1, 4, 4)


@pytest.fixture(autouse=True)
def _saved_after_every_epoch(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)


def make_vae(hidden=6, seed=0):
    torch.manual_seed(seed)
    net = nets.MLP((hidden,), batch_norm=True)
    parts = likelihoods.Bernoulli(IMAGE, 2, net), guides.Normal(IMAGE, 2, net)
    return VAE(priors.StandardNormal(2), *parts).float()


def make_data(size=40, name="train"):
    generator = torch.Generator().manual_seed(size)
    grey = torch.randint(0, 256, (size, *IMAGE), dtype=torch.uint8, generator=generator)
    preprocess = Preprocess("grey", IMAGE, 255.0, binarize="dynamic")
    return dynamic_split(grey, None, name, preprocess, "grey")


def fit(vae, path=None, **options):
    given = {
        "valid": make_data(30),
        "epochs": 6,
        "batch_size": 10,
        "lr": 0.02,
        "kl_warmup": 2,
        "progress": False,
        "accelerator": "cpu",
        "checkpoint": path,
    }
    return pyrovae.fit(vae, make_data(), **given | options)


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def told(history):
    """The rows without their times."""
    return [{n: v for n, v in row.items() if n != "seconds"} for row in history]


def stop_after(epochs):
    def on_epoch(vae, row):
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"valid": None}, {"patience": 2, "lr": 0.5}], ids=str)
def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(tmp_path, epochs, options):
    whole, broken = make_vae(), make_vae()
    history = fit(whole, **options)
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(broken, path, on_epoch=stop_after(epochs), **options)
    resumed, seen = make_vae(seed=9), []
    again = fit(
        resumed, path, resume=True, on_epoch=lambda _, row: seen.append(row["epoch"]), **options
    )
    assert_same(whole, resumed)
    assert told(again) == told(history)
    assert seen == [row["epoch"] for row in history[epochs - 1 :]]  # none is left out


def test_the_best_weights_are_remembered_across_a_stop(tmp_path, monkeypatch):
    scores = [-3.0, -1.0, -2.0, -2.5, -4.0, -5.0]
    monkeypatch.setattr(
        loop.Loop, "_validate", lambda self: self.valid and {"elbo": scores[len(self.history)]}
    )
    path, snapshots = tmp_path / "t", []

    def on_epoch(vae, row):
        snapshots.append({name: t.clone() for name, t in vae.state_dict().items()})
        if len(snapshots) == 4:
            raise KeyboardInterrupt

    broken, resumed = make_vae(), make_vae(seed=9)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, path, on_epoch=on_epoch)
    fit(resumed, path, resume=True)
    for vae in (broken, resumed):
        assert all(torch.equal(t, snapshots[1][name]) for name, t in vae.state_dict().items())


def test_a_finished_run_is_resumed_without_a_step(tmp_path):
    path, vae = tmp_path / "t", make_vae()
    history = fit(vae, path)
    resumed = make_vae(seed=9)
    assert told(fit(resumed, path, resume=True)) == told(history)
    assert_same(vae, resumed)


def test_a_run_killed_before_its_first_epoch_starts_its_weights_at_the_data_once(tmp_path):
    class Scaled(VAE):
        def initialize(self, x):
            with torch.no_grad():
                self.likelihood.net.bias.add_(1)  # twice is not once

    def make():
        torch.manual_seed(0)
        net = nets.MLP((6,))
        parts = likelihoods.Bernoulli(IMAGE, 2, net), guides.Normal(IMAGE, 2, net)
        return Scaled(priors.StandardNormal(2), *parts).float()

    class Interrupted(objectives.ELBO):
        count = 0

        def surrogate(self, *args, **kwargs):
            self.count += 1
            if self.count > 1 and self.armed:
                raise KeyboardInterrupt
            return super().surrogate(*args, **kwargs)

    path, whole, resumed = tmp_path / "t", make(), make()
    Interrupted.armed = False
    fit(whole, objective=Interrupted())
    Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        fit(make(), path, objective=Interrupted())
    Interrupted.armed = False
    fit(resumed, path, resume=True, objective=Interrupted())
    assert_same(whole, resumed)


def test_ctrl_c_in_an_epoch_leaves_the_best_weights_and_the_checkpoint_before_it(tmp_path):
    path, vae, snapshots = tmp_path / "t", make_vae(), []

    class Interrupted(objectives.ELBO):
        count = 0

        def surrogate(self, *args, **kwargs):
            Interrupted.count += 1
            if Interrupted.count == 15:  # the dry run, three epochs of four steps, one step more
                raise KeyboardInterrupt
            return super().surrogate(*args, **kwargs)

    def on_epoch(module, row):
        state = {n: t.clone() for n, t in module.state_dict().items()}
        snapshots.append((row["valid_elbo"], state))

    with pytest.raises(KeyboardInterrupt):
        fit(vae, path, objective=Interrupted(), on_epoch=on_epoch)
    saved = json.loads(_metadata(path))
    assert [row["epoch"] for row in saved["history"]] == [1, 2, 3]
    best = max(snapshots, key=lambda pair: pair[0])[1]
    assert all(torch.equal(tensor, best[name]) for name, tensor in vae.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    class Poisoned(objectives.ELBO):
        count = 0

        def surrogate(self, *args, **kwargs):
            Poisoned.count += 1
            loss, terms = super().surrogate(*args, **kwargs)
            return (loss * float("nan") if Poisoned.count == 12 else loss), terms

    path = tmp_path / "t"
    with pytest.raises(pyrovae.NonFiniteLoss, match="epoch 3, step 3"):
        fit(make_vae(), path, objective=Poisoned())
    assert len(json.loads(_metadata(path))["history"]) == 2
    assert all(t.isfinite().all() for t in load_file(path).values())
    whole, resumed = make_vae(), make_vae(seed=9)
    Poisoned.count = 100
    fit(whole, objective=Poisoned())
    fit(resumed, path, objective=Poisoned(), resume=True)
    assert_same(whole, resumed)


def test_adams_state_survives_bit_for_bit(tmp_path):
    path = tmp_path / "t"
    fit(make_vae(), path)
    saved = load_file(path)
    steps = [t for name, t in saved.items() if name.endswith(".step")]
    assert {t.item() for t in steps} == {24.0}
    assert {t.dtype for t in steps} == {torch.float32}
    assert not list(tmp_path.glob(".*"))


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["training"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, r"other settings: lr 0.02 \(now 0.5\)"),
        ({"seed": 3}, r"seed 0 \(now 3\)"),
        ({"objective": objectives.ELBO(beta=2.0)}, "other settings: objective"),
        ({"objective": pyro.infer.Trace_ELBO(), "kl_warmup": 0}, "other settings: "),
        ({"valid": None}, r"valid 30 \(now None\)"),
        ({"valid": make_data(31)}, r"valid 30 \(now 31\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, options, message):
    fit(make_vae(), tmp_path / "t", epochs=1, kl_warmup=0)
    with pytest.raises(ValueError, match=message) as raised:
        fit(make_vae(), tmp_path / "t", resume=True, **{"epochs": 1, "kl_warmup": 0} | options)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_other_frozen_parameters_is_refused(tmp_path):
    fit(make_vae(), tmp_path / "t", epochs=1)
    vae = make_vae()
    vae.encoder.net.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained \d+ \(now \d+\)"):
        fit(vae, tmp_path / "t", epochs=1, resume=True)


@pytest.mark.parametrize("hidden", [(7,), (6, 6)], ids=str)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_moves(tmp_path, hidden):
    fit(make_vae(), tmp_path / "t", epochs=1)
    net = nets.MLP(hidden, batch_norm=True)
    parts = likelihoods.Bernoulli(IMAGE, 2, net), guides.Normal(IMAGE, 2, net)
    other = VAE(priors.StandardNormal(2), *parts)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"of another model|of a run with other settings: trained"
    ) as raised:
        fit(other, tmp_path / "t", epochs=1, resume=True)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 100, 2000, -1])
def test_a_checkpoint_cut_short_is_refused(tmp_path, size):
    path = tmp_path / "t"
    fit(make_vae(), path, epochs=1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or cut short") as raised:
        fit(make_vae(), path, epochs=1, resume=True)
    assert "\n" not in str(raised.value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        fit(make_vae(), tmp_path / "t", resume=True)
    save_file({"w": torch.zeros(2)}, tmp_path / "w")
    with pytest.raises(ValueError, match="is not a checkpoint of training"):
        fit(make_vae(), tmp_path / "w", resume=True)
    with pytest.raises(ValueError, match="damaged"):
        fit(make_vae(), tmp_path, resume=True)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t"
    state = Checkpoint({}, [], False, {"w": torch.ones(2)})
    state.save(path)
    good = path.read_bytes()

    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("pyrovae.checkpoint.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        state.save(path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def train_in_child(path, compile, result=None):
    """A run of some seconds, from its checkpoint if there is one."""
    torch.set_num_threads(1)
    loop.SAVE_SECONDS = 0
    vae = make_vae()
    fit(vae, path, epochs=120, kl_warmup=20, compile=compile, resume=path.exists())
    if result:
        torch.save(vae.state_dict(), result)


def kill_and_resume(tmp_path, compile, kills, window):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyrovae"])
    path, moments, unfinished = tmp_path / "t", random.Random(0), 0
    for _ in range(kills):
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = context.Process(target=train_in_child, args=(path, compile))
        child.start()
        deadline = time.monotonic() + 120
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
            if not child.is_alive():
                break
        time.sleep(moments.uniform(0, window))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        unfinished += child.exitcode == -signal.SIGKILL
    assert unfinished >= 2
    assert len(json.loads(_metadata(path))["history"]) < 120
    states = []
    for name, where in (("resumed", path), ("whole", tmp_path / "other")):
        child = context.Process(target=train_in_child, args=(where, compile, tmp_path / name))
        child.start()
        child.join()
        assert child.exitcode == 0
        states.append(torch.load(tmp_path / name, weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_where_one_that_was_not_does(tmp_path):
    kill_and_resume(tmp_path, compile=False, kills=3, window=0.25)


@pytest.mark.slow
def test_a_compiled_run_killed_at_any_moment_ends_where_one_that_was_not_does(tmp_path):
    kill_and_resume(tmp_path, compile=True, kills=4, window=0.15)
