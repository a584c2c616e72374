"""`pyrovae train`: build what the flags say, train, score, draw; once, or with several seeds."""

from __future__ import annotations

import inspect
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pyrovae import _processes, data, guides, nets, objectives, plotting, priors
from pyrovae._build import INFERENCE, LEARNING_LABELS, MODELS, arranged, build, load_data
from pyrovae._catalogue import ROLES, expected
from pyrovae._config import Config
from pyrovae.data import DataSet, Split
from pyrovae.evidence import Classification, latents, log_px
from pyrovae.hierarchical import HierarchicalVAE
from pyrovae.objectives import Objective
from pyrovae.options import Options
from pyrovae.program import Refused, as_args
from pyrovae.runs import Run, model_config, save
from pyrovae.semisupervised import SemiSupervisedVAE
from pyrovae.training import NonFiniteLoss, fit
from pyrovae.vae import Base

SECTIONS = {
    "data": "Data",
    "model": "Model",
    "objective": "Training",
    "num_particles": "Result",
}
"""Where the help of the command begins a new group of flags."""

OF_THE_FOLDER = ("out", "resume", "overwrite")


@dataclass(frozen=True)
class Settings:
    """Train a VAE, estimate log p(x) of the test data, draw figures.

    Without flags: the handwritten digits that come with scikit-learn, in under two minutes. Parts
    (prior, likelihood, guide, net, objective) are listed by pyrovae parts, with flags of their own.

    Example:
        pyrovae train
        pyrovae train --data faces/ --likelihood Normal --likelihood.scale 0.1 --net Conv
        pyrovae train --data table.csv --missing --latent-dim 5 --out runs/table
        pyrovae train --resume runs/table

    Args:
        data: digits, mnist, fashion-mnist, binarized-mnist, omniglot, frey-faces; or your own: a
            .npy, .npz, .pt or .csv file, or a folder of images.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
        kind: How values are read: binary, grey, levels, real or counts; default: levels or counts
            where the likelihood named is of those, else detected.
        binarize: Grey pixels to zeros and ones: dynamic (drawn afresh in training), fixed (drawn
            once) or none; default: none where the likelihood named is of anything but zeros and
            ones, else dynamic for the named sets of digits and characters, none for others.
        dequantize: Add uniform noise to grey levels; default: where they are not binarized.
        standardize: Scale real data to mean 0 and variance 1; default: yes.
        missing: NaN, or an empty cell, marks a missing entry.
        data_seed: Seed of splits and of noise that is drawn once.
        model: vae; conditional, of the data given their labels; semi-supervised, which learns the
            labels from few; or auxiliary, the same with another layer of latents (Maaloe et al.,
            2016).
        labels: How many training data keep their label, as many of each class, chosen by --seed;
            default: all.
        prior: p(z).
        conditional_prior: p(z|y), a normal by a network of the label, in the place of p(z).
        likelihood: p(x|z); default: Bernoulli for binary data, and so on by the kind of data.
        guide: q(z|x); below the top of several layers inferred top-down, where a diagonal normal is
            needed, the default takes the place of one that is none.
        net: Network of likelihood, guide and classifier; --guide.net and --likelihood.net give one
            its own. One
            for images has the default in its place between layers of latents.
        latent_dim: Number of latents; several, such as 100,50, make as many layers, the first next
            to the data, each with guide and net of its own.
        inference: Order in which the guide goes through several layers: bottom-up, or top-down as
            in ladder VAEs, which want --net.batch-norm; default: bottom-up.
        objective: What is maximised.
        epochs: Passes over the training data.
        batch_size: Data in a batch.
        lr: Learning rate, the highest of the schedule.
        schedule: Of the learning rate: one-cycle, cosine or constant.
        kl_warmup: Epochs over which the weight of the KL rises to one; default: a quarter.
        clip_norm: Bound on the norm of the gradient per datum, such as 100 where training is thrown
            back again and again; default: none.
        patience: Stop after so many epochs without a better validation ELBO; default: never.
        seed: Seed of initial weights, order of data and noise.
        seeds: Train with so many seeds, from --seed on, and report mean and spread.
        accelerator: Where to compute: auto, cpu, cuda or mps.
        precision: 32-true, or bf16-mixed for speed.
        compile: Compile the training step; default: in runs long enough for it to pay.
        devices: Processes that share each batch and the test data, one on each device of this
            machine; under torchrun and SLURM, their number.
        num_particles: Particles per datum in the estimate of the test log p(x).
        out: Folder of the run; default: runs/DATA-TIME.
        resume: Go on with the run in this folder exactly where it stopped; takes no other flag.
        overwrite: Replace the run that is in the folder.
    """

    data: str = "digits"
    data_root: str | None = None
    kind: str | None = None
    binarize: str | None = None
    dequantize: bool | None = None
    standardize: bool | None = None
    missing: bool = False
    data_seed: int = 777
    model: str = "vae"
    labels: int | None = None
    prior: Config | str = priors.DEFAULT.__name__
    conditional_prior: bool = False
    likelihood: Config | None = None
    guide: Config | str = guides.DEFAULT.__name__
    net: Config | str = nets.DEFAULT.__name__
    latent_dim: int | Sequence[int] = 50
    inference: str | None = None
    objective: Config | str = objectives.DEFAULT.__name__
    epochs: int = 200
    batch_size: int = 128
    lr: float = 4e-3
    schedule: str = "one-cycle"
    kl_warmup: int | None = None
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    seeds: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    compile: bool | None = None
    devices: int = 1
    num_particles: int = 5000
    out: str | None = None
    resume: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        self._check_layers()
        self._check_labels()
        for name in ("seeds", "devices", "num_particles"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, name)}")
        if 1 <= self.batch_size < self.devices:
            raise ValueError(
                f"--devices must be at most --batch-size, {self.batch_size}, which the processes "
                f"share, got {self.devices}"
            )
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**63 - 1_000_000:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be a number from 0 on, got {getattr(self, name)}")
        if not self.data:
            raise ValueError("--data must be a name, a file or a folder, got nothing")

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """Number of latents of each layer, from the data up."""
        return (self.latent_dim,) if isinstance(self.latent_dim, int) else tuple(self.latent_dim)

    def _check_layers(self) -> None:
        if min(self.latent_dims, default=0) < 1:
            got = ",".join(map(str, self.latent_dims)) or "nothing"
            raise ValueError(f"--latent-dim must be at least 1, got {got}")
        if self.inference not in (None, *INFERENCE):
            known = " or ".join(INFERENCE)
            raise ValueError(f"--inference must be {known}, got {self.inference!r}")
        if self.inference and len(self.latent_dims) < 2:
            raise ValueError(
                "--inference is for several layers of latents: give the number in each, such as "
                "--latent-dim 100,50"
            )

    def _check_labels(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.model != "vae" and len(self.latent_dims) > 1:
            raise ValueError(
                f"--model {self.model} has one layer of latents: give one --latent-dim"
            )
        if self.labels is not None and self.model not in LEARNING_LABELS:
            raise ValueError(
                f"--labels is for models that learn them, {' and '.join(LEARNING_LABELS)}: name "
                "one with --model"
            )
        if self.conditional_prior and self.model == "vae":
            raise ValueError("--conditional-prior is for models with a label: name one by --model")

    def plain(self) -> dict[str, Any]:
        """As a run keeps them: without its folder, and with paths that hold from everywhere."""
        settings = {n: value for n, value in asdict(self).items() if n not in OF_THE_FOLDER}
        if self.data not in data.NAMES:
            settings["data"] = str(Path(self.data).expanduser().resolve())
        if self.data_root is not None:
            settings["data_root"] = str(Path(self.data_root).expanduser().resolve())
        return settings


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


def saved_settings(run: Run) -> Settings:
    """The settings of a run.

    Raises:
        ValueError: If the folder holds a model alone, or settings of another version.
    """
    saved = run.config.get("settings")
    if saved is None:
        raise ValueError(f"{run.path} holds a saved model, not a run of pyrovae train")
    _check_saved(saved, run.path)
    try:
        return Settings(**saved)
    except TypeError as error:
        raise ValueError(f"{run.path} is of another version of pyrovae: {error}") from error


def _check_saved(saved: Any, path: Path) -> None:
    """Refuse settings that no command wrote."""
    if not isinstance(saved, dict):
        raise ValueError(f"the settings in {path} are damaged: expected an object")
    known = inspect.signature(Settings).parameters
    for name, hint in get_type_hints(Settings).items():
        if name in saved and not _fits(saved[name], get_args(hint) or (hint,)):
            what = "class_path and init_args" if name in ROLES else expected(known[name])
            raise ValueError(f"the settings in {path} are damaged: {name} must be {what}")


def _fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value read from JSON is of one of these kinds."""
    if Config in kinds:
        return _is_config(value) or (value is None and type(None) in kinds)
    plain = tuple(list if get_origin(kind) else kind for kind in kinds)
    return isinstance(value, (*plain, int) if float in plain else plain)


def _is_config(value: Any) -> bool:
    """Whether it is the configuration of a part, those of the parts inside included."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("class_path"), str)
        and isinstance(value.get("init_args"), dict)
        and all(_is_config(v) for v in value["init_args"].values() if isinstance(v, dict))
    )


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


def options(settings: Settings) -> Options:
    """What `fit` takes of the settings, checked."""
    return Options(**{field.name: getattr(settings, field.name) for field in fields(Options)})


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
