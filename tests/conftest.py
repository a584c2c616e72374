"""Every test starts from one seed and an empty parameter store, and validates."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do what they launch
    os.environ["OMP_NUM_THREADS"] = "1"

import pyro
import pytest


@pytest.fixture(autouse=True)
def _fresh():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
