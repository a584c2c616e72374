r"""The variational autoencoder of data with labels, or of data given something else.

The label y goes to decoder and encoder, so that z keeps what the label does not say: in pictures of
digits, the style.

.. math:: \log p(x|y) \ge E_{q(z|x,y)}[\log p(x|y, z)] - KL(q(z|x,y) \| p(z|y))

References:
    Learning Structured Output Representation using Deep Conditional Generative Models (Sohn et al.,
    2015); Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014),
    arXiv:1406.5298
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae._config import shape_of
from pyrovae._part import Conditional
from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.nets import join
from pyrovae.priors import Prior
from pyrovae.vae import Base, check_modules

__all__ = ["ConditionalVAE"]


class ConditionalVAE(Base):
    """A VAE given a label or a vector y: p(x|y, z), q(z|x, y), and p(z) or p(z|y).

    The label stands beside what a part reads, as numbers: one for each class, one of them 1, or the
    vector itself. So `likelihood` is made for `latent_dim` latents and those numbers, and `guide`
    for the data and those numbers: in one vector, or, for convolutions, as channels of the image.
    Any part will do.

    Args:
        prior: p(z), or p(z|y): a guide that reads y's numbers, `guides.Normal((10,), latent_dim)`.
        likelihood: p(x|y, z), of `latent_dim` and y's numbers together.
        guide: q(z|x, y), of shape `(entries + numbers,)` or `(channels + numbers, height, width)`.
        num_classes: Classes of the label, which is int64 of shape `(batch,)`, from 0.
        label_dim: Or the length of y as a vector of real numbers, of shape `(batch, label_dim)`.
        missing: Whether NaN in x marks a missing entry: the likelihood leaves it out, and the guide
            sees zero for it. Needs a likelihood whose entries are independent given z.

    Raises:
        TypeError: If a part is no module.
        ValueError: If the parts do not fit each other and y.

    Example:
        >>> from pyrovae import guides, likelihoods, priors
        >>> vae = ConditionalVAE(
        ...     priors.StandardNormal(latent_dim=2),
        ...     likelihoods.Bernoulli((1, 8, 8), latent_dim=2 + 10),
        ...     guides.Normal((64 + 10,), latent_dim=2),
        ...     num_classes=10,
        ... )
        >>> x, y = torch.zeros(5, 1, 8, 8), torch.arange(5)
        >>> vae.encode(x, y).shape, vae.sample(5, y).shape
        (torch.Size([5, 2]), torch.Size([5, 1, 8, 8]))

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn et
        al., 2015)
    """

    def __init__(
        self,
        prior: Prior | Guide,
        likelihood: Likelihood,
        guide: Guide,
        num_classes: int | None = None,
        label_dim: int | None = None,
        missing: bool = False,
    ):
        if (num_classes is None) == (label_dim is None):
            raise ValueError("y is a class or a vector: give either num_classes or label_dim")
        self._take(prior, likelihood, guide, num_classes, label_dim, missing)
        self._check_parts()

    def _take(
        self,
        prior: Prior | Guide,
        likelihood: Likelihood,
        guide: Guide,
        num_classes: int | None,
        label_dim: int | None,
        missing: bool,
        **more: nn.Module,
    ) -> None:
        """Take the parts, by role those of a subclass, too."""
        self._begin(missing)
        check_modules(prior=prior, likelihood=likelihood, guide=guide, **more)
        named = {"num_classes": num_classes} if label_dim is None else {"label_dim": label_dim}
        ((name, size),) = named.items()
        (self.label_dim,) = shape_of(size, name)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.prior, self.likelihood, self.encoder = prior, likelihood, guide
        for role, part in more.items():
            self.add_module(role, part)
        if isinstance(prior, Prior):
            prior.connect(guide)

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(z|y) p(x|y, z) for a batch x of shape `(batch, *shape)` and its labels."""
        pyro.module(self._name, self)
        label = self.numbers(y)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.latent(label))
            self._observe(x, z, label)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """q(z|x, y) for a batch x of shape `(batch, *shape)` and its labels."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x, y))

    def latent(self, label: Tensor) -> dist.TorchDistribution:
        """p(z), or p(z|y) by y's numbers `(*, label_dim)`."""
        return self.prior() if isinstance(self.prior, Prior) else self.prior(label)

    def posterior(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z|x, y): event shape `(latent_dim,)`."""
        return of(self.encoder, *self._beside(x, y))

    def numbers(self, y: Tensor) -> Tensor:
        """A label as numbers beside other numbers: shape `(*, label_dim)`."""
        if is_validation_enabled():
            self._check_values(y)
        if self.num_classes is None:
            return y
        classes = torch.arange(self.num_classes, device=y.device)
        return (y[..., None] == classes).to(next(self.parameters()).dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return self.likelihood.shape

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """Number of latents of each layer, from the data up: here of one."""
        return (self.encoder.latent_dim,)

    def initialize(self, x: Tensor, y: Tensor) -> None:
        """Start new parts at training data x, `(n, *shape)`, and their labels."""
        parts = self._beside(x, y)
        seen = parts[0] if len(parts) == 1 else join(*parts)
        for part, data in ((self.prior, seen), (self.likelihood, x), (self.encoder, seen)):
            if initialize := getattr(part, "initialize", None):
                initialize(data)

    def check_labels(self, y: Tensor | None, training: bool = True) -> None:
        """Refuse labels that cannot be learnt from, or validated by.

        Args:
            y: Labels of all data.
            training: Whether these are the data to learn from.

        Raises:
            ValueError: With the reason.
        """
        if y is None:
            raise ValueError(
                f"{type(self).__name__} takes data with labels: give (x, y), or split.with_labels()"
            )
        shape = "batch," if self.num_classes else f"batch, {self.label_dim}"
        if y.dim() != (1 if self.num_classes else 2):
            raise ValueError(f"y must have shape ({shape}), got {tuple(y.shape)}")
        self._check_values(y)

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of q(z|x, y), shape `(batch, latent_dim)`."""
        with self._evaluation():
            return self.posterior(x, y).mean

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|y, z), shape `(*, *shape)` for z of shape `(*, latent_dim)`."""
        with self._evaluation():
            return self._decoded(z, self.numbers(y)).mean

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|y, z) at the mean of q(z|x, y), missing entries filled; the shape of x."""
        return self.decode(self.encode(x, y), y)

    def analogies(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """The style of each datum under other labels: means of p(x|y', z), z the mean of q(z|x, y).

        Args:
            x: Data, shape `(batch, *shape)`.
            y: Their labels.
            labels: y', shape `(num_labels,)`, or `(num_labels, label_dim)`; all classes if None.

        Returns:
            Shape `(batch, num_labels, *shape)`.
        """
        labels = self._all_labels() if labels is None else labels
        z = self.encode(x, y)[:, None]
        with self._evaluation():
            return self._decoded(z, self.numbers(labels)).mean

    def sample(self, num_samples: int, y: Tensor, mean: bool = False) -> Tensor:
        """Draw from p(x|y), shape `(num_samples, *shape)`.

        Args:
            num_samples: How many.
            y: The label of each, or one for all.
            mean: Return means of p(x|y, z), not draws: pictures without pixel noise.
        """
        with self._evaluation():
            px = self.sample_px(num_samples, y, drawn=not mean)
            return px.mean if mean else px.sample()

    def sample_px(self, num_samples: int, y: Tensor, drawn: bool = True) -> dist.TorchDistribution:
        """p(x|y, z) at draws of z from the prior: batch shape `(num_samples,)`.

        Args:
            num_samples: How many.
            y: The label of each, or one for all.
            drawn: Whether what lies between z and x is drawn, too, or taken at its mean.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with self._evaluation():
            label = self.numbers(torch.as_tensor(y, device=self._device))
            if label.dim() > 1 and len(label) != num_samples:
                raise ValueError(
                    f"y must be one label or {num_samples}, one for each sample, got {len(label)}"
                )
            label = label.expand(num_samples, -1)
            prior = self.latent(label)
            z = prior.sample() if prior.batch_shape else prior.sample((num_samples,))
            return self._decoded(z, label, drawn)

    def _decoded(self, z: Tensor, label: Tensor, drawn: bool = False) -> dist.TorchDistribution:
        """p(x|y, z) by y's numbers; what lies between z and x at its mean, or drawn."""
        return of(self.likelihood, z, label)

    def _beside(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What the encoder reads: one tensor, or vectors side by side."""
        return beside(self._seen(x), self.numbers(y), self.shape, self.encoder.shape)

    def _observe(self, x: Tensor, z: Tensor, label: Tensor) -> None:
        self._observe_given(self._decoded(z, label), x)

    def _all_labels(self) -> Tensor:
        if self.num_classes is None:
            raise ValueError("y is a vector: say which labels, shape (num_labels, label_dim)")
        return torch.arange(self.num_classes, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _check_values(self, y: Tensor) -> None:
        """Refuse labels of the wrong shape, kind or range."""
        if self.num_classes is None:
            if not y.is_floating_point() or y.shape[-1:] != (self.label_dim,):
                raise ValueError(
                    f"y must be real numbers of shape (batch, {self.label_dim}), got "
                    f"{tuple(y.shape)} of {y.dtype}"
                )
            return
        if y.dtype != torch.int64:
            raise ValueError(
                f"y must be classes as int64, of shape (batch,), got {tuple(y.shape)} of {y.dtype}"
            )
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"y must be classes from 0 to {self.num_classes - 1}, got values from {low} to "
                f"{high}: is num_classes right?"
            )

    def _check_parts(self) -> None:
        """Refuse parts that do not fit each other and y."""
        dim, numbers = self.encoder.latent_dim, self.label_dim
        self._check_reads("guide", self.encoder.shape, {"y": numbers})
        check_size("likelihood", self.likelihood.latent_dim, {"z": dim, "y": numbers})
        if not isinstance(self.prior, Prior):
            check_conditional("prior", self.prior, {"y": numbers})
        if self.prior.latent_dim != dim:
            raise ValueError(
                f"the parts disagree on latent_dim: prior {self.prior.latent_dim}, guide {dim}"
            )

    def _check_reads(self, name: str, found: tuple[int, ...], more: dict[str, int]) -> None:
        """Refuse a part that does not read the data and these numbers beside them."""
        numbers = sum(more.values())
        allowed: list[tuple[int, ...]] = [(math.prod(self.shape) + numbers,)]
        if len(self.shape) == 3:
            allowed.append((self.shape[0] + numbers, *self.shape[1:]))
        if found not in allowed:
            beside = ", ".join(f"{size} of {what}" for what, size in more.items())
            raise ValueError(
                f"{name} reads x of shape {self.shape} with numbers beside it, {beside}: its shape "
                f"must be {' or '.join(map(str, allowed))}, got {found}"
            )


def check_size(name: str, found: int, read: dict[str, int]) -> None:
    """Refuse a part that does not read these numbers side by side."""
    if found != sum(read.values()):
        listed = " and ".join(f"{size} of {what}" for what, size in read.items())
        raise ValueError(f"{name} reads {listed}: made for {sum(read.values())}, got {found}")


def check_conditional(name: str, part: nn.Module, read: dict[str, int]) -> None:
    """Refuse a prior given something else that is not of these numbers, or cannot score any z."""
    if not isinstance(part, Guide):
        raise TypeError(f"{name} must be a module of pyrovae.guides, got {part!r}")
    if not part.scorable:
        raise ValueError(
            f"{name} ({type(part).__name__}) scores only its own draws: take one that scores any "
            "value, such as guides.Normal"
        )
    check_size(name, math.prod(part.shape), read)


def of(part: nn.Module, *vectors: Tensor) -> dist.TorchDistribution:
    """The distribution of a part given vectors side by side."""
    taken_apart = isinstance(part, Conditional) and type(part).forward is Conditional.forward
    return part(*vectors) if taken_apart else part(join(*vectors))


def beside(
    x: Tensor, label: Tensor, shape: tuple[int, ...], joint: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Data with numbers beside them: vectors, or an image with channels of them.

    Args:
        x: Data, shape `(*, *shape)`.
        label: Numbers, shape `(*, label_dim)`.
        shape: Shape of one datum.
        joint: Shape of the two together.
    """
    if len(joint) == 1:
        return x.flatten(x.dim() - len(shape)), label
    planes = label[..., None, None].expand(*label.shape, *shape[1:])
    lead = torch.broadcast_shapes(x.shape[:-3], label.shape[:-1])
    planes = planes.expand(*lead, *planes.shape[-3:])
    return (torch.cat([x.expand(*lead, *shape), planes], -3),)
