"""From settings to data, model and objective."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from pyrovae import data, guides, likelihoods, nets
from pyrovae._config import Config, class_path, find_class, from_config, parameters
from pyrovae._settings import INFERENCE, LEARNING_LABELS, Settings
from pyrovae.conditional import ConditionalVAE
from pyrovae.data import DataSet, Split
from pyrovae.hierarchical import HierarchicalVAE, LadderVAE
from pyrovae.objectives import Objective
from pyrovae.semisupervised import AuxiliaryVAE, Classifier, SemiSupervisedVAE
from pyrovae.training import check_data, check_labels
from pyrovae.vae import VAE, Base

HIERARCHIES: dict[str, Any] = dict(zip(INFERENCE, (HierarchicalVAE, LadderVAE), strict=True))


def with_objective(words: list[str]) -> list[str]:
    """The words of a command, with the objective of the model named where none is."""
    apart = [w for word in words for w in (word.split("=", 1) if word[:2] == "--" else [word])]
    if "--objective" in apart or "--model" not in apart[:-1]:
        return words
    if apart[apart.index("--model") + 1] not in LEARNING_LABELS:
        return words
    return [*words, "--objective", SemiSupervisedVAE.default_objective.__name__]


def load_data(settings: Settings) -> DataSet:
    """The data set that the settings name."""
    names = ("kind", "binarize", "dequantize", "standardize", "missing")
    how: dict[str, Any] = {name: getattr(settings, name) for name in names}
    for name, value in _reading(settings.likelihood).items():
        how[name] = value if how[name] is None else how[name]
    return data.load(settings.data, settings.data_root, seed=settings.data_seed, **how)


def arranged(settings: Settings, dataset: DataSet) -> DataSet:
    """The data as the model takes them: with labels, with few in training, or without.

    Raises:
        ValueError: If there are no labels for a model that needs them, or too few.
    """
    if settings.model == "vae":
        return dataset
    _num_classes(settings, dataset)
    if settings.model == "conditional":
        splits = {name: getattr(dataset, name).with_labels() for name in ("train", "valid", "test")}
        return replace(dataset, **splits)
    if settings.labels is None or settings.labels == len(dataset.train):
        return replace(dataset, train=dataset.train.with_labels())
    try:
        train = data.hide_labels(dataset.train, settings.labels, settings.seed)
    except ValueError as error:
        raise ValueError(f"--labels: {error}") from error
    return replace(dataset, train=train)


def as_taken(settings: Settings, split: Split) -> Split:
    """Data to be judged as the model takes them: a conditional one with their labels."""
    return split.with_labels() if settings.model == "conditional" else split


def build(settings: Settings, dataset: DataSet) -> tuple[Base, Objective]:
    """The model that the settings describe, with weights by the seed, and its objective.

    Raises:
        ValueError: If parts do not fit each other or the data.
    """
    given = {
        "shape": list(dataset.shape),
        "latent_dim": settings.latent_dims[0],
        "max_value": int(dataset.preprocess.max_value),
        "net": settings.net,
    }
    torch.manual_seed(settings.seed)
    likelihood = settings.likelihood or _default_likelihood(dataset.kind)
    if settings.model != "vae":
        vae: Base = _with_label(settings, likelihood, given, _num_classes(settings, dataset))
    elif len(settings.latent_dims) > 1:
        vae = _hierarchy(settings, likelihood, given)
    else:
        vae = VAE(
            made("prior", settings.prior, given),
            made("likelihood", likelihood, given),
            made("guide", settings.guide, given),
            missing=settings.missing,
        )
    taken = arranged(settings, dataset)
    for split in (taken.train, taken.valid, taken.test):
        check_data(vae.model, vae.guide, split)
    objective = made("objective", settings.objective, {})
    check_labels(vae, taken.train, objective)
    return vae, objective


def _num_classes(settings: Settings, dataset: DataSet) -> int:
    """How many classes the labels are of.

    Raises:
        ValueError: If there are none.
    """
    labels = [split.y for split in (dataset.train, dataset.valid, dataset.test)]
    known = [y for y in labels if y is not None]
    if not known:
        raise ValueError(
            f"--model {settings.model} needs labels, and {dataset.name} has none: give them as y, "
            "or a column named label"
        )
    return int(max(y.max() for y in known)) + 1


def _with_label(
    settings: Settings, likelihood: Config, given: dict[str, Any], num_classes: int
) -> Base:
    """The model with a label that the settings describe."""
    shape, dim, model = tuple(given["shape"]), given["latent_dim"], settings.model
    auxiliary = dim if model == "auxiliary" else 0
    config: Any = settings.guide
    net: Any = settings.net if auxiliary == 0 else _for_vectors(settings.net)
    joint = _joint(shape, auxiliary + num_classes, config["init_args"].get("net", net))
    guide = made("guide", config, given | {"net": net, "shape": joint})
    prior = _prior(settings, given | {"shape": joint}, num_classes)
    px = made("likelihood", likelihood, given | {"latent_dim": auxiliary + dim + num_classes})
    if model == "conditional":
        return ConditionalVAE(prior, px, guide, num_classes, missing=settings.missing)
    if model == "semi-supervised":
        classifier = Classifier(shape, num_classes, from_config(settings.net))
        return SemiSupervisedVAE(prior, px, guide, classifier, missing=settings.missing)
    flat = from_config(net)
    of_vectors: Any = likelihoods.DEFAULT["real"]
    return AuxiliaryVAE(
        prior,
        of_vectors((dim,), dim + num_classes, flat, scale="amortized"),
        px,
        guide,
        guides.DEFAULT(shape, dim, from_config(settings.net)),
        Classifier((math.prod(shape) + dim,), num_classes, flat),
        missing=settings.missing,
    )


def _prior(settings: Settings, given: dict[str, Any], num_classes: int) -> Any:
    """p(z), or p(z|y)."""
    if not settings.conditional_prior:
        return made("prior", settings.prior, given)
    net = from_config(_for_vectors(settings.net))
    return guides.DEFAULT((num_classes,), given["latent_dim"], net)


def _joint(shape: tuple[int, ...], numbers: int, net: Config | None) -> list[int]:
    """Shape of data with numbers beside them, as this network takes them."""
    if net and getattr(find_class(net["class_path"]), "images_only", False):
        return [shape[0] + numbers, *shape[1:]]
    return [math.prod(shape) + numbers]


def _hierarchy(settings: Settings, likelihood: Config, given: dict[str, Any]) -> VAE:
    """The VAE with several layers that the settings describe."""
    kind, dims = HIERARCHIES[settings.inference or "bottom-up"], settings.latent_dims
    inner = {"net": _for_vectors(settings.net)}
    below = _below_the_top(settings)
    layers = [made("guide", below, given)]
    for layer, dim in enumerate(dims[1:], 2):
        config: Any = settings.guide if layer == len(dims) else below
        own = {name: _for_vectors(value) for name, value in config["init_args"].items()}
        shape = list(kind.shape_above(layers[-1]))
        given_here = inner | {"shape": shape, "latent_dim": dim}
        layers.append(made("guide", config | {"init_args": own}, given_here))
    conditional = {"class_path": class_path(guides.DEFAULT), "init_args": {}}
    conditionals = [
        made("guide", conditional, inner | {"shape": [above], "latent_dim": dim})
        for dim, above in pairwise(dims)
    ]
    top = inner | {"shape": list(layers[-1].shape), "latent_dim": dims[-1]}
    prior = made("prior", settings.prior, top)
    px = made("likelihood", likelihood, given)
    return kind(prior, conditionals, px, layers, missing=settings.missing)


def _below_the_top(settings: Settings) -> Config:
    """The guide of the layers below the top: the default where the one named will not do there."""
    named: Any = settings.guide
    family: Any = find_class(named["class_path"])
    if settings.inference != "top-down" or family.is_diagonal_normal:
        return named
    net = {name: value for name, value in named["init_args"].items() if name == "net"}
    return {"class_path": class_path(guides.DEFAULT), "init_args": net}


def _for_vectors(value: Any) -> Any:
    """An argument of a part, or the default net in place of one for images."""
    if isinstance(value, dict) and getattr(find_class(value["class_path"]), "images_only", False):
        return {"class_path": class_path(nets.DEFAULT), "init_args": {}}
    return value


def made(flag: str, config: Any, given: dict[str, Any]) -> Any:
    """A part of its configuration and what data and other flags say, as far as it takes that.

    Raises:
        ValueError: If the part refuses its arguments: with the flag that names it in front.
    """
    takes = parameters(find_class(config["class_path"]))
    args = {name: value for name, value in given.items() if name in takes} | config["init_args"]
    for name, value in args.items():
        if isinstance(value, dict):
            place = f"{flag}.{name}" if name in config["init_args"] else name
            args[name] = made(place, value, {})
    try:
        return from_config(config | {"init_args": args})
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def _reading(likelihood: Config | None) -> dict[str, str]:
    """How data are read for the likelihood that is named, by the kind of data it takes.

    Levels are whole numbers, which are grey pixels or counts as the likelihood has it.
    """
    kind = getattr(find_class(likelihood["class_path"]), "kind", None) if likelihood else None
    if kind in ("levels", "counts"):
        return {"kind": kind}
    return {"binarize": "none"} if kind in ("grey", "real") else {}


def _default_likelihood(kind: str) -> Config:
    """The likelihood that is taken for this kind of data where none is named."""
    return {"class_path": class_path(likelihoods.DEFAULT[kind]), "init_args": {}}
