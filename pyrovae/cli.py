"""The `pyrovae` command: every flag is an argument of a function here or of a part."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pyrovae
from pyrovae import _catalogue, _flags, _processes
from pyrovae._build import with_objective
from pyrovae._catalogue import ROLES, dashed
from pyrovae._estimates import (
    classify_command,
    compare_command,
    gaps_command,
    log_px_command,
    posterior_command,
)
from pyrovae._opened import opened, test_data
from pyrovae._processes import ProcessLost
from pyrovae._settings import SECTIONS, Settings
from pyrovae._train import draw, train
from pyrovae.conditional import ConditionalVAE
from pyrovae.data import Preprocess
from pyrovae.program import as_args
from pyrovae.runs import write_arrays
from pyrovae.training import NonFiniteLoss
from pyrovae.vae import Base


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
    folder, vae = opened(run)
    split = test_data(folder, data, data_root)
    file = _writable(out or folder.path / "codes.npz")
    with torch.no_grad():
        blocks = (as_args(split[slice(i, i + 1000)]) for i in range(0, len(split), 1000))
        q = [vae.eval().posterior(*block) for block in blocks]
        codes = {"loc": torch.cat([p.mean for p in q]), "scale": torch.cat([p.stddev for p in q])}
    write_arrays(file, codes if split.y is None else codes | {"y": split.y})
    print(f"{len(split):,} codes in {file}")


def sample_command(run: str, num_samples: int = 64, out: str | None = None, seed: int = 0) -> None:
    """Draw from a run's model: z from the prior, then x from p(x|z).

    The .npz file holds x, the draws, and mean, the mean of p(x|z) at each z. Data that were
    standardized come in their own units, and models with a label draw each class in turn and write
    it as y. For pictures see pyrovae plot.

    Args:
        run: Folder of the run.
        num_samples: How many.
        out: An .npz file; default: RUN/samples.npz.
        seed: Seed of the draws.
    """
    if num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {num_samples}")
    folder, vae = opened(run)
    file = _writable(out or folder.path / "samples.npz")
    torch.manual_seed(seed)
    with torch.no_grad():
        y = _labels(vae, num_samples)
        px = vae.sample_px(num_samples, *y)
        drawn = {"x": px.sample(), "mean": px.mean}
    preprocess = folder.config.get("preprocess")
    arrays = {name: _in_own_units(preprocess, x) for name, x in drawn.items()}
    write_arrays(file, arrays | ({"y": y[0]} if y else {}))
    print(f"{num_samples:,} samples in {file}")


def plot_command(run: str, data_root: str | None = None) -> None:
    """Draw a run's figures again: RUN/figures/*.png.

    Args:
        run: Folder of the run.
        data_root: Folder with the files of the named sets; default: $PYROVAE_DATA.
    """
    folder, vae = opened(run)
    for path in draw(folder, vae, test_data(folder, None, data_root)):
        print(path)


def parts_command() -> None:
    """List priors, likelihoods, guides, nets, objectives, methods: uses, flags, papers."""
    for role in ROLES:
        takers = [name for name, target in COMMANDS.items() if role in _flags.roles_of(target)]
        print(f"--{role} NAME (pyrovae {', '.join(takers)})")
        for name, part in _catalogue.parts(role).items():
            print(_catalogue.entry(role, name, part))
        print()
    print("A part of your own is named module.Class, from a module in this folder or on the path.")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": Settings,  # type: ignore[dict-item]
    "log-px": log_px_command,
    "gaps": gaps_command,
    "compare": compare_command,
    "posterior": posterior_command,
    "classify": classify_command,
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
    if command == "train":
        rest = with_objective(rest)
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
        lines.append(f"  {name:<11}{first}")
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


def _labels(vae: Base, count: int) -> tuple[torch.Tensor, ...]:
    """A label for each of so many draws, of each class in turn; none where the model has none."""
    if not isinstance(vae, ConditionalVAE) or vae.num_classes is None:
        return ()
    return (torch.arange(count) % vae.num_classes,)


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


if __name__ == "__main__":
    sys.exit(main())
