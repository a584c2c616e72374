"""Long estimates: stopped and started again they come to the same, and say what they cost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pyrovae import cli, evidence
from pyrovae.checkpoint import write_tensors
from pyrovae.evidence import cost, keep
from pyrovae.evidence.result import PER_DATUM

METHODS = {
    "importance": evidence.Importance(),
    "defensive": evidence.Importance(defensive=0.2),
    "sobol": evidence.Importance(sobol=True),
    "adaptive": evidence.Importance(target_std_error=0.05),
    "annealed": evidence.Annealed(num_distributions=3, num_leapfrog=2),
    "adapted": evidence.Annealed(num_distributions=3, num_leapfrog=2, schedule="adapted"),
    "prior": evidence.Annealed(num_distributions=3, num_leapfrog=2, start="prior"),
}
X = torch.tensor(np.random.default_rng(0).normal(size=(10, 2)))
KEPT = "log_px.partial"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "MEASURED", 0.01)


class Linear(torch.nn.Module):
    """Two latents in a chain, with a guide that is off; stops at a datum if told to."""

    stop_at = None

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.shift = 0.0

    def model(self, x):
        if self.stop_at is not None and (x - X[self.stop_at]).norm(dim=1).min() < 1e-5:
            raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            u = pyro.sample("u", dist.Normal(z + self.shift, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(u, self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 3, self.scale.detach()).to_event(1))
            pyro.sample("u", dist.Normal((x + z) / 2, 0.6).to_event(1))


def estimate(linear, name="importance", x=X, **more):
    settings = {"seed": 3, "block_size": 4, "num_particles": 40, "method": METHODS[name]}
    return evidence.log_px(linear.model, linear.guide, x, **{**settings, **more})


def assert_equal(found, expected):
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name in PER_DATUM:
            assert one.dtype == other.dtype
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), field.name
        else:
            assert one == pytest.approx(other, nan_ok=True) or one == other, field.name


SLOW = ("adapted", "prior")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in METHODS]
)
def test_blocks_kept_and_blocks_new_come_to_the_same(name):
    """Which of them ran first, in which process, changes nothing."""
    whole = estimate(Linear(), name)
    estimate(Linear(), name, keep=KEPT, blocks=[2])
    assert_equal(estimate(Linear(), name, keep=KEPT), whole)


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_an_interrupted_run_goes_on(dtype):
    how = {"dtype": dtype, "block_size": 2}
    whole = estimate(Linear(), **how)
    stopped, told = Linear(), []
    for datum in (7, 9):  # of the first seven programs are tried
        stopped.stop_at = datum
        with pytest.raises(KeyboardInterrupt):
            estimate(stopped, keep=KEPT, **how)
    stopped.stop_at = 7  # which is done
    assert_equal(estimate(stopped, keep=KEPT, announce=told.append, **how), whole)
    assert told[0].num_left == 2


def test_a_bracket_is_kept():
    def bracket(linear, **more):
        how = {"num_data": 6, "seed": 1, "num_particles": 400, "method": METHODS["annealed"]}
        return evidence.validate(linear.model, linear.guide, X, **how, **more)

    told = []
    whole = bracket(Linear(), keep=KEPT)
    again = bracket(Linear(), keep=KEPT, announce=told.append)
    assert told[0].num_left == 0
    assert_equal(again.lower, whole.lower)
    assert torch.equal(again.upper, whole.upper)
    assert torch.equal(again.upper_std_error, whole.upper_std_error)


def other_weights(linear):
    linear.scale.data.add_(0.1)


def other_program(linear):
    linear.shift = 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "seed$"),
        ({"num_particles": 41}, "number of particles$"),
        ({"block_size": 5}, "size of a block$"),
        ({"dtype": torch.float32}, "precision, data, weights$"),
        ({"x": X + 1}, "data, program$"),
        ({"x": X[:9]}, "data$"),
        ({"compile": True}, "compile$"),
        ({"name": "adaptive"}, "method$"),
        ({"method": evidence.Importance(target_std_error=0.1)}, "method$"),
        (other_weights, "weights, program$"),
        (other_program, "program$"),
    ],
)
def test_a_file_of_another_estimate_is_refused(change, words):
    linear = Linear()
    estimate(linear, keep=KEPT)
    before = Path(KEPT).read_bytes()
    if callable(change):
        change(linear)
        change = {}
    with pytest.raises(
        keep.OtherEstimate, match=f"{KEPT} is part of an estimate with other {words}"
    ):
        estimate(linear, keep=KEPT, **change)
    assert Path(KEPT).read_bytes() == before


def test_a_file_is_refused_that_is_damaged_or_of_another_kind():
    estimate(Linear(), keep=KEPT)
    whole = Path(KEPT).read_bytes()
    Path(KEPT).write_bytes(whole[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        estimate(Linear(), keep=KEPT)
    write_tensors(KEPT, {"x": X}, {})
    with pytest.raises(ValueError, match="is no part of an estimate"):
        estimate(Linear(), keep=KEPT)
    with pytest.raises(ValueError, match="keep needs a seed"):
        estimate(Linear(), keep=KEPT, seed=None)


def test_the_weights_of_plain_functions_are_looked_at():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        unused = pyro.param("unused", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0 * unused, 0.7).to_event(1))

    guide(X)
    evidence.log_px(model, guide, X, 10, seed=0, keep=KEPT)
    evidence.log_px(model, guide, X, 10, seed=0, keep=KEPT)
    pyro.param("unused").data.add_(1)
    with pytest.raises(keep.OtherEstimate, match="other weights"):
        evidence.log_px(model, guide, X, 10, seed=0, keep=KEPT)


def test_blocks_are_written_every_few_seconds_and_at_the_end(monkeypatch):
    writes = []
    write = keep.Kept._write
    monkeypatch.setattr(
        keep.Kept, "_write", lambda kept: (writes.append(len(kept.found)), write(kept))
    )
    estimate(Linear(), keep=KEPT)
    assert writes == [3]
    Path(KEPT).unlink()
    monkeypatch.setattr(keep, "EVERY", 0.0)
    estimate(Linear(), keep=KEPT)
    assert writes == [3, 1, 2, 3]
    estimate(Linear(), keep=KEPT)
    assert writes == [3, 1, 2, 3]  # nothing new


# Cost ---------------------------------------------------------------------------------------------


def test_a_forecast_in_words():
    told = cost.Forecast(1000, 1000, 2000, "gradients", 130.2)
    assert str(told) == "1,000 data x 2,000 gradients = 2 million: about 2 min 10 s"
    told = dataclasses.replace(told, num_left=600, each=50_000, seconds=3600.0)
    assert str(told) == (
        "400 of 1,000 data are done already. 600 data x 50,000 gradients = 30 million: about 1 "
        "h uncompiled"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.01, "1 s"), (59, "59 s"), (60, "1 min"), (3725, "1 h 2 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, words):
    assert cost._duration(seconds) == words


@pytest.mark.parametrize(
    ("name", "each"),
    [("importance", 40), ("adaptive", 4000), ("annealed", 40 * 2 * (10 + 3 + 2))],
)
def test_the_work_of_a_datum(name, each):
    told = []
    estimate(Linear(), name, announce=told.append)
    assert (told[0].num_data, told[0].each) == (10, each)
    assert told[0].unit.endswith("at most") == (name == "adaptive")
    assert told[0].seconds > 0


def test_gradients_are_counted_as_they_are_taken(monkeypatch):
    """But for the few at which chains start."""
    rows = []
    evaluate = evidence.target.Target.at

    def counted(target, args):
        found = evaluate(target, args)
        return lambda u: (rows.append(len(u)), found(u))[1]

    monkeypatch.setattr("pyrovae.evidence.target.Target.at", counted)
    method = METHODS["annealed"]
    estimate(Linear(), "annealed", block_size=5)
    assert sum(rows) == 10 * (method.work(40) + 2 * 40)


def test_a_method_that_does_not_know_its_work_says_nothing():
    class Own(evidence.Importance):
        def work(self, num_particles, ways=1):
            return 0

    told = []
    estimate(Linear(), method=Own(), announce=told.append)
    assert told == []


def test_a_trial_changes_nothing():
    state = torch.get_rng_state()
    told = []
    assert_equal(estimate(Linear(), announce=told.append), estimate(Linear()))
    assert torch.equal(torch.get_rng_state(), state)


# The command --------------------------------------------------------------------------------------


def start(*words, devices=1):
    root = str(Path(pyrovae.__file__).parent.parent)
    command = [sys.executable, "-m", "pyrovae.cli", *words, "--accelerator", "cpu"]
    return subprocess.Popen(
        [*command, "--devices", str(devices)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(file, process):
    deadline = time.monotonic() + 60
    while not Path(file).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    """Killed, then interrupted in two processes: the same numbers as without, to the last bit."""
    run = tmp_path / "run"
    settings = ("--epochs", "2", "--num-particles", "3", "--net.hidden", "400,400")
    assert cli.main(["train", *settings, "--out", str(run)]) == 0
    words = ("log-px", str(run), "--num-particles", "12000")
    kept = run / "log_px.partial"
    with start(*words) as killed:
        wait_for(kept, killed)
        os.killpg(killed.pid, signal.SIGKILL)
    with start(*words, devices=2) as stopped:
        assert "of 300 data are done already. " in stopped.stdout.readline()
        time.sleep(3)  # a block in each
        os.killpg(stopped.pid, signal.SIGINT)
        err = stopped.stderr.read()
    assert "Stopped. The same command goes on from here.\n" in err
    assert "Traceback" not in err
    assert len(keep.files(kept)) == 2  # each process keeps what it did
    again = start(*words)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "data are done already. " in out
    assert keep.files(kept) == []
    found = (run / "log_px.csv").read_bytes()
    assert start(*words).communicate(timeout=240)[1] == ""
    assert (run / "log_px.csv").read_bytes() == found
    assert json.loads((run / "log_px.json").read_text())["num_data"] == 300
