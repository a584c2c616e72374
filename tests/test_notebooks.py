"""Each notebook is there, was run, is small, and is listed."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = (
    "01_vae_from_first_principles",
    "02_swapping_guides_and_likelihoods",
    "03_how_good_is_my_log_px",
    "04_labels_and_semi_supervision",
    "05_your_own_data",
)
LARGEST = 200 * 1024
"""Bytes of one output."""

LARGEST_OF_ALL = 1024 * 1024
"""Bytes of all notebooks together."""


def path_of(name):
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_of(name):
    cells = json.loads(path_of(name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_no_other_notebooks():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_was_run_from_top_to_bottom(name):
    counts = [cell["execution_count"] for cell in code_of(name)]
    assert counts == list(range(1, len(counts) + 1))
    assert any(cell["outputs"] for cell in code_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_small_and_without_errors_warnings_and_paths(name):
    for output in (output for cell in code_of(name) for output in cell["outputs"]):
        text = json.dumps(output)
        assert len(text) < LARGEST
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert not re.search(r"/(home|root|tmp|usr|Users|var|work)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_a_plain_kernel(name):
    metadata = json.loads(path_of(name).read_text())["metadata"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert metadata["kernelspec"] == kernel


def test_all_are_small():
    assert sum(path_of(name).stat().st_size for name in NAMES) < LARGEST_OF_ALL


@pytest.mark.parametrize("name", NAMES)
def test_is_listed(name):
    assert f"notebooks/{name}.ipynb" in (ROOT / "README.md").read_text()
