"""The commands that judge a run: `log-px`, `gaps`, `compare`, `posterior`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyrovae import _catalogue, _processes, evidence, plotting
from pyrovae._build import made
from pyrovae._config import Config
from pyrovae._opened import opened, test_data
from pyrovae._random import ASIDE, key
from pyrovae._train import classified, given, wrapped
from pyrovae.evidence import Bracket, LogPx, Method, compare, gaps, latents
from pyrovae.evidence.cost import Forecast
from pyrovae.evidence.keep import OtherEstimate, files
from pyrovae.options import Options
from pyrovae.program import as_args
from pyrovae.runs import Run, write_arrays
from pyrovae.semisupervised import SemiSupervisedVAE
from pyrovae.training import check_data
from pyrovae.vae import VAE

DEFAULT_METHOD = "importance"
"""Of log-px; its files have the plain name."""

LONG = 5.0
"""Seconds from which on a command says how long it will take."""


def log_px_command(
    run: str,
    method: Config | str = DEFAULT_METHOD,
    num_particles: int | None = None,
    refine: int = 0,
    num_data: int | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
) -> None:
    """Estimate log p(x) of a run's test data, or of a file, and what the latents carry.

    Prints the estimate with its errors, then rate and distortion, how many latents are active and
    how much they share with the data. Writes both to the run's folder, with a row per datum and a
    row per latent; estimates by several methods lie beside each other.

    What takes long says so before it begins. Stopped or killed, the same command goes on from
    there, and comes to the same.

    Example:
        pyrovae log-px runs/one
        pyrovae log-px runs/one --method annealed --method.num-distributions 1000
        pyrovae log-px runs/one --method bidirectional --num-data 50

    Args:
        run: Folder of the run.
        method: How to estimate: importance, annealed or exact; or bidirectional, which brackets
            log p(x) of data drawn from the model, and so tells how far annealing is from the truth.
            Each has flags of its own, listed by pyrovae parts.
        num_particles: Particles or chains per datum; default: as many as the method takes.
        refine: Steps in which the guide is fitted to each datum before it is used.
        num_data: Data that bidirectional draws; default: 100.
        data: File or named set to score instead, treated as the run's own data were.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
        seed: Seed of the noise.
        accelerator: Where to compute: auto, cpu, cuda or mps.
        devices: Processes that share the data, one on each device of this machine; under torchrun
            and SLURM, their number. The estimate is the same.
    """
    estimator = made("method", method, {})
    _check_log_px(estimator, refine, num_data, devices)
    folder, vae = opened(run)
    split = test_data(folder, data, data_root)
    check_data(vae.model, vae.guide, split)
    Options(accelerator=accelerator).fabric(devices).to_device(vae)
    stem = "" if data is None else f"-{Path(data).stem}"
    noise: dict[str, Any] = {"seed": seed, "progress": sys.stderr.isatty()}
    how: dict[str, Any] = {"method": estimator, "num_particles": num_particles, **noise}
    program: Any = (vae.model, vae.guide, split)
    name = f"{_estimate_name(estimator, refine)}{stem}"
    unfinished = folder.path / f"{name}.partial"
    ask: Callable[..., Any] = partial(evidence.log_px, *program, **how)
    if estimator.simulates:
        drawn = 100 if num_data is None else num_data
        ask = partial(evidence.validate, *program, num_data=drawn, **how)
    elif refine:
        fit = noise | {"seed": key(seed, ASIDE)}
        refined = evidence.refine(*program, steps=refine, **fit)
        ask = partial(evidence.log_px, *refined, **how)
    result = _going_on(ask, unfinished)
    if not _processes.leads():
        return
    _write(folder, result, name, refine)
    for file in files(unfinished):
        file.unlink()
    print(wrapped(str(result)), flush=True)
    written = [f"Per datum: {folder.path / name}.csv"]
    if not estimator.simulates:
        carried = latents(vae.model, vae.guide, given(vae, split), **noise)
        folder.add_latents(carried, f"latents{stem}")
        print(wrapped(str(carried)))
        written.append(f"Per latent: {folder.path / 'latents'}{stem}.csv")
    print("\n".join(written))


def gaps_command(
    run: str,
    num_data: int = 100,
    method: Config | str = "annealed",
    steps: int = 200,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
) -> None:
    """Say where the nats between log p(x) and the ELBO go, and which latents have collapsed.

    The approximation gap is lost by the guide's family, the amortization gap by its network. Prints
    both with their errors, and writes them to the run's folder, with a row per datum. Of a model
    that learns a label they are those of log p(x, y), y known or predicted.

    Args:
        run: Folder of the run.
        num_data: How many of the test data to take, evenly spread.
        method: How to estimate log p(x), from the refined guide; see pyrovae parts.
        steps: In which the guide is refined for each datum.
        data: File or named set to take instead, treated as the run's own data were.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
        seed: Seed of the noise.
        accelerator: Where to compute: auto, cpu, cuda or mps.
    """
    if num_data < 1:
        raise ValueError(f"--num-data must be at least 1, got {num_data}")
    estimator = made("method", method, {})
    folder, vae = opened(run)
    split = test_data(folder, data, data_root)
    check_data(vae.model, vae.guide, split)
    Options(accelerator=accelerator).fabric().to_device(vae)
    how: dict[str, Any] = {"seed": seed, "progress": sys.stderr.isatty()}
    count = min(num_data, len(split))
    index = torch.arange(count) * len(split) // count
    split = given(vae, split)  # a label that is summed out has no gap of its own
    found = gaps(vae.model, vae.guide, split.subset(index), method=estimator, steps=steps, **how)
    name = "gaps" if data is None else f"gaps-{Path(data).stem}"
    folder.add_gaps(found, index, name)
    print(wrapped(str(found)))
    print(wrapped(latents(vae.model, vae.guide, split, **how).collapse))
    print(f"Per datum: {folder.path / name}.csv")


def compare_command(
    runs: Sequence[str], method: str = DEFAULT_METHOD, refined: bool = False
) -> None:
    """Compare runs by log p(x) of the same test data, datum by datum.

    Prints a table in Markdown of what pyrovae train and pyrovae log-px wrote: each run's log p(x),
    and its difference to the first run with the error that a paired difference has. A folder with
    several seeds counts as one model, by its mean over seeds.

    Example:
        pyrovae compare runs/normal runs/iaf runs/full-rank
        pyrovae compare runs/normal runs/iaf --method annealed

    Args:
        runs: Folders of two runs or more.
        method: By which log p(x) was estimated.
        refined: Take what pyrovae log-px --refine found.
    """
    names = [os.path.normpath(run) for run in runs]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{twice[0]} is named twice: name each run once")
    estimator = _catalogue.find("method", method)()
    if estimator.simulates:
        raise ValueError(f"--method: {method} says nothing of the test data: name another")
    models = {name: Run.open(name).seeds for name in names}
    _check_same_test_data([run for runs_of_one in models.values() for run in runs_of_one])
    found = {name: [_log_px_of(r, estimator, refined) for r in models[name]] for name in names}
    print(compare(found))


def classify_command(
    run: str, data: str | None = None, out: str | None = None, data_root: str | None = None
) -> None:
    """Write the probability of each class, for a run's test data or for a file.

    For models that learn a label. The CSV has a row per datum: index, predicted, label where one is
    known, and p0, p1, ...; where labels are known, the error and how well calibrated the
    probabilities are is printed, and written beside it as JSON.

    Example:
        pyrovae classify runs/few --data new.npy

    Args:
        run: Folder of the run.
        data: File or named set to classify instead, treated as the run's own data were.
        out: A .csv file; default: RUN/classes.csv, with the name of the data if they are given.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
    """
    folder, vae = opened(run)
    if not isinstance(vae, SemiSupervisedVAE):
        raise ValueError(
            f"{run} holds a {type(vae).__name__}, which learns no label: train one by --model "
            "semi-supervised or auxiliary"
        )
    file = Path(out or folder.path / f"classes{'' if data is None else f'-{Path(data).stem}'}.csv")
    if file.suffix != ".csv" or not file.parent.is_dir():
        raise ValueError(f"--out must be a .csv file in a folder that is there, got {file}")
    split = test_data(folder, data, data_root)
    check_data(vae.model, vae.guide, split)
    probs, found = classified(vae, split)
    folder.add_classes(probs, found, file)
    if found is not None:
        print(wrapped(str(found)))
    print(f"{len(probs):,} data in {file}")


def posterior_command(
    run: str,
    index: int = 0,
    num_samples: int = 1000,
    num_chains: int = 4,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
) -> None:
    """Draw from the posterior of one datum, by Hamiltonian Monte Carlo, beside the guide's.

    Prints how far the chains agree and how far the guide is off. Writes both to the run's folder:
    figures/posterior-INDEX.png shows the latents in which they differ most, and
    posterior-INDEX.npz holds z (chains, draws, latents) of the posterior and guide_z of the guide,
    with R-hat and effective sample sizes; layers of latents have their own names.

    Args:
        run: Folder of the run.
        index: Which of the run's test data, counted from 0.
        num_samples: Draws of each chain.
        num_chains: Chains, at least 2.
        data: File or named set to take the datum from, treated as the run's own data were.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
        seed: Seed of the noise.
    """
    folder, vae = opened(run)
    split = test_data(folder, data, data_root)
    if not 0 <= index < len(split):
        raise ValueError(f"--index must be from 0 to {len(split) - 1}, got {index}")
    one = split.subset(torch.tensor([index]))
    check_data(vae.model, vae.guide, one)
    found = evidence.posterior(
        *(vae.model, vae.guide, one),
        num_samples=num_samples,
        num_chains=num_chains,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    decodes = vae if isinstance(vae, VAE) else None
    name = f"posterior-{index}" if data is None else f"posterior-{Path(data).stem}-{index}"
    figure = plotting.posterior(found, vae=decodes, x=as_args(one[slice(0, 1)])[0])
    (picture,) = folder.add_figures({name: figure})
    file = folder.path / f"{name}.npz"
    write_arrays(file, found.arrays())
    print(wrapped(str(found)))
    print(f"Draws: {file}\nFigure: {picture}")


def _check_log_px(estimator: Method, refine: int, num_data: int | None, devices: int) -> None:
    """Refuse flags that are out of range or that this method has no use for."""
    for name, value, least in (("devices", devices, 1), ("refine", refine, 0)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if estimator.simulates and refine:
        raise ValueError(
            f"--refine fits the guide to data that there are, and {estimator.name} draws its own: "
            "leave it out"
        )
    if num_data is not None and not estimator.simulates:
        raise ValueError(
            f"--num-data says how many data to draw, and {estimator.name} draws none: leave it out"
        )
    if num_data is not None and num_data < 1:
        raise ValueError(f"--num-data must be at least 1, got {num_data}")


def _estimate_name(estimator: Method, refine: int) -> str:
    """What the files of an estimate are called."""
    if estimator.simulates:
        return estimator.name
    of_method = "" if estimator.name == DEFAULT_METHOD else f"-{estimator.name}"
    return f"log_px{of_method}{'-refined' if refine else ''}"


def _announce(told: Forecast) -> None:
    """Say what is ahead, if it is long or part of it is done."""
    if _processes.leads() and (told.seconds > LONG or told.num_left < told.num_data):
        print(wrapped(f"{told}."), flush=True)


def _going_on(ask: Callable[..., Any], unfinished: Path) -> Any:
    """An estimate, from where it was left if it was; blocks of another one are thrown away."""
    try:
        try:
            return ask(shared=True, keep=unfinished, announce=_announce)
        except OtherEstimate as error:
            if _processes.leads():
                print(wrapped(f"{error}: begun anew."), flush=True)
                for file in files(unfinished):
                    file.unlink()
            _processes.gather(None)  # the others find the files gone
            return ask(shared=True, keep=unfinished, announce=_announce)
    except KeyboardInterrupt:
        if _processes.leads() and files(unfinished):
            print("\nStopped. The same command goes on from here.", file=sys.stderr)
        raise


def _write(folder: Run, result: Any, name: str, refine: int) -> None:
    """Write an estimate, or bounds, to a run's folder."""
    if isinstance(result, Bracket):
        folder.add_bracket(result, name)
        return
    if refine:
        how = f"{result.how}, the guide fitted to each datum in {refine:,} steps"
        settings = result.settings | {"refine": refine}
        result = replace(result, how=how, settings=settings)
    folder.add_log_px(result, name)


def _check_same_test_data(runs: Sequence[Run]) -> None:
    """Refuse runs whose test data differ, whatever they are called."""
    first, *others = [(run.path, run.config.get("data", {}).get("test")) for run in runs]
    for path, found in others:
        if found != first[1]:
            raise ValueError(
                f"{first[0]} and {path} were made with different test data, or one is no run of "
                "pyrovae train: only the same data can be compared datum by datum"
            )


def _log_px_of(run: Run, estimator: Method, refined: bool) -> LogPx:
    """What was found of the run's test data by this method."""
    name = _estimate_name(estimator, refined)
    found = run.log_px(name)
    if found is None:
        raise ValueError(
            f"{run.path} has no {name}.json: make it with pyrovae log-px {run.path} "
            f"--method {estimator.name}" + " --refine 200" * refined
        )
    return found
