"""Models and runs on disk: a folder with everything that is needed to use them again.

=====================  =============================================================
config.json            the model, from which `load` rebuilds it; a run's settings
weights.safetensors    parameters and buffers
training.safetensors   state of training, from which a run is resumed
metrics.csv            one row per epoch
log_px.json, .csv      log p(x) of the test data: summary, and one row per datum
log_px.npz             the same rows as arrays
latents.json, .csv     rate, distortion and the like: summary, and one row per latent
gaps.json, .csv        approximation and amortization gap: summary, and one row per datum
classes.json, .csv     a classifier's error and calibration; probabilities, a row per datum
posterior-*.npz        draws from the posterior of one datum, and from the guide
summary.json           time, memory, validation ELBO
figures/*.png          pictures
=====================  =============================================================
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae._config import from_config, to_config
from pyrovae.checkpoint import read_tensors, replacing, write_tensors
from pyrovae.evidence import Bracket, Classification, Gaps, Latents
from pyrovae.evidence.classification import table as rows_of_classes
from pyrovae.evidence.result import PER_DATUM, LogPx
from pyrovae.program import Program, owners

__all__ = ["Run", "load", "save"]

CONFIG, WEIGHTS, SUMMARY = "config.json", "weights.safetensors", "summary.json"
METRICS, CHECKPOINT = "metrics.csv", "training.safetensors"
WRITTEN = (
    *(CONFIG, WEIGHTS, SUMMARY, METRICS, CHECKPOINT, "log_px*.json", "log_px*.csv"),
    *("log_px*.npz", "gaps*.json", "gaps*.csv", "bidirectional*.json", "bidirectional*.csv"),
    *("*.partial", "*.partial.*"),
    *("classes*.json", "classes*.csv"),
    *("latents*.json", "latents*.csv", "codes.npz", "samples.npz", "posterior-*.npz"),
    *("figures/*.png", ".*.tmp"),
)
"""What a run consists of."""


def save(vae: nn.Module, path: str | os.PathLike) -> None:
    """Save a model to a folder: how it is built, and its weights.

    A model made of parts of this package, or of subclasses of them, is rebuilt by `load(path)`; any
    other module is saved as weights alone.

    Args:
        vae: A `VAE`, or any module.
        path: Folder, made if need be.

    Raises:
        ValueError: If parameters lie in Pyro's store, outside the module; if state is not a tensor;
            if the folder cannot be made.
    """
    if isinstance(vae, Program) and len(owners(vae.model)) * len(owners(vae.guide)) == 0:
        raise ValueError(
            "the parameters of a plain Pyro function lie in Pyro's store: save them with "
            "pyro.get_param_store().save(file)"
        )
    folder = Path(path)
    tensors = _tensors(vae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    there, model = _read_config(folder), model_config(vae)
    if "settings" in there and there.get("model") != model:
        raise ValueError(f"{folder} holds the run of another model: save to another folder")
    config = there | {"model": model}
    write_tensors(folder / WEIGHTS, tensors, {})
    write_json(folder / CONFIG, config)


def load(path: str | os.PathLike, vae: nn.Module | None = None) -> nn.Module:
    """Load a model from a folder that `save` or `pyrovae train` wrote.

    No code is run but the modules and constructors of the model's parts. The model comes back on
    the CPU, in the precision in which it was saved.

    Args:
        path: The folder.
        vae: A module to load the weights into, for one that cannot be rebuilt; it keeps its own
            device and precision.

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
        if not isinstance(vae, nn.Module):
            raise ValueError(f"{folder / CONFIG} describes a {type(vae).__name__}, not a model")
        _check_weights(vae, tensors, folder)
        _as_saved(vae, tensors)
    _check_weights(vae, tensors, folder)
    vae.load_state_dict(tensors, strict=False)
    return vae


def model_config(vae: nn.Module) -> dict[str, Any] | None:
    """How to build a model again; None if only its maker knows."""
    try:
        config = to_config(vae)
    except TypeError:
        return None
    with torch.random.fork_rng(devices=[]):
        again = from_config(config)
    return config if _alike(vae, again) else None


def _alike(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models differ in nothing but weights: changed after they were made, they may."""
    if repr(left) != repr(right):
        return False
    shapes = [{n: t.shape for n, t in _tensors(m).items()} for m in (left, right)]
    return shapes[0] == shapes[1] and all(
        _plain(a) == _plain(b) for a, b in zip(left.modules(), right.modules(), strict=True)
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are settings: numbers and switches, but not the mode."""
    kept = vars(module).items()
    return {n: v for n, v in kept if isinstance(v, (bool, int, float)) and n != "training"}


class Run:
    """The folder of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self._rows: list[dict[str, Any]] | None = None

    @classmethod
    def create(cls, path: str | os.PathLike, overwrite: bool = False) -> Run:
        """Make the folder; one that holds a run already is emptied of it only if told so.

        Raises:
            ValueError: If it exists, or cannot be made.
        """
        run = cls(path)
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            run._check_replaceable(overwrite)
            run._clear()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            (run.path / ".writable").touch()
            (run.path / ".writable").unlink()
        except OSError as error:
            raise ValueError(f"{run.path} cannot be written: {error.strerror}") from error
        return run

    @classmethod
    def create_beside(cls, parent: str | os.PathLike, name: str) -> Run:
        """Make a folder of this name, or of this name and the first free number.

        Raises:
            ValueError: If it cannot be made.
        """
        for number in itertools.count(1):
            path = Path(parent) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if path.exists():
                    continue
                raise ValueError(f"{path} cannot be made: {parent} is no folder") from None
            except OSError as error:
                raise ValueError(f"{path} cannot be written: {error.strerror}") from error
            return cls(path)
        raise AssertionError("some number is free")

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
    def seeds(self) -> list[Run]:
        """The runs that it holds, one for each seed; itself where there was but one."""
        inside = sorted(self.path.glob(f"seed-*/{CONFIG}"))
        return [Run(file.parent) for file in inside] or [self]

    @property
    def begun(self) -> bool:
        """Whether it says what it is a run of."""
        return (self.path / CONFIG).exists()

    @property
    def finished(self) -> bool:
        """Whether all of it is there: the summary is written last."""
        return (self.path / SUMMARY).exists()

    def describe(self, settings: dict[str, Any], **more: Any) -> None:
        """Write config.json: the settings of the command, and what made it."""
        self.path.mkdir(exist_ok=True)
        self.write_json(CONFIG, {"settings": settings, **more, "made_by": made_by()})

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Add one row to metrics.csv; rows of that epoch and later ones give way."""
        if self._rows is None:
            self._rows = self.metrics()
        self._rows = [r for r in self._rows if r["epoch"] < row["epoch"]] + [row]
        _write_csv(self.path / METRICS, self._rows)

    def write_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        """Write metrics.csv whole."""
        self._rows = list(history)
        _write_csv(self.path / METRICS, self._rows)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv; none if it is not there.

        Raises:
            ValueError: If it is damaged.
        """
        if not (self.path / METRICS).exists():
            return []
        rows = _read_csv(self.path / METRICS, "epoch")
        return [row | {"epoch": int(row["epoch"])} for row in rows]

    def add_log_px(self, result: LogPx, name: str = "log_px") -> None:
        """Write an estimate: its summary as JSON, and per datum as CSV and as arrays."""
        header = ("log_px", *PER_DATUM[1:])
        columns = {"index": torch.arange(len(result.values))}
        columns |= {n: getattr(result, f) for n, f in zip(header, PER_DATUM, strict=True)}
        numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
        _write_csv(self.path / f"{name}.csv", [dict(zip(columns, n, strict=True)) for n in numbers])
        write_arrays(self.path / f"{name}.npz", columns)
        self.write_json(f"{name}.json", result.summary() | {"made_by": made_by()})

    def add_gaps(self, result: Gaps, index: Tensor, name: str = "gaps") -> None:
        """Write where the nats go: its summary as JSON, and a row per datum as CSV.

        Args:
            result: The gaps.
            index: Where in the data theirs are, shape `(N,)`.
            name: Of the files.
        """
        pairs = zip(result.rows(), index.tolist(), strict=True)
        _write_csv(self.path / f"{name}.csv", [row | {"index": i} for row, i in pairs])
        self.write_json(f"{name}.json", result.summary() | {"made_by": made_by()})

    def add_bracket(self, result: Bracket, name: str = "bidirectional") -> None:
        """Write bounds from both sides: their summary as JSON, and a row per datum as CSV."""
        _write_csv(self.path / f"{name}.csv", result.rows())
        self.write_json(f"{name}.json", result.summary() | {"made_by": made_by()})

    def add_latents(self, result: Latents, name: str = "latents") -> None:
        """Write what the latents carry: its summary as JSON, and a row per latent as CSV."""
        _write_csv(self.path / f"{name}.csv", result.rows())
        self.write_json(f"{name}.json", result.summary() | {"made_by": made_by()})

    def add_classes(
        self, probs: Tensor, found: Classification | None, file: Path | None = None
    ) -> Path:
        """Write class probabilities, a row per datum as CSV; if labels are known, a summary too.

        Args:
            probs: Shape `(N, num_classes)`.
            found: Beside the true classes; None where they are not known.
            file: The CSV; classes.csv in the run if None.
        """
        file = file or self.path / "classes.csv"
        _write_csv(file, rows_of_classes(found, probs))
        if found is not None:
            write_json(file.with_suffix(".json"), found.summary() | {"made_by": made_by()})
        return file

    def per_datum(self, name: str = "log_px") -> torch.Tensor | None:
        """Log p(x) of each datum as written by `add_log_px`, shape `(N,)`; None if it was not.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.path / f"{name}.csv"
        if not file.exists():
            return None
        return torch.tensor([row["log_px"] for row in _read_csv(file, "log_px")])

    def log_px(self, name: str = "log_px") -> LogPx | None:
        """An estimate as written by `add_log_px`; None if it was not.

        Raises:
            ValueError: If a file is damaged.
        """
        file = self.path / f"{name}.json"
        if not file.exists() or not file.with_suffix(".csv").exists():
            return None
        rows = _read_csv(file.with_suffix(".csv"), "log_px")
        summary = _read_json(file)
        if len(rows) != summary.get("num_data"):
            raise ValueError(
                f"{file} and {name}.csv are not of each other: the one is of "
                f"{summary.get('num_data')} data, the other of {len(rows)}. Estimate anew"
            )
        return _log_px(summary, rows)

    def summarize(self, **numbers: float) -> None:
        """Write summary.json: what the run cost and came to."""
        self.write_json(SUMMARY, {**numbers, "made_by": made_by()})

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of the run."""
        write_json(self.path / name, content)

    def add_figures(self, figures: dict[str, Any]) -> list[Path]:
        """Write figures as figures/NAME.png."""
        paths = []
        for name, figure in figures.items():
            paths.append(self.path / "figures" / f"{name}.png")
            paths[-1].parent.mkdir(exist_ok=True)
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
        return paths

    def discard_unless_trained(self) -> None:
        """Remove a run that failed before there was anything to keep of it."""
        if self.path.is_dir() and not any(self.path.rglob(self.checkpoint.name)):
            self._clear()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _check_replaceable(self, overwrite: bool) -> None:
        if not overwrite or not self.begun:
            is_run = "" if self.begun else ", and holds no run"
            instead = f", or continue it with --resume {self.path}, or replace it with --overwrite"
            raise ValueError(
                f"{self.path} exists{is_run}: choose another --out" + instead * self.begun
            )

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for folder in (*self.path.glob("seed-*"), self.path):
            for file in [file for pattern in WRITTEN for file in folder.glob(pattern)]:
                file.unlink()
            for empty in (folder / "figures", folder):
                if empty.is_dir() and empty != self.path and not any(empty.iterdir()):
                    empty.rmdir()


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
    state = vae.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, not a tensor: keep it in a buffer, or out of "
                "the state"
            )
    return state


def _check_weights(vae: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse weights of another model before one of them is copied."""
    own = _tensors(vae)
    wrong = [f"the file has no {name}" for name in own if name not in tensors]
    wrong += [f"the model has no {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in "
        "the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"the weights in {folder} do not fit the model: {wrong[0]}{more}")


def _as_saved(vae: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give a rebuilt model the precision of its weights, and its other buffers the commonest."""
    kinds = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    if kinds:
        vae.to(max(set(kinds), key=kinds.count))
    for named in (vae.named_parameters, vae.named_buffers):
        for name, own in named(remove_duplicate=False):
            if name in tensors:
                own.data = own.data.to(tensors[name].dtype)


def _read_config(folder: Path, must_exist: bool = False) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        if must_exist and folder.is_file():
            raise ValueError(f"{folder} is a file: name the folder of a run or saved model")
        if must_exist:
            raise ValueError(f"{folder} is no run or saved model: it has no {CONFIG}")
        return {}
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected an object, got a {type(content).__name__}")
    return content


def _log_px(summary: dict[str, Any], rows: Sequence[dict[str, float]]) -> LogPx:
    """An estimate of its files; what older versions did not write is left unknown."""
    columns: dict[str, Any] = {
        field: torch.tensor([row.get(column, math.nan) for row in rows], dtype=torch.float64)
        for field, column in zip(PER_DATUM, ("log_px", *PER_DATUM[1:]), strict=True)
    }
    known = {field: summary[field] for field in ("settings", "claim", "data") if field in summary}
    method, k = summary.get("method", "unknown"), summary.get("num_particles") or 0
    return LogPx(
        **columns,
        **known,
        method=method,
        num_particles=k,
        seed=summary.get("seed") or 0,
        how=summary.get("how", f"{method} with K = {k:,}"),
        num_dims=summary.get("num_dims") or math.nan,
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, all of it or nothing; NaN and infinity become null."""
    text = json.dumps(_strict(content), indent=2, allow_nan=False)
    with replacing(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_arrays(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as arrays to an .npz file, all of it or nothing."""
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    with replacing(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)


def _strict(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have: null in their place."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_csv(file: Path, column: str) -> list[dict[str, float]]:
    """Rows of numbers, with a column of this name among them.

    Raises:
        ValueError: If they are not, or the last is cut short.
    """
    try:
        text = file.read_text(encoding="utf-8")
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
        if not text.endswith("\n") or any(column not in row for row in rows):
            raise ValueError
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{file} is damaged or cut short: expected rows of numbers under a header with "
            f"{column!r}. Remove it to go on without"
        ) from error
    return rows


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(file) as temporary, open(temporary, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
