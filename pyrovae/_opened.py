"""A run that a command is about, and the data that it is about."""

from __future__ import annotations

from dataclasses import replace

from pyrovae import data
from pyrovae._build import as_taken, load_data
from pyrovae._settings import saved_settings
from pyrovae._train import check_same_data
from pyrovae.data import Preprocess, Split
from pyrovae.runs import Run, load
from pyrovae.vae import Base


def opened(path: str) -> tuple[Run, Base]:
    """A run and its model.

    Raises:
        ValueError: If the folder holds something else.
    """
    run = Run.open(path)
    if seeds := sorted(child.parent.name for child in run.path.glob("seed-*/config.json")):
        raise ValueError(f"{path} holds runs of several seeds: name one, such as {path}/{seeds[0]}")
    vae = load(run.path)
    if not isinstance(vae, Base):
        raise ValueError(f"{path} holds a {type(vae).__name__}, not a VAE")
    return run, vae


def test_data(run: Run, source: str | None, root: str | None) -> Split:
    """The run's test data, or a file as the run's model sees it."""
    preprocess = run.config.get("preprocess")
    if preprocess is None:
        raise ValueError(f"{run.path} holds a saved model without data: use it from Python")
    settings = saved_settings(run)
    if source is not None:
        split = data.file_split(source, Preprocess.from_config(preprocess), root)
        return as_taken(settings, split)
    dataset = load_data(replace(settings, data_root=root) if root else settings)
    check_same_data(run, dataset)
    return as_taken(settings, dataset.test)
