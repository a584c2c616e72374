"""Models and runs on disk: a folder with everything that is needed to use them again.

=====================  =============================================================
config.json            the model, from which `load` rebuilds it; a run's settings
weights.safetensors    parameters and buffers
training.safetensors   state of training, from which a run is resumed
metrics.csv            one row per epoch
log_px.json, .csv      log p(x) of the test data: summary, and one row per datum
summary.json           time, memory, validation ELBO
figures/*.png          pictures
=====================  =============================================================
"""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

import pyrovae
from pyrovae._config import from_config, to_config
from pyrovae.checkpoint import read_tensors, replacing, write_tensors
from pyrovae.evidence.result import PER_DATUM, LogPx
from pyrovae.program import Program, owners

__all__ = ["Run", "load", "save"]

CONFIG, WEIGHTS = "config.json", "weights.safetensors"


def save(vae: nn.Module, path: str | os.PathLike) -> None:
    """Save a model to a folder: how it is built, and its weights.

    A model made of parts of this package, or of subclasses of them, is rebuilt by `load(path)`; any
    other module is saved as weights alone.

    Args:
        vae: A `VAE`, or any module.
        path: Folder, made if need be.

    Raises:
        ValueError: If parameters lie in Pyro's store, outside the module.
    """
    if isinstance(vae, Program) and len(owners(vae.model)) * len(owners(vae.guide)) == 0:
        raise ValueError(
            "the parameters of a plain Pyro function lie in Pyro's store: save them with "
            "pyro.get_param_store().save(file)"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, _tensors(vae), {})
    _write_json(folder / CONFIG, _read_config(folder) | {"model": model_config(vae)})


def load(path: str | os.PathLike, vae: nn.Module | None = None) -> nn.Module:
    """Load a model from a folder that `save` or `pyrovae train` wrote.

    No code is run but the constructors of the model's parts.

    Args:
        path: The folder.
        vae: A module to load the weights into, for one that cannot be rebuilt.

    Raises:
        ValueError: If a file is missing or damaged, or does not fit the model.
    """
    folder = Path(path)
    config = _read_config(folder, must_exist=True)
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} has no weights yet: its training has not finished. Finish it with "
            f"pyrovae train --resume {folder}"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    if vae is None:
        if config.get("model") is None:
            raise ValueError(
                f"the model in {folder} is not made of pyrovae parts and cannot be rebuilt: build "
                "it yourself and call load(path, vae)"
            )
        vae = from_config(config["model"])
    try:
        vae.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit the model: {error}") from error
    return vae


def model_config(vae: nn.Module) -> dict[str, Any] | None:
    """How to build a model again; None if only its maker knows."""
    try:
        return to_config(vae)
    except TypeError:
        return None


class Run:
    """The folder of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint = self.path / "training.safetensors"

    @classmethod
    def create(cls, path: str | os.PathLike, overwrite: bool = False) -> Run:
        """Make the folder; one that holds a run already is emptied of it only if told so.

        Raises:
            ValueError: If it exists, or cannot be made.
        """
        run = cls(path)
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            if not (overwrite and (run.path / CONFIG).exists()):
                raise ValueError(
                    f"{run.path} exists: choose another --out, or continue it with --resume "
                    f"{run.path}, or replace a run with --overwrite"
                )
            run._clear()
        try:
            (run.path / "figures").mkdir(parents=True, exist_ok=True)
            (run.path / ".writable").touch()
            (run.path / ".writable").unlink()
        except OSError as error:
            raise ValueError(f"{run.path} cannot be written: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """A folder that holds a run.

        Raises:
            ValueError: If it does not.
        """
        run = cls(path)
        run.config  # noqa: B018  (reads and checks)
        return run

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return _read_config(self.path, must_exist=True)

    @property
    def finished(self) -> bool:
        """Whether training has ended and left weights."""
        return (self.path / WEIGHTS).exists()

    def describe(self, settings: dict[str, Any], **more: Any) -> None:
        """Write config.json: the settings of the command, and what made it."""
        _write_json(self.path / CONFIG, {"settings": settings, **more, "made_by": made_by()})

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Add one row to metrics.csv; rows of that epoch and later ones give way."""
        file = self.path / "metrics.csv"
        rows = [r for r in self.metrics() if r["epoch"] < row["epoch"]] if file.exists() else []
        _write_csv(file, [*rows, row])

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv."""
        with open(self.path / "metrics.csv", newline="") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def add_log_px(self, result: LogPx, name: str = "log_px") -> None:
        """Write an estimate: its summary as JSON, and a row per datum as CSV."""
        columns = [getattr(result, field).tolist() for field in PER_DATUM]
        header = ("log_px", *PER_DATUM[1:])
        rows = [
            {"index": i, **dict(zip(header, numbers, strict=True))}
            for i, numbers in enumerate(zip(*columns, strict=True))
        ]
        _write_csv(self.path / f"{name}.csv", rows)
        _write_json(self.path / f"{name}.json", result.summary() | {"made_by": made_by()})

    def per_datum(self, name: str = "log_px") -> torch.Tensor | None:
        """Log p(x) of each datum as written by `add_log_px`, shape `(N,)`; None if it was not."""
        file = self.path / f"{name}.csv"
        if not file.exists():
            return None
        with open(file, newline="") as rows:
            return torch.tensor([float(row["log_px"]) for row in csv.DictReader(rows)])

    def summarize(self, **numbers: float) -> None:
        """Write summary.json: what the run cost and came to."""
        _write_json(self.path / "summary.json", {**numbers, "made_by": made_by()})

    def add_figures(self, figures: dict[str, Any]) -> list[Path]:
        """Write figures as figures/NAME.png."""
        paths = []
        for name, figure in figures.items():
            paths.append(self.path / "figures" / f"{name}.png")
            paths[-1].parent.mkdir(exist_ok=True)
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
        return paths

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        written = ("*.json", "*.safetensors", "metrics.csv", "log_px*.csv", "figures/*.png")
        for file in [file for pattern in written for file in self.path.glob(pattern)]:
            file.unlink()


def made_by() -> dict[str, str | int]:
    """Versions and hardware, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "pyrovae": pyrovae.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _tensors(vae: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in vae.state_dict().items() if isinstance(t, torch.Tensor)}


def _read_config(folder: Path, must_exist: bool = False) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        if must_exist:
            raise ValueError(f"{folder} is no run or saved model: it has no {CONFIG}") from error
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(file) as temporary, open(temporary, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
