"""What the scripts of the gallery share: flags, a model, a judge of images, tables."""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import _results
import torch
from sklearn.svm import SVC
from torch import Tensor

import pyrovae
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.data import DataSet, Split
from pyrovae.evidence.diagnostics import error_of_mean

MLP = nets.MLP(hidden=(200, 200))


def parser(doc: str, data: Sequence[str] | None = ("digits", "mnist")) -> argparse.ArgumentParser:
    """Flags for the data set, one of `data` or any, and for where results go."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--data", default="digits", choices=data)
    made.add_argument("--data-root", help="folder with the data sets' files")
    _results.add_flags(made)
    return made


def bernoulli_vae(shape: tuple[int, ...], latent_dim: int, net: nets.Net = MLP) -> pyrovae.VAE:
    """A new VAE of binary data: standard normal prior, diagonal normal guide."""
    return pyrovae.VAE(
        priors.StandardNormal(latent_dim),
        likelihoods.Bernoulli(shape, latent_dim, net=net),
        guides.Normal(shape, latent_dim, net=net),
    )


def elbo(model: Any, guide: Any, x: Any, num_particles: int) -> tuple[Tensor, float]:
    """ELBO of each datum by two estimates, nats, and the Monte Carlo error of its mean."""
    one, two = (pyrovae.elbo(model, guide, x, num_particles, seed=seed) for seed in (1, 2))
    return (one + two) / 2, float((one - two).std()) / 2 / math.sqrt(len(one))


def grey(split: Split) -> Tensor:
    """Images as they are stored, scaled to [0, 1]: shape `(N, *shape)`."""
    return split.x / split.x.max()


def judge_of(dataset: DataSet, num_data: int = 10_000) -> SVC:
    """A classifier of grey images, of the first training images."""
    x, y = grey(dataset.train)[:num_data], dataset.train.y[:num_data]
    return SVC(C=10).fit(x.flatten(1).numpy(), y.numpy())


def predicted(classifier: Any, images: Tensor) -> Tensor:
    """The class of each image, shape `(*)`, for images `(*, channels, height, width)`."""
    found = classifier.predict(images.flatten(0, -4).flatten(1).numpy())
    return torch.as_tensor(found).reshape(images.shape[:-3])


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """The mean of values `(N,)`, and its standard error."""
    return {name: float(values.mean()), f"{name}_std_error": error_of_mean(values.double())}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as README shows it."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
