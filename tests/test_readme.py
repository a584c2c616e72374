"""README's programs run as pasted, and its numbers are those of the results files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["vae", "hand-written"])
def test_program_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert "nats per datum" in capsys.readouterr().out


def test_table_is_what_the_experiment_wrote():
    script = ROOT / "experiments" / "reference_runs.py"
    spec = importlib.util.spec_from_file_location("reference_runs", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = json.loads((module.RESULTS / "reference_runs.json").read_text())
    assert set(rows) == set(module.RUNS)
    assert module.table(rows) in README


def test_figures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path
