"""What `pyrovae train` is told, checked; and as a run keeps it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pyrovae import data, guides, nets, objectives, priors
from pyrovae._catalogue import ROLES, expected
from pyrovae._config import Config
from pyrovae.options import Options
from pyrovae.runs import Run

INFERENCE = ("bottom-up", "top-down")
"""Orders in which a guide goes through layers of latents."""

MODELS = ("vae", "conditional", "semi-supervised", "auxiliary")
"""What a label is to a model: nothing, given, or a latent that is sometimes given."""

LEARNING_LABELS = ("semi-supervised", "auxiliary")
"""Models that learn a label."""

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


def options(settings: Settings) -> Options:
    """What `fit` takes of the settings, checked."""
    return Options(**{field.name: getattr(settings, field.name) for field in fields(Options)})
