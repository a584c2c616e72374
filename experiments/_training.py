"""Training inside an experiment, as `pyrovae train` does it."""

import shlex
from dataclasses import asdict, replace
from typing import Any

import pyrovae
from pyrovae import _flags
from pyrovae._build import arranged, build, load_data
from pyrovae._settings import Settings, options


def fitted(
    flags: str, data_root: str | None, seed: int | None = None
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A model trained with these flags, its data, and a row per epoch."""
    settings = Settings(**_flags.parse("train", Settings, shlex.split(flags)))
    settings = replace(settings, data_root=data_root)
    settings = settings if seed is None else replace(settings, seed=seed)
    dataset = load_data(settings)
    vae, objective = build(settings, dataset)
    dataset = arranged(settings, dataset)
    chosen = asdict(options(settings))
    history = pyrovae.fit(
        vae, dataset.train, valid=dataset.valid, objective=objective, progress=False, **chosen
    )
    return vae, dataset, history
