r"""Variational autoencoders of data of which few have labels.

The label y is a latent that is sometimes given: p(y) p(z) p(x|y, z), with a classifier q(y|x) and
the guide q(z|x, y). Where it is not given it is summed out.

References:
    Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298;
    Auxiliary Deep Generative Models (Maaloe et al., 2016), arXiv:1602.05473
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae._config import shape_of
from pyrovae._part import Conditional, data_shape
from pyrovae.conditional import ConditionalVAE, check_conditional, check_size, of
from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.nets import Net
from pyrovae.objectives import SemiSupervised
from pyrovae.priors import Prior
from pyrovae.vae import VAE

__all__ = ["AuxiliaryVAE", "Classifier", "SemiSupervisedVAE"]

SUMMED_OUT = {"enumerate": "parallel"}


class Classifier(Conditional):
    """q(y|x): classes by a network.

    Args:
        shape: Shape of one datum.
        num_classes: Number of classes.
        net: Recipe of the network; the default of `nets` if None.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, net: Net | None = None):
        super().__init__(data_shape(shape), shape_of(num_classes, "num_classes"), net)
        self.shape, (self.num_classes,) = data_shape(shape), self.event_shape

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Classes with these logits, of shape `(*, num_classes)`."""
        return dist.Categorical(logits=params)


class SemiSupervisedVAE(ConditionalVAE):
    r"""A VAE whose label is a latent, given for some data: the model M2 of Kingma et al.

    .. math:: p(y) \, p(z) \, p(x|y, z), \qquad q(y|x) \, q(z|x, y)

    For classification with few labels and many data, with the style of each datum in z; `fit` takes
    `(x, y)` with y at -1 where there is no label, or `data.hide_labels(split, 100)`. Model and
    guide take y or leave it out, which sums over it: `elbo` and `log_px` of x alone are of
    log p(x), those of `(x, y)` of log p(x, y).

    The methods that take y take the most probable class where it is left out.

    Args:
        prior: p(z), or p(z|y): a guide that reads a number for each class.
        likelihood: p(x|y, z), of `latent_dim` and a number for each class together.
        guide: q(z|x, y), of shape `(entries + classes,)` or `(channels + classes, height, width)`.
        classifier: q(y|x).
        class_probs: p(y); all classes alike if None.
        missing: Whether NaN in x marks a missing entry.

    Raises:
        TypeError: If a part is no module.
        ValueError: If the parts do not fit each other.

    Example:
        >>> from pyrovae import guides, likelihoods, priors
        >>> vae = SemiSupervisedVAE(
        ...     priors.StandardNormal(latent_dim=2),
        ...     likelihoods.Bernoulli((1, 8, 8), latent_dim=2 + 10),
        ...     guides.Normal((64 + 10,), latent_dim=2),
        ...     Classifier((1, 8, 8), num_classes=10),
        ... )
        >>> vae.classify(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    References:
        Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298
    """

    num_classes: int
    classifier: Classifier
    default_objective = SemiSupervised
    class_probs: Tensor

    def __init__(
        self,
        prior: Prior | Guide,
        likelihood: Likelihood,
        guide: Guide,
        classifier: Classifier,
        class_probs: Sequence[float] | None = None,
        missing: bool = False,
    ):
        num_classes = _classes_of(classifier)
        self._take(
            prior, likelihood, guide, num_classes, None, missing, classifier=classifier
        )  # fmt: skip
        self.register_buffer("class_probs", self._probs(class_probs))
        self._check_parts()

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """p(y) p(z|y) p(x|y, z) for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(self.class_probs), obs=y, infer=SUMMED_OUT)
            label = self.numbers(y)
            z = pyro.sample("z", self.latent(label))
            self._observe(x, z, label)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(y|x) q(z|x, y), or q(z|x, y) where y is given."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", self.classifier(self._seen(x)), infer=SUMMED_OUT)
            pyro.sample("z", self.posterior(x, y))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """q(z|x, y), of the most probable y if None: event shape `(latent_dim,)`."""
        return super().posterior(x, self._label_of(x, y))

    def initialize(self, x: Tensor, y: Tensor | None = None) -> None:
        """Start new parts at training data x, `(n, *shape)`, and their labels, if there are any."""
        super().initialize(x, self._label_of(x, y))

    def classify(self, x: Tensor) -> Tensor:
        """Probabilities q(y|x), shape `(batch, num_classes)`."""
        with self._evaluation():
            return self.classifier(self._seen(x)).probs

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean of q(z|x, y), shape `(batch, latent_dim)`; of the most probable y if None."""
        return super().encode(x, self._label_of(x, y))

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean of p(x|y, z) at the mean of q(z|x, y); the shape of x."""
        return super().reconstruct(x, self._label_of(x, y))

    def analogies(self, x: Tensor, y: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The style of each datum under other labels: shape `(batch, num_labels, *shape)`."""
        return super().analogies(x, self._label_of(x, y), labels)

    def sample(self, num_samples: int = 1, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draw from p(x), or from p(x|y), shape `(num_samples, *shape)`."""
        return super().sample(num_samples, y, mean)  # type: ignore[arg-type]

    def sample_px(
        self, num_samples: int = 1, y: Tensor | None = None, drawn: bool = True
    ) -> dist.TorchDistribution:
        """p(x|y, z) at draws of y, if it is None, and z: batch shape `(num_samples,)`."""
        if y is None:
            y = dist.Categorical(self.class_probs).sample((max(num_samples, 1),))
        return super().sample_px(num_samples, y, drawn)

    def check_labels(self, y: Tensor | None, training: bool = True) -> None:
        """Refuse labels that cannot be learnt from, as each class needs one, or validated by.

        Args:
            y: Labels of all data, -1 where there is none.
            training: Whether these are the data to learn from; others have all labels, or none.

        Raises:
            ValueError: With the reason.
        """
        if not training:
            if y is not None:
                super().check_labels(y)
            return
        if y is None:
            raise ValueError(
                "SemiSupervisedVAE learns classes from labels: give (x, y) with -1 where there is "
                "none, or data.hide_labels(split, num_labels)"
            )
        known = y[y != -1] if y.dim() == 1 else y
        super().check_labels(known)
        if missed := sorted(set(range(self.num_classes)) - set(known.tolist())):
            raise ValueError(f"class {missed[0]} has no label: give at least one of each class")

    def _check_parts(self) -> None:
        super()._check_parts()
        if self.classifier.shape != self.shape:
            raise ValueError(
                f"classifier reads x of shape {self.shape}, got one of {self.classifier.shape}"
            )

    def _label_of(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.classify(x).argmax(-1) if y is None else y

    def _probs(self, given: Sequence[float] | None) -> Tensor:
        probs = torch.full((self.num_classes,), 1 / self.num_classes)
        if given is None:
            return probs
        probs = torch.as_tensor(given, dtype=torch.get_default_dtype())
        if probs.shape != (self.num_classes,) or not bool((probs > 0).all()):
            raise ValueError(
                f"class_probs must be {self.num_classes} positive numbers, got {tuple(given)}"
            )
        return probs / probs.sum()


class AuxiliaryVAE(SemiSupervisedVAE):
    r"""A semi-supervised VAE with another layer of latents a between the data and all else.

    .. math:: p(y) \, p(z) \, p(a|y, z) \, p(x|a, y, z), \qquad q(a|x) \, q(y|x, a) \, q(z|x, a, y)

    The skip deep generative model of Maaloe et al.: with a, classes of any shape can be told, not
    only those that are normal given y. With `skip=False` nothing passes by a,

    .. math:: p(y) \, p(z) \, p(a|y, z) \, p(x|a), \qquad q(a|x) \, q(y|a) \, q(z|a, y),

    which is the stack M1+M2 of Kingma et al.: a VAE of the data, and on its codes a
    `SemiSupervisedVAE`. `stacked` makes one of two that were trained one after the other.

    Codes of data are z; a is taken at its mean where it is not drawn.

    Args:
        prior: p(z), or p(z|y): a guide that reads a number for each class.
        auxiliary_prior: p(a|y, z): a likelihood of a vector, of z and a number for each class
            together.
        likelihood: p(x|a, y, z), of a, z and a number for each class together; or p(x|a).
        guide: q(z|x, a, y), of shape `(entries + len(a) + classes,)`; or `(len(a) + classes,)`.
        auxiliary_guide: q(a|x).
        classifier: q(y|x, a), of shape `(entries + len(a),)`; or `(len(a),)`.
        class_probs: p(y); all classes alike if None.
        skip: Whether x, y and z see each other past a.
        missing: Whether NaN in x marks a missing entry.

    Raises:
        TypeError: If a part is no module.
        ValueError: If the parts do not fit each other.

    References:
        Auxiliary Deep Generative Models (Maaloe et al., 2016), arXiv:1602.05473;
        Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298
    """

    auxiliary_prior: Likelihood
    auxiliary_guide: Guide

    def __init__(
        self,
        prior: Prior | Guide,
        auxiliary_prior: Likelihood,
        likelihood: Likelihood,
        guide: Guide,
        auxiliary_guide: Guide,
        classifier: Classifier,
        class_probs: Sequence[float] | None = None,
        skip: bool = True,
        missing: bool = False,
    ):
        num_classes = _classes_of(classifier)
        self._take(
            prior, likelihood, guide, num_classes, None, missing, classifier=classifier,
            auxiliary_prior=auxiliary_prior, auxiliary_guide=auxiliary_guide,
        )  # fmt: skip
        self.skip = skip
        self.register_buffer("class_probs", self._probs(class_probs))
        self._check_parts()

    @classmethod
    def stacked(cls, m1: VAE, m2: SemiSupervisedVAE) -> AuxiliaryVAE:
        """M1+M2: a VAE of the data, and one of its codes that was trained on few labels.

        Args:
            m1: Of the data; its prior is replaced by the second.
            m2: Of `m1.encode(x)`.
        """
        probs = m2.class_probs.tolist()
        return cls(
            m2.prior, m2.likelihood, m1.likelihood, m2.encoder, m1.encoder, m2.classifier, probs,
            skip=False, missing=m1.missing,
        )  # fmt: skip

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(a|x) q(y|x, a) q(z|x, a, y), without the second where y is given."""
        pyro.module(self._name, self)
        seen = self._seen(x)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", self.auxiliary_guide(seen))
            if y is None:
                y = pyro.sample("y", self._class_of(seen, a), infer=SUMMED_OUT)
            pyro.sample("z", of(self.encoder, *self._above(seen, a), self.numbers(y)))

    def classify(self, x: Tensor) -> Tensor:
        """Probabilities q(y|x, a) at the mean of q(a|x), shape `(batch, num_classes)`."""
        with self._evaluation():
            seen = self._seen(x)
            return self._class_of(seen, self.auxiliary_guide(seen).mean).probs

    def _observe(self, x: Tensor, z: Tensor, label: Tensor) -> None:
        a = pyro.sample("a", of(self.auxiliary_prior, z, label))
        self._observe_given(self._given(a, z, label), x)

    def _decoded(self, z: Tensor, label: Tensor, drawn: bool = False) -> dist.TorchDistribution:
        pa = of(self.auxiliary_prior, z, label)
        return self._given(pa.sample() if drawn else pa.mean, z, label)

    def _given(self, a: Tensor, z: Tensor, label: Tensor) -> dist.TorchDistribution:
        """p(x|a, y, z), or p(x|a)."""
        return of(self.likelihood, a, z, label) if self.skip else self.likelihood(a)

    def _class_of(self, seen: Tensor, a: Tensor) -> dist.TorchDistribution:
        """q(y|x, a), or q(y|a)."""
        return self.classifier(*self._above(seen, a))

    def _above(self, seen: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        """What is read of the data above a: x and a, or a alone."""
        return (seen.flatten(seen.dim() - len(self.shape)), a) if self.skip else (a,)

    def _beside(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        seen = self._seen(x)
        return *self._above(seen, self.auxiliary_guide(seen).mean), self.numbers(y)

    def _check_parts(self) -> None:
        data = {"x": math.prod(self.shape)} if self.skip else {}
        a, z = {"a": self.auxiliary_guide.latent_dim}, {"z": self.encoder.latent_dim}
        y = {"y": self.label_dim}
        check_size("guide", math.prod(self.encoder.shape), data | a | y)
        check_size("classifier", math.prod(self.classifier.shape), data | a)
        check_size("likelihood", self.likelihood.latent_dim, a | (z | y if self.skip else {}))
        if not isinstance(self.prior, Prior):
            check_conditional("prior", self.prior, y)
        check_size("prior", self.prior.latent_dim, z)
        check_size("auxiliary_prior", self.auxiliary_prior.latent_dim, z | y)
        if self.auxiliary_prior.shape != self.auxiliary_guide.event_shape:
            raise ValueError(
                f"auxiliary_prior must be of vectors of shape {self.auxiliary_guide.event_shape}, "
                f"as auxiliary_guide is, got {self.auxiliary_prior.shape}"
            )
        if self.auxiliary_guide.shape != self.shape:
            raise ValueError(
                f"auxiliary_guide reads x of shape {self.shape}, got one of "
                f"{self.auxiliary_guide.shape}"
            )


def _classes_of(classifier: Classifier) -> int:
    """How many classes it tells."""
    if not (hasattr(classifier, "num_classes") and hasattr(classifier, "shape")):
        raise TypeError(f"classifier must be a pyrovae.Classifier, got {classifier!r}")
    return classifier.num_classes
