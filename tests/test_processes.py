"""Two processes give what one does, write once, and end together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

GROUP = Path(__file__).parent / "group.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(command):
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)


def pyrovae(*words, devices):
    command = [sys.executable, "-m", "pyrovae.cli", *words]
    done = launch([*command, "--accelerator", "cpu", "--devices", str(devices)])
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What groups of one and two processes come to."""
    folder = tmp_path_factory.mktemp("found")
    for size in (1, 2):
        done = launch([*TORCHRUN, str(size), str(GROUP), "compare", str(folder)])
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found-{size}.pt") for size in (1, 2)]


@pytest.mark.parametrize("how", [False, True, "labels"], ids=["eager", "compiled", "few labels"])
def test_two_processes_train_as_one_does(found, how):
    """With noise of the data rows, uneven shares, clipping and validation data; with few labels."""
    alone, together = (result[how] for result in found)
    torch.testing.assert_close(together["elbos"], alone["elbos"])
    weights = [
        {n: t for n, t in one["weights"].items() if n != "mean"} for one in (alone, together)
    ]
    torch.testing.assert_close(weights[1], weights[0])


def test_log_px_is_the_same_in_two_processes(found):
    torch.testing.assert_close(found[1]["log_px"], found[0]["log_px"])


def test_the_others_end_when_one_dies(tmp_path):
    start = time.monotonic()
    done = launch([*TORCHRUN, "2", str(GROUP), "die", str(tmp_path)])
    assert done.returncode != 0
    assert time.monotonic() - start < 100
    assert "lost another one" in (tmp_path / "said").read_text()


def test_the_command_trains_in_two_processes_and_scores_the_same(tmp_path):
    """One writes: one run, a row per epoch; log p(x) does not depend on their number."""
    out = tmp_path / "run"
    words = ("train", "--epochs", "2", "--num-particles", "20", "--out", str(out))
    said = pyrovae(*words, devices=2).stdout
    assert said.count("log p(x) >=") == 1
    assert len((out / "metrics.csv").read_text().splitlines()) == 3
    both = []
    for devices in (1, 2):
        pyrovae("log-px", str(out), "--num-particles", "30", devices=devices)
        both.append(json.loads((out / "log_px.json").read_text()))
    assert both[1].pop("made_by")
    assert both[0].pop("made_by")
    assert both[1].pop("settings") == both[0].pop("settings")
    assert both[1] == pytest.approx(both[0])


def test_the_command_takes_its_place_under_slurm(tmp_path):
    """Two tasks with the variables that srun sets."""
    out, processes = tmp_path / "run", []
    command = [sys.executable, "-m", "pyrovae.cli", "train", "--epochs", "1", "--seeds", "2"]
    for task in ("0", "1"):
        slurm = {
            **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "vae", "SLURM_NTASKS": "2"},
            **{"SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"},
            **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": task, "SLURM_LOCALID": task},
        }
        words = [*command, "--accelerator", "cpu", "--num-particles", "5", "--out", str(out)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(words, env=ENV | slurm, stdout=pipe, stderr=pipe, text=True)
        )
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [words.count("log p(x) >=") for words, _ in said] == [2, 0]
    assert all((out / seed / "summary.json").exists() for seed in (".", "seed-0", "seed-1"))
