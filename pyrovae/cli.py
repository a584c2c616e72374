"""The `pyrovae` command: every flag is an argument of a function here or of a part."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
import resource
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from pyrovae import data, guides, likelihoods, nets, objectives, plotting, priors
from pyrovae.data import DataSet, Preprocess, Split
from pyrovae.evidence import LogPx, log_px
from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.nets import MLP, Net
from pyrovae.objectives import ELBO, Objective
from pyrovae.priors import Prior, StandardNormal
from pyrovae.runs import Run, load, model_config, save
from pyrovae.training import NonFiniteLoss, Options, check_data, fit
from pyrovae.vae import VAE

Shape = tuple[int, ...]

PARTS: dict[str, tuple[ModuleType, type]] = {
    "prior": (priors, Prior),
    "likelihood": (likelihoods, Likelihood),
    "guide": (guides, Guide),
    "net": (nets, Net),
    "objective": (objectives, Objective),
}
"""Where the parts of each role are, and what they derive from."""


def train(
    data: str = "digits",
    data_root: str | None = None,
    kind: str | None = None,
    binarize: str | None = None,
    dequantize: bool | None = None,
    standardize: bool | None = None,
    missing: bool = False,
    data_seed: int = 777,
    prior: Callable[[int], Prior] = StandardNormal,
    likelihood: Callable[[Shape, int], Likelihood] | None = None,
    guide: Callable[[Shape, int], Guide] = guides.Normal,
    net: Net = MLP(),  # noqa: B008  (the command line shows and copies it)
    latent_dim: int = 50,
    objective: Callable[[], Objective] = ELBO,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 4e-3,
    schedule: str = "one-cycle",
    kl_warmup: int = 0,
    clip_norm: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
    compile: bool | None = None,
    num_particles: int = 5000,
    out: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train a VAE, estimate log p(x) of the test data, draw figures.

    Args:
        data: digits, mnist, fashion-mnist, binarized-mnist, omniglot, frey-faces; or your own: a
            .npy, .npz, .pt or .csv file, or a folder of images.
        data_root: Folder with the files of the named sets; default $PYROVAE_DATA.
        kind: How values are read: binary, grey, real or counts; default: detected.
        binarize: Grey pixels to zeros and ones: dynamic (afresh in training), fixed or none;
            default: dynamic for the named sets of digits and characters, else none.
        dequantize: Add uniform noise to grey levels; default: where they are not binarized.
        standardize: Scale real data to mean 0 and variance 1; default: yes.
        missing: NaN (an empty cell) marks a missing entry.
        data_seed: Of splits and of noise drawn once.
        prior: p(z); see pyrovae parts.
        likelihood: p(x|z); default: by the kind of data; see pyrovae parts.
        guide: q(z|x); see pyrovae parts.
        net: Network of likelihood and guide, unless they name their own.
        latent_dim: Number of latents.
        objective: What is maximised.
        epochs: Passes over the training data.
        batch_size: Data in a batch.
        lr: Highest learning rate.
        schedule: one-cycle, cosine or constant.
        kl_warmup: Epochs over which the weight of the KL rises to one.
        clip_norm: Bound on the norm of the gradient; default: none.
        patience: Stop after so many epochs without a better validation ELBO; default: never.
        seed: Of initial weights, data order and noise.
        seeds: Repeat with so many seeds, and report mean and spread.
        accelerator: auto, cpu, cuda, ...
        precision: 32-true or bf16-mixed.
        compile: Compile the training step; default: in runs long enough for it to pay.
        num_particles: Particles per datum of the test log p(x).
        out: Folder of the run; default: runs/DATA-TIME.
        resume: Folder of a run to continue exactly where it stopped; takes no other flags.
        overwrite: Replace the run in the folder.
    """
    raise NotImplementedError("signature and help of the command: run by _train")


def log_px_command(
    run: str,
    num_particles: int = 5000,
    method: str = "importance",
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
) -> None:
    """Estimate log p(x) of a run's test data, or of a file.

    Args:
        run: Folder of the run.
        num_particles: Particles per datum.
        method: importance.
        data: A file or named set to score instead, with the run's preprocessing.
        data_root: Folder with the files of the named sets; default $PYROVAE_DATA.
        seed: Of the noise.
        accelerator: auto, cpu, cuda, ...
    """
    folder, vae = _open(run)
    split = _split(folder, data, data_root)
    check_data(vae.model, vae.guide, split)
    Options(accelerator=accelerator).fabric().to_device(vae)
    result = _log_px(vae, split, num_particles, seed, method)
    name = "log_px" if data is None else f"log_px-{Path(data).stem}"
    folder.add_log_px(result, name)
    print(_wrapped(str(result)))
    print(f"Per datum: {folder.path / name}.csv")


def encode_command(
    run: str, data: str | None = None, out: str | None = None, data_root: str | None = None
) -> None:
    """Write mean and standard deviation of q(z|x) for a file, or for a run's test data.

    Args:
        run: Folder of the run.
        data: A file or named set to encode; default: the run's test data.
        out: An .npz file; default: RUN/codes.npz. It holds loc and scale (N, latent_dim), and y.
        data_root: Folder with the files of the named sets; default $PYROVAE_DATA.
    """
    folder, vae = _open(run)
    split = _split(folder, data, data_root)
    file = _writable(out or folder.path / "codes.npz", ".npz")
    with torch.no_grad():
        q = [vae.eval().posterior(split[slice(i, i + 1000)]) for i in range(0, len(split), 1000)]
    codes = {"loc": torch.cat([p.mean for p in q]), "scale": torch.cat([p.stddev for p in q])}
    if split.y is not None:
        codes["y"] = split.y
    arrays: dict[str, Any] = {name: code.numpy() for name, code in codes.items()}
    np.savez(file, **arrays)
    print(f"{len(split):,} codes in {file}")


def sample_command(run: str, num_samples: int = 64, out: str | None = None, seed: int = 0) -> None:
    """Draw from a run's model: a picture of the means, and the draws as numbers.

    Args:
        run: Folder of the run.
        num_samples: How many.
        out: An .npz file for x (draws) and mean; default: RUN/samples.npz.
        seed: Of the draws.
    """
    folder, vae = _open(run)
    file = _writable(out or folder.path / "samples.npz", ".npz")
    torch.manual_seed(seed)
    with torch.no_grad():
        px = vae.eval().likelihood(vae.prior().sample((_at_least_one(num_samples),)))
    np.savez(file, x=px.sample().numpy(), mean=px.mean.numpy())
    print(f"{num_samples:,} samples in {file}")


def plot_command(run: str, data_root: str | None = None) -> None:
    """Draw a run's figures again.

    Args:
        run: Folder of the run.
        data_root: Folder with the files of the named sets; default $PYROVAE_DATA.
    """
    folder, vae = _open(run)
    for path in _draw(folder, vae, _split(folder, None, data_root)):
        print(path)


def parts_command() -> None:
    """List priors, likelihoods, guides, nets and objectives, with their flags and papers."""
    for role in PARTS:
        print(f"\n--{role}")
        for name, part in _catalogue(role).items():
            print(_catalogue_entry(role, name, part))
    print("\nA part of your own is named module.Class, from a module on the Python path.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    sys.path.insert(0, "")  # so that a user's module.Class is found beside the run
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser.parse_args(_normalised(words) or ["--help"])
        settings = args[args.subcommand]
        if args.subcommand == "train":
            _train(parser, settings)
        else:
            COMMANDS[args.subcommand](**settings.as_dict())
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"pyrovae: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyrovae: stopped", file=sys.stderr)
        return 130
    return 0


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "log-px": log_px_command,
    "encode": encode_command,
    "sample": sample_command,
    "plot": plot_command,
    "parts": parts_command,
}


# Training -----------------------------------------------------------------------------------------


def _train(parser: ArgumentParser, settings: Namespace) -> None:
    if settings.resume:
        _resume(parser, settings)
        return
    if settings.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {settings.seeds}")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = Path(settings.out or f"runs/{Path(settings.data).stem}-{stamp}")
    _fill_parts(settings)
    if settings.seeds == 1:
        _one_run(parser, settings, out)
        return
    results = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        one = settings.clone()
        one.seed, one.seeds = seed, 1
        results.append(_one_run(parser, one, out / f"seed-{seed}"))
    _report_seeds(results, out)


def _resume(parser: ArgumentParser, settings: Namespace) -> None:
    run = Run.open(settings.resume)
    saved = run.config.get("settings")
    if saved is None:
        raise ValueError(f"{run.path} holds a saved model, not a run of pyrovae train")
    defaults = parser.parse_args(["train", "--resume", settings.resume]).train
    _fill_parts(defaults)
    _fill_parts(settings)
    changed = [n for n in vars(settings) if settings[n] != defaults[n]]
    if changed:
        raise ValueError(
            f"--resume goes on with the run's own settings: leave out --{_dashed(changed[0])}"
        )
    saved = parser.parse_object({"subcommand": "train", "train": saved}).train
    _one_run(parser, saved, run.path, resume=True)


def _one_run(parser: ArgumentParser, settings: Namespace, out: Path, resume: bool = False) -> LogPx:
    """Train, score and draw one run."""
    start = time.perf_counter()
    dataset = _load(settings)
    vae, objective = _build(parser, settings, dataset)
    for split in (dataset.train, dataset.valid, dataset.test):
        check_data(vae.model, vae.guide, split)
    options = Options(**{field.name: settings[field.name] for field in fields(Options)})
    options.fabric()
    if settings.num_particles < 1:
        raise ValueError(f"--num-particles must be at least 1, got {settings.num_particles}")
    run = Run(out) if resume else Run.create(out, settings.overwrite)
    if not resume:
        whole = Namespace(subcommand="train", train=settings)
        plain = json.loads(parser.dump(whole, format="json", skip_unset=False))
        preprocess = dataset.preprocess.to_config()
        run.describe(plain["train"], model=model_config(vae), preprocess=preprocess)
    print(_wrapped(_describe(dataset, vae)))
    history = _fit(options, run, vae, objective, dataset, resume)
    save(vae, run.path)
    trained = time.perf_counter() - start
    result = _log_px(vae, dataset.test, settings.num_particles, 0)
    run.add_log_px(result)
    _draw(run, vae, dataset.test)
    run.summarize(
        epochs=len(history),
        valid_elbo=max(row["valid_elbo"] for row in history),
        train_seconds=trained,
        seconds=time.perf_counter() - start,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    print(_wrapped(str(result)))
    print(f"Run in {run.path}, figures in {run.path / 'figures'}")
    return result


def _fit(
    options: Options,
    run: Run,
    vae: VAE,
    objective: Objective,
    dataset: DataSet,
    resume: bool,
) -> list[dict[str, Any]]:
    interactive = sys.stderr.isatty()
    every = max(1, options.epochs // 10)

    def on_epoch(_: Any, row: dict[str, Any]) -> None:
        run.add_epoch(row)
        if not interactive and row["epoch"] % every == 0:
            print(_epoch_line(row, options.epochs), flush=True)

    try:
        history = fit(
            vae,
            dataset.train,
            valid=dataset.valid,
            objective=objective,
            progress=interactive,
            on_epoch=on_epoch,
            checkpoint=run.checkpoint,
            resume=resume and run.checkpoint.exists(),
            **asdict(options),
        )
    except KeyboardInterrupt:
        print(f"\nStopped. Go on with: pyrovae train --resume {run.path}", file=sys.stderr)
        raise
    except NonFiniteLoss as error:
        kept = f"the last good checkpoint is {run.checkpoint}"
        raise NonFiniteLoss(f"{error}; {kept}") from error
    return history


def _load(settings: Namespace) -> DataSet:
    names = ("kind", "binarize", "dequantize", "standardize", "missing")
    options = {name: settings[name] for name in names}
    return data.load(settings.data, settings.data_root, seed=settings.data_seed, **options)


def _fill_parts(settings: Namespace) -> None:
    """Give parts that name no network the one of --net."""
    for role in ("likelihood", "guide"):
        part = settings[role]
        if part is not None and "net" in part.init_args and part.init_args.net is None:
            part.init_args.net = settings.net.clone()


def _build(parser: ArgumentParser, settings: Namespace, dataset: DataSet) -> tuple[VAE, Objective]:
    """The VAE that the settings describe, with weights by the seed, and its objective."""
    made = parser.instantiate(Namespace(subcommand="train", train=settings.clone())).train
    likelihood = made.likelihood or _default_likelihood(dataset.kind)
    shape, latents = dataset.shape, settings.latent_dim
    torch.manual_seed(settings.seed)
    extra = {} if made.likelihood else {"net": made.net}
    vae = VAE(
        made.prior(latents),
        likelihood(shape, latents, **extra),
        made.guide(shape, latents),
        missing=settings.missing,
    )
    return vae, made.objective()


def _default_likelihood(kind: str) -> type[Likelihood]:
    """The first likelihood that is made for this kind of data."""
    parts = _catalogue("likelihood").values()
    return next(part for part in parts if part.kind == kind)


def _report_seeds(results: Sequence[LogPx], out: Path) -> None:
    means = torch.tensor([result.mean for result in results], dtype=torch.float64)
    summary = {
        "mean": float(means.mean()),
        "std": float(means.std()),
        "mean_std_error": float(means.std()) / len(means) ** 0.5,
        "values": means.tolist(),
        "num_particles": results[0].num_particles,
        "data": results[0].data,
    }
    (out / "seeds.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"log p(x) over {len(means)} seeds: {summary['mean']:.2f} nats, standard deviation "
        f"{summary['std']:.2f}, standard error of the mean {summary['mean_std_error']:.2f}; "
        f"in {out / 'seeds.json'}"
    )


# Using a run --------------------------------------------------------------------------------------


def _open(path: str) -> tuple[Run, VAE]:
    run = Run.open(path)
    vae = load(run.path)
    if not isinstance(vae, VAE):
        raise ValueError(f"{path} holds a {type(vae).__name__}, not a VAE")
    return run, vae


def _split(run: Run, source: str | None, root: str | None) -> Split:
    """The run's test data, or a file as the run's model sees it."""
    settings, preprocess = run.config.get("settings"), run.config.get("preprocess")
    if settings is None or preprocess is None:
        raise ValueError(f"{run.path} holds a saved model without data: use it from Python")
    if source is not None:
        return data.file_split(source, Preprocess.from_config(preprocess), root)
    settings["data_root"] = root or settings["data_root"]
    return _load(Namespace(settings)).test


def _log_px(
    vae: VAE, split: Split, num_particles: int, seed: int, method: str = "importance"
) -> LogPx:
    progress = sys.stderr.isatty()
    options: dict[str, Any] = {"method": method, "seed": seed, "progress": progress}
    return log_px(vae.model, vae.guide, split, num_particles, **options)


def _draw(run: Run, vae: VAE, split: Split) -> list[Path]:
    values = run.per_datum("log_px")
    if values is not None and len(values) != len(split):
        values = None
    vae.cpu()
    x = split[slice(0, len(split))]
    figures = plotting.figures(vae, x, split.y, run.metrics(), values)
    return run.add_figures(figures)


def _writable(path: str | Path, suffix: str) -> Path:
    file = Path(path)
    if file.suffix != suffix:
        raise ValueError(f"--out must be a {suffix} file, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"--out {file}: there is no folder {file.parent}")
    return file


def _at_least_one(num_samples: int) -> int:
    if num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {num_samples}")
    return num_samples


# Words --------------------------------------------------------------------------------------------


def _describe(dataset: DataSet, vae: VAE) -> str:
    sizes = " / ".join(f"{len(s):,}" for s in (dataset.train, dataset.valid, dataset.test))
    weights = sum(p.numel() for p in vae.parameters())
    parts = (vae.prior, vae.likelihood, vae.encoder)
    prior, likelihood, guide = (type(part).__name__ for part in parts)
    return (
        f"{dataset.name}: {sizes} train / valid / test, {dataset.preprocess.describe()}. "
        f"VAE with {vae.prior.latent_dim} latents: prior {prior}, likelihood {likelihood}, guide "
        f"{guide}; {weights:,} weights."
    )


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    shown = ("elbo", "reconstruction", "kl", "valid_elbo")
    terms = "  ".join(f"{name} {row[name]:.2f}" for name in shown if name in row)
    return f"epoch {row['epoch']}/{epochs}  {terms}  ({row['seconds']:.2f} s)"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100)


def _catalogue(role: str) -> dict[str, Any]:
    """The parts of one role, by name."""
    module, base = PARTS[role]
    parts = {name: getattr(module, name) for name in module.__all__}
    is_part = {n: inspect.isclass(p) and issubclass(p, base) for n, p in parts.items()}
    return {n: part for n, part in parts.items() if is_part[n] and part is not base}


def _catalogue_entry(role: str, name: str, part: type) -> str:
    doc = inspect.cleandoc(part.__doc__ or "")
    lines = [f"  {name}: {doc.splitlines()[0]}"]
    own = list(inspect.signature(part).parameters.values())
    flags = [p for p in own if p.name not in ("shape", "latent_dim", "net")]
    lines += [f"      --{role}.{_dashed(p.name)} {_default(p)}" for p in flags]
    if "References:" in doc:
        paper = " ".join(doc.split("References:")[1].split())
        lines.append(textwrap.fill(paper, 94, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"(default {parameter.default})"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# Parsing ------------------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    """A parser whose errors are one line, and whose flags are written with dashes."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ValueError(_one_line(message))

    def format_help(self) -> str:
        return re.sub(r"--[\w.-]+", lambda match: _dashed(match[0]), super().format_help())


def _parser() -> ArgumentParser:
    parser = _Parser(prog="pyrovae", description="Variational autoencoders as Pyro programs.")
    commands = parser.add_subcommands(required=True)
    for name, function in COMMANDS.items():
        command = _Parser(description=inspect.cleandoc(function.__doc__ or "").splitlines()[0])
        command.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, command, help=command.description)
    return parser


def _normalised(argv: Sequence[str]) -> list[str]:
    """Flags with underscores, and switches (`--missing`) with their value."""
    words: list[str] = []
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        words.append(flag + equals + value)
        following = argv[i + 1].lower() if i + 1 < len(argv) else ""
        if flag in SWITCHES and not equals and following not in ("true", "false"):
            words.append("true")
    return words


SWITCHES = {
    f"--{name}"
    for function in COMMANDS.values()
    for name, parameter in inspect.signature(function).parameters.items()
    if "bool" in str(parameter.annotation)
}


def _one_line(message: str) -> str:
    """An error of the parser in our words, with the nearest name where one is unknown."""
    words = " ".join(message.split())
    if found := re.search(r'"(\w+)":.* Expected a dot import path string: (\S+)', words):
        role = found[1].split(".")[-1]
        known = list(_catalogue(role))
        return (
            f"--{found[1]}: there is no {role} called {found[2]!r}{_nearest(found[2], known)}; "
            f"known are {', '.join(known)}, and your own as module.Class (see pyrovae parts)"
        )
    if found := re.search(r"[Uu]nrecognized arguments: --([\w.-]+)", words):
        flags = [p for f in COMMANDS.values() for p in inspect.signature(f).parameters]
        near = _nearest(found[1], [_dashed(flag) for flag in flags], "--")
        return f"there is no flag --{_dashed(found[1])}{near}; see pyrovae --help"
    if found := re.search(r"\"([\w.]+)\":.* Option '([\w.]+)' is not accepted", words):
        return f"--{found[1]}.{_dashed(found[2])}: there is no such option, or the {found[1]} is not named; see pyrovae parts"
    if found := re.search(r"\"([\w.]+)\": Expected a <class '(\w+)'>. Got value: (.+)", words):
        return f"--{_dashed(found[1])} must be of type {found[2]}, got {found[3]!r}"
    return words


def _nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, 1, 0.5)
    return f" (did you mean {prefix}{by_lower[found[0]]}?)" if found else ""


if __name__ == "__main__":
    sys.exit(main())
