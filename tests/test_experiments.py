"""Every experiment runs with tiny settings, and is listed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted([*FOLDER.glob("[a-z]*.py"), *FOLDER.glob("benchmarks/[a-z]*.py")])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_runs(script, tmp_path):
    if script.name == "gpu.py" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    command = [sys.executable, str(script), "--smoke", "--results", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    assert list(tmp_path.glob("*.json"))


def test_each_is_listed():
    listed = (FOLDER / "README.md").read_text()
    assert SCRIPTS
    for script in SCRIPTS:
        assert f"`{script.relative_to(FOLDER).as_posix()}`" in listed
