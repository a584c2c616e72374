"""`pyrovae train`: build what the flags say, train, score, draw; once, or with several seeds."""

from __future__ import annotations

import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import _processes, plotting
from pyrovae._build import arranged, build, load_data
from pyrovae._settings import Settings, options, saved_settings
from pyrovae.data import DataSet, Split
from pyrovae.evidence import Classification, latents, log_px
from pyrovae.hierarchical import HierarchicalVAE
from pyrovae.objectives import Objective
from pyrovae.program import Refused, as_args
from pyrovae.runs import Run, model_config, save
from pyrovae.semisupervised import SemiSupervisedVAE
from pyrovae.training import NonFiniteLoss, fit
from pyrovae.vae import Base


def train(settings: Settings) -> None:
    """Carry out the command."""
    if settings.resume:
        run = Run.open(settings.resume)
        if run.finished:
            print(f"The run in {run.path} is finished: there is nothing to go on with.")
            return
        settings = saved_settings(run)
        dataset = load_data(settings)
        options(settings).fabric(settings.devices)
        _train_all(settings, dataset, run)
        return
    dataset = load_data(settings)
    build(settings, dataset)  # what cannot be made is refused before there is a folder
    options(settings).fabric(settings.devices)
    made = _new_run(settings).path if _processes.leads() else None
    _train_all(settings, dataset, Run(_processes.gather(made)[0] or ""))


def check_same_data(run: Run, dataset: DataSet) -> None:
    """Refuse data that are no longer those the run was made with.

    Raises:
        ValueError: If a split differs.
    """
    known = run.config.get("data", {})
    if changed := [n for n, found in dataset.fingerprint.items() if known.get(n, found) != found]:
        raise ValueError(
            f"the data in {dataset.name} are not those of the run in {run.path} "
            f"({', '.join(changed)} differ): put the old file back, or train anew"
        )


def draw(run: Run, vae: Base, split: Split) -> list[Path]:
    """Write a run's figures."""
    values = run.per_datum("log_px")
    if values is not None and len(values) != len(split):
        values = None
    x = as_args(split[slice(0, len(split))])[0]
    return run.add_figures(plotting.figures(vae.cpu(), x, split.y, run.metrics(), values))


def wrapped(text: str) -> str:
    """A paragraph for the terminal."""
    return textwrap.fill(text, 98)


def _new_run(settings: Settings) -> Run:
    if settings.out:
        return Run.create(settings.out, settings.overwrite)
    name = f"{Path(settings.data).resolve().stem or 'data'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Run.create_beside("runs", name)


def _train_all(settings: Settings, dataset: DataSet, run: Run) -> None:
    """One run, or one for each seed inside the folder."""
    leads = _processes.leads()
    with _going_on_later(run) if leads else nullcontext():
        if settings.seeds == 1:
            _train_one(settings, dataset, run)
            return
        if leads and not run.begun:
            run.describe(settings.plain())
        runs = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            runs.append(Run(run.path / f"seed-{seed}"))
            _train_one(replace(settings, seed=seed, seeds=1), dataset, runs[-1])
        if leads:
            _report_seeds(run, runs)


@contextmanager
def _going_on_later(run: Run) -> Iterator[None]:
    """Say how to go on with a run that was interrupted; leave nothing of one that never began."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        again = f"pyrovae train --resume {shlex.quote(str(run.path))}"
        print(f"\nStopped. Go on with: {again}", file=sys.stderr)
        raise
    except Exception:
        run.discard_unless_trained()
        raise


def _train_one(settings: Settings, dataset: DataSet, run: Run) -> None:
    """Train, score and draw one run, or what is left to do of it."""
    if run.finished:
        return
    start, leads = time.perf_counter(), _processes.leads()
    vae, objective = build(settings, dataset)
    dataset = arranged(settings, dataset)
    if leads:
        _describe(settings, dataset, run, vae)
    _processes.gather(None)  # the others find the folder made
    history = _fit(settings, run, vae, objective, dataset)
    trained = time.perf_counter() - start
    if leads:
        save(vae, run.path)
    told = _score(settings, run, vae, dataset.test)
    if not leads:
        return
    draw(run, vae, dataset.test)
    scores = [row["valid_elbo"] for row in history]
    run.summarize(
        epochs=len(history),
        valid_elbo=max(filter(math.isfinite, scores), default=math.nan),
        train_seconds=trained,
        seconds=time.perf_counter() - start,
        peak_memory_mb=peak_memory_mb(),
    )
    print("\n".join(map(wrapped, told)))
    print(f"Run in {run.path}, figures in {run.path / 'figures'}")


def peak_memory_mb() -> float:
    """The most memory that this process held at once, in MiB; NaN where nobody counts."""
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _describe(settings: Settings, dataset: DataSet, run: Run, vae: Base) -> None:
    """Begin the run's folder, and say what it is a run of."""
    if not run.begun:
        preprocess = dataset.preprocess.to_config()
        run.describe(
            settings.plain(),
            model=model_config(vae),
            preprocess=preprocess,
            data=dataset.fingerprint,
        )
    check_same_data(run, dataset)
    print(wrapped(_introduction(dataset, vae)), flush=True)


def _score(settings: Settings, run: Run, vae: Base, test: Split) -> list[str]:
    """Write log p(x) of the test data, and what the latents carry: a paragraph on each."""
    told, progress = [], sys.stderr.isatty()
    how: dict[str, Any] = {"seed": 0, "progress": progress, "shared": True}
    try:
        found = log_px(vae.model, vae.guide, test, settings.num_particles, **how)
    except Refused as error:
        told.append(f"log p(x) is not estimated: {error}.")
    else:
        told.append(str(found))
        if _processes.leads():
            run.add_log_px(found)
    if not _processes.leads():
        return told
    if isinstance(vae, SemiSupervisedVAE):
        probs, classes = classified(vae, test)
        run.add_classes(probs, classes)
        told += [] if classes is None else [str(classes)]
    try:
        carried = latents(vae.model, vae.guide, given(vae, test), seed=0, progress=progress)
        run.add_latents(carried)
        told.append(str(carried))
    except Refused as error:
        told.append(f"What the latents carry is not known: {error}.")
    return told


def classified(vae: SemiSupervisedVAE, split: Split) -> tuple[Tensor, Classification | None]:
    """Class probabilities of data, and how good they are where labels are known."""
    like = next(vae.parameters())
    starts = range(0, len(split), 1000)
    probs = torch.cat([vae.classify(split[slice(i, i + 1000)].to(like)) for i in starts]).cpu()
    return probs, None if split.y is None else Classification(
        probs, split.y.cpu(), split.description
    )


def given(vae: Base, split: Split) -> Split:
    """Data with their labels, known or predicted, for a model that would sum them out."""
    if not isinstance(vae, SemiSupervisedVAE):
        return split
    y = classified(vae, split)[0].argmax(-1) if split.y is None else split.y
    return replace(split, y=y).with_labels()


def _fit(
    settings: Settings, run: Run, vae: Base, objective: Objective, dataset: DataSet
) -> list[dict[str, Any]]:
    interactive = sys.stderr.isatty()
    every = max(1, settings.epochs // 10)

    def on_epoch(_: Any, row: dict[str, Any]) -> None:
        run.add_epoch(row)
        if not interactive and row["epoch"] % every == 0:
            print(_epoch_line(row, settings.epochs), flush=True)

    resume = run.checkpoint.exists()
    try:
        history = fit(
            vae,
            dataset.train,
            valid=dataset.valid,
            objective=objective,
            progress=interactive,
            on_epoch=on_epoch,
            checkpoint=run.checkpoint,
            resume=resume,
            **asdict(options(settings)),
        )
    except ValueError as error:
        if not resume:
            raise
        raise ValueError(f"{error}; to start anew, train with --out and --overwrite") from error
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}; the last good checkpoint is {run.checkpoint}") from error
    if _processes.leads():
        run.write_metrics(history)
    return history


def _report_seeds(run: Run, runs: Sequence[Run]) -> None:
    if not all((one.path / "log_px.json").exists() for one in runs):
        run.summarize(runs=len(runs))
        print(f"Runs in {run.path}")
        return
    found = [json.loads((one.path / "log_px.json").read_text()) for one in runs]
    means = torch.tensor([result["mean"] for result in found], dtype=torch.float64)
    mean, std = float(means.mean()), float(means.std())
    error = std / len(means) ** 0.5
    same = {
        name: found[0][name] for name in ("method", "num_particles", "num_data", "data", "made_by")
    }
    run.write_json(
        "log_px.json", {"mean": mean, "std": std, "seed_std_error": error}
        | {"values": means.tolist(), "seeds": [one.path.name for one in runs]} | same,
    )  # fmt: skip
    run.summarize(runs=len(runs))
    print(
        wrapped(
            f"log p(x) over {len(means)} seeds: mean {mean:.2f} nats, standard deviation "
            f"{std:.2f}, standard error of the mean {error:.2f}; {same['data']}, "
            f"K = {same['num_particles']:,}."
        )
    )
    print(f"Runs in {run.path}")


def _introduction(dataset: DataSet, vae: Base) -> str:
    sizes = " / ".join(f"{len(s):,}" for s in (dataset.train, dataset.valid, dataset.test))
    weights = sum(p.numel() for p in vae.parameters())
    encoders: Any = vae.encoders if isinstance(vae, HierarchicalVAE) else [vae.encoder]
    prior, likelihood = type(vae.prior).__name__, type(vae.likelihood).__name__
    families = [type(encoder).__name__ for encoder in encoders]
    guide = families[0] if len(set(families)) == 1 else " + ".join(families)
    latents = " + ".join(map(str, vae.latent_dims))
    return (
        f"{dataset.name}: {sizes} train / valid / test, {dataset.preprocess.describe()}. "
        f"{type(vae).__name__} with {latents} latents: prior {prior}, likelihood {likelihood}, "
        f"guide {guide}; {weights:,} weights."
    )


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    shown = ("elbo", "reconstruction", "kl", "valid_elbo")
    terms = "  ".join(f"{name} {row[name]:.2f}" for name in shown if name in row)
    return f"epoch {row['epoch']}/{epochs}  {terms}  ({row['seconds']:.2f} s)"
