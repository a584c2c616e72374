"""The `pyrovae` command: every flag is an argument of a function here or of a part."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyrovae
from pyrovae import _catalogue, _flags, _processes, data
from pyrovae._catalogue import ROLES, dashed
from pyrovae._processes import ProcessLost
from pyrovae._train import (
    SECTIONS,
    Settings,
    check_same_data,
    draw,
    load_data,
    saved_settings,
    train,
    wrapped,
)
from pyrovae.checkpoint import replacing
from pyrovae.data import Preprocess, Split
from pyrovae.evidence import latents, log_px
from pyrovae.options import Options
from pyrovae.runs import Run, load
from pyrovae.training import NonFiniteLoss, check_data
from pyrovae.vae import VAE


def log_px_command(
    run: str,
    num_particles: int = 5000,
    method: str = "importance",
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
) -> None:
    """Estimate log p(x) of a run's test data, or of a file, and what the latents carry.

    Prints the estimate with its errors, then rate and distortion, how many latents are active and
    how much they share with the data. Writes both to the run's folder, with a row per datum and a
    row per latent.

    Args:
        run: Folder of the run.
        num_particles: Particles per datum.
        method: How to estimate.
        data: File or named set to score instead, treated as the run's own data were.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
        seed: Seed of the noise.
        accelerator: Where to compute: auto, cpu, cuda or mps.
        devices: Processes that share the data, one on each device of this machine; under torchrun
            and SLURM, their number. The estimate is the same.
    """
    if devices < 1:
        raise ValueError(f"--devices must be at least 1, got {devices}")
    folder, vae = _open(run)
    split = _split(folder, data, data_root)
    check_data(vae.model, vae.guide, split)
    Options(accelerator=accelerator).fabric(devices).to_device(vae)
    how: dict[str, Any] = {"method": method, "seed": seed, "progress": sys.stderr.isatty()}
    result = log_px(vae.model, vae.guide, split, num_particles, shared=True, **how)
    if not _processes.leads():
        return
    carried = latents(vae.model, vae.guide, split, seed=seed, progress=how["progress"])
    suffix = "" if data is None else f"-{Path(data).stem}"
    folder.add_log_px(result, f"log_px{suffix}")
    folder.add_latents(carried, f"latents{suffix}")
    print(wrapped(str(result)))
    print(wrapped(str(carried)))
    print(f"Per datum: {folder.path / 'log_px'}{suffix}.csv")
    print(f"Per latent: {folder.path / 'latents'}{suffix}.csv")


def encode_command(
    run: str, data: str | None = None, out: str | None = None, data_root: str | None = None
) -> None:
    """Write mean and standard deviation of q(z|x) for a run's test data, or for a file.

    The .npz file holds loc and scale, both of shape (N, latent_dim), and labels y if there are any.
    Of several layers of latents it is the one next to the data that is written.

    Args:
        run: Folder of the run.
        data: File or named set to encode instead, treated as the run's own data were.
        out: An .npz file; default: RUN/codes.npz.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
    """
    folder, vae = _open(run)
    split = _split(folder, data, data_root)
    file = _writable(out or folder.path / "codes.npz")
    with torch.no_grad():
        q = [vae.eval().posterior(split[slice(i, i + 1000)]) for i in range(0, len(split), 1000)]
        codes = {"loc": torch.cat([p.mean for p in q]), "scale": torch.cat([p.stddev for p in q])}
    _save_arrays(file, codes if split.y is None else codes | {"y": split.y})
    print(f"{len(split):,} codes in {file}")


def sample_command(run: str, num_samples: int = 64, out: str | None = None, seed: int = 0) -> None:
    """Draw from a run's model: z from the prior, then x from p(x|z).

    The .npz file holds x, the draws, and mean, the mean of p(x|z) at each z. Data that were
    standardized come in their own units. For pictures see pyrovae plot.

    Args:
        run: Folder of the run.
        num_samples: How many.
        out: An .npz file; default: RUN/samples.npz.
        seed: Seed of the draws.
    """
    if num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {num_samples}")
    folder, vae = _open(run)
    file = _writable(out or folder.path / "samples.npz")
    torch.manual_seed(seed)
    with torch.no_grad():
        px = vae.eval().likelihood(vae.sample_latent(num_samples))
        drawn = {"x": px.sample(), "mean": px.mean}
    preprocess = folder.config.get("preprocess")
    _save_arrays(file, {name: _in_own_units(preprocess, x) for name, x in drawn.items()})
    print(f"{num_samples:,} samples in {file}")


def plot_command(run: str, data_root: str | None = None) -> None:
    """Draw a run's figures again: RUN/figures/*.png.

    Args:
        run: Folder of the run.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
    """
    folder, vae = _open(run)
    for path in draw(folder, vae, _split(folder, None, data_root)):
        print(path)


def parts_command() -> None:
    """List priors, likelihoods, guides, nets and objectives: when to use them, flags, papers."""
    for role in ROLES:
        print(f"--{role} NAME")
        for name, part in _catalogue.parts(role).items():
            print(_catalogue.entry(role, name, part))
        print()
    print("A part of your own is named module.Class, from a module in this folder or on the path.")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": Settings,  # type: ignore[dict-item]
    "log-px": log_px_command,
    "encode": encode_command,
    "sample": sample_command,
    "plot": plot_command,
    "parts": parts_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append("")  # a user's module.Class is found beside the run
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except (ValueError, OSError, NonFiniteLoss, ProcessLost) as error:
        where = "pyrovae" if _processes.leads() else f"pyrovae, process {_processes.rank()}"
        print(f"{where}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _processes.leads():
            print("pyrovae: stopped", file=sys.stderr)
        return 130
    finally:
        _processes.leave()
    return 0


def _run(words: list[str]) -> None:
    """Do what the words of the command line say."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(pyrovae.__version__)
        return
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = _catalogue.nearest(command, COMMANDS)
        raise ValueError(f"there is no command {command!r}{hint}; there are {known}")
    target = COMMANDS[command]
    if "-h" in rest or "--help" in rest:
        print(_flags.describe(command, target, SECTIONS if target is Settings else {}))
        return
    if asked := [i for i, word in enumerate(rest) if _role_of_help(word)]:
        print(_help_of_part(*rest[asked[0] : asked[0] + 2]))
        return
    arguments = _flags.parse(command, target, rest)
    if target is not Settings:
        target(**arguments)
        return
    if arguments["resume"] and (more := _flags.given(rest) - {"resume"}):
        flag = dashed(sorted(more)[0])
        raise ValueError(f"--resume goes on with the run's own settings: leave out --{flag}")
    train(Settings(**arguments))


def _overview() -> str:
    lines = ["usage: pyrovae COMMAND ...", "", "Variational autoencoders as Pyro programs.", ""]
    for name, function in COMMANDS.items():
        first = _catalogue.read_docstring(function)[0].split("\n\n")[0]
        lines.append(f"  {name:<8}{first}")
    lines += ["", "Begin with: pyrovae train. What a command takes: pyrovae COMMAND --help."]
    return "\n".join(lines)


def _role_of_help(word: str) -> str | None:
    """The role of `--likelihood.help` or `--guide.net.help`."""
    role = word.partition("=")[0][2:].removesuffix(".help").rpartition(".")[2]
    is_help = word.startswith("--") and word.partition("=")[0].endswith(".help")
    return role if is_help and role in ROLES else None


def _help_of_part(word: str, name: str = "") -> str:
    role = _role_of_help(word) or ""
    name = word.partition("=")[2] or name
    chosen = _catalogue.parts(role)
    if name and not name.startswith("--"):
        chosen = {name: _catalogue.find(role, name)}
    return "\n".join(_catalogue.entry(role, name, part) for name, part in chosen.items())


def _drop_stdout() -> None:
    """Nobody reads what is still to be printed: let the interpreter end without a word."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _open(path: str) -> tuple[Run, VAE]:
    run = Run.open(path)
    if seeds := sorted(child.parent.name for child in run.path.glob("seed-*/config.json")):
        raise ValueError(f"{path} holds runs of several seeds: name one, such as {path}/{seeds[0]}")
    vae = load(run.path)
    if not isinstance(vae, VAE):
        raise ValueError(f"{path} holds a {type(vae).__name__}, not a VAE")
    return run, vae


def _split(run: Run, source: str | None, root: str | None) -> Split:
    """The run's test data, or a file as the run's model sees it."""
    preprocess = run.config.get("preprocess")
    if preprocess is None:
        raise ValueError(f"{run.path} holds a saved model without data: use it from Python")
    if source is not None:
        return data.file_split(source, Preprocess.from_config(preprocess), root)
    settings = saved_settings(run)
    dataset = load_data(replace(settings, data_root=root) if root else settings)
    check_same_data(run, dataset)
    return dataset.test


def _in_own_units(preprocess: dict[str, Any] | None, x: torch.Tensor) -> torch.Tensor:
    if preprocess is None or preprocess["loc"] is None:
        return x
    fitted = Preprocess.from_config(preprocess)
    assert fitted.loc is not None
    assert fitted.scale is not None
    return x * fitted.scale.to(x) + fitted.loc.to(x)


def _writable(path: str | Path) -> Path:
    file = Path(path)
    if file.suffix != ".npz":
        raise ValueError(f"--out must be an .npz file, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"--out {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError(f"--out {file} is a folder, not a file")
    return file


def _save_arrays(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    with replacing(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)


if __name__ == "__main__":
    sys.exit(main())
