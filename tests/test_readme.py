"""README's programs run as pasted, and its numbers are those of the results files."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXPERIMENTS = ROOT / "experiments"
TABLES = (
    "reference_runs",
    "posterior_truth",
    "swap_guides",
    "swap_priors",
    "swap_objectives",
    "swap_likelihoods",
    "precision",
)
OTHERS = ("time_to_quality", "log_px_methods", "brackets", "calibration")
BENCHMARKS = ("train", "labels", "labels-avx2", "log_px", "memory", "processes")


@pytest.mark.parametrize(
    "program", ["".join(PROGRAMS[:4]), *PROGRAMS[4:]], ids=["vae, judged, labels", "hand-written"]
)
def test_program_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert "nats per datum" in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_the_experiment_wrote(name, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    module = importlib.import_module(name)
    rows = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    assert set(rows) == set(module.ROWS)
    assert module.table(rows) in README


@pytest.mark.parametrize("name", [*(f"benchmark_{name}" for name in BENCHMARKS), *OTHERS])
def test_table_is_what_the_benchmark_wrote(name, monkeypatch):
    for folder in (EXPERIMENTS, EXPERIMENTS / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    module = importlib.import_module(name.removeprefix("benchmark_").removesuffix("-avx2"))
    found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    assert module.table(found) in README


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_table_of_labels_is_what_the_experiment_wrote(name, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    module = importlib.import_module("semi_supervised")
    found = json.loads((EXPERIMENTS / "results" / f"semi_supervised-{name}.json").read_text())
    assert module.table(found) in README


@pytest.mark.parametrize("name", ["conditional", "conditional-mnist"])
def test_share_of_the_class_asked_for_is_what_the_experiment_wrote(name):
    found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    assert f"{found['of_the_class_asked_for']:.1%} of decoded images" in " ".join(README.split())


def test_better_guides_come_closer_to_a_known_posterior():
    rows = json.loads((EXPERIMENTS / "results" / "posterior_truth.json").read_text())
    kl = {name: row["kl"] for name, row in rows.items()}
    error = max(row["std_error"] for row in rows.values())
    assert kl["Normal"] > kl["FullRankNormal"] + 5 * error
    flows = set(kl) - {"Normal", "LowRankNormal", "FullRankNormal"}
    assert all(kl[name] < kl["FullRankNormal"] - 5 * error for name in flows)


def test_figures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path
