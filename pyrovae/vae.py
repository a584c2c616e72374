r"""The variational autoencoder as a Pyro program.

Bayes' rule has three parts: a prior p(z), a likelihood p(x|z) that a decoder network computes, and
an approximate posterior q(z|x), the guide, that an encoder network computes. Training maximises the
evidence lower bound

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - KL(q(z|x) \| p(z)).

References:
    Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae._config import Configurable
from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.priors import Prior
from pyrovae.program import in_mode

__all__ = ["VAE"]

_count = itertools.count(1)


class Base(Configurable, nn.Module):
    """What all variational autoencoders share: a name of their own, how missing entries are seen.

    Attributes:
        missing: Whether NaN in x marks a missing entry.
    """

    missing: bool
    prior: Any
    likelihood: Any
    encoder: Any

    def model(self, *args: Any, **kwargs: Any) -> None:
        """The model: p of data and latents."""
        raise NotImplementedError

    def guide(self, *args: Any, **kwargs: Any) -> None:
        """The guide: q of the latents."""
        raise NotImplementedError

    def posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The guide's distribution of the codes of data."""
        raise NotImplementedError

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Codes of data: the guide's mean."""
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Means of the likelihood at codes."""
        raise NotImplementedError

    def reconstruct(self, *args: Any, **kwargs: Any) -> Tensor:
        """Data again, by way of their codes."""
        raise NotImplementedError

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws from the model."""
        raise NotImplementedError

    def sample_px(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The likelihood at draws of the latents from the model."""
        raise NotImplementedError

    def _begin(self, missing: bool) -> None:
        nn.Module.__init__(self)
        self.missing = missing
        self._name = new_name()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, under a name of its own in Pyro's parameter store."""
        super().__setstate__(state)
        self._name = new_name()

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """Number of latents of each layer, from the data up."""
        raise NotImplementedError

    def _observe_given(self, px: dist.TorchDistribution, x: Tensor) -> None:
        """Observe data under p(x|z), without what is missing."""
        if self.missing:
            px, x = leave_out_missing(px, x)
        pyro.sample("x", px, obs=x)

    def _seen(self, x: Tensor) -> Tensor:
        """What the guide sees of x."""
        return x.nan_to_num() if self.missing else x

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """No gradients, evaluation mode; the mode comes back."""
        with torch.no_grad(), in_mode(False, self):
            yield


class VAE(Base):
    """A variational autoencoder of three parts, each a module that returns a Pyro distribution.

    Args:
        prior: p(z): `prior()` has batch shape `()` and event shape `(latent_dim,)`.
        likelihood: p(x|z): `likelihood(z)` has z's leading shape; events are shaped like one datum.
        guide: q(z|x): `guide(x)` has x's leading shape and event shape `(latent_dim,)`.
        missing: Whether NaN in x marks a missing entry: the likelihood leaves it out, and the guide
            sees zero for it. Needs a likelihood whose entries are independent given z.

    Raises:
        TypeError: If a part is no module.
        ValueError: If the parts disagree on the number of latents or the shape of a datum, or the
            prior cannot do with this guide.

    Example:
        >>> from pyrovae import guides, likelihoods, priors
        >>> prior, shape = priors.StandardNormal(latent_dim=2), (1, 8, 8)
        >>> vae = VAE(prior, likelihoods.Bernoulli(shape, 2), guides.Normal(shape, 2))
        >>> vae.sample(3).shape, vae.encode(torch.zeros(5, 1, 8, 8)).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([5, 2]))

    References:
        Missing entries: MIWAE (Mattei & Frellsen, 2019), arXiv:1812.02633
    """

    def __init__(self, prior: Prior, likelihood: Likelihood, guide: Guide, missing: bool = False):
        self._begin(missing)
        check_modules(prior=prior, likelihood=likelihood, guide=guide)
        _agree("latent_dim", prior=prior, likelihood=likelihood, guide=guide)
        _agree("shape", prior=prior, likelihood=likelihood, guide=guide)
        if hasattr(prior, "connect"):
            prior.connect(guide)
        self.prior, self.likelihood, self.encoder = prior, likelihood, guide

    def model(self, x: Tensor) -> None:
        """p(z) p(x|z) for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            self._observe_given(self.likelihood(z), x)

    def guide(self, x: Tensor) -> None:
        """q(z|x) for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z|x): batch shape that of x before `shape`, event shape `(latent_dim,)`."""
        return self.encoder(self._seen(x))

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """Number of latents of each layer, from the data up: here of one."""
        return (self.prior.latent_dim,)

    def initialize(self, x: Tensor) -> None:
        """Start new parts at training data x, `(n, *shape)`: those that have an `initialize`."""
        for part in (self.prior, self.likelihood, self.encoder):
            if initialize := getattr(part, "initialize", None):
                initialize(x)

    def encode(self, x: Tensor) -> Tensor:
        """Mean of q(z|x), shape `(batch, latent_dim)`."""
        with self._evaluation():
            return self.posterior(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z), shape `(*, *shape)` for z of shape `(*, latent_dim)`."""
        with self._evaluation():
            return self.likelihood(z).mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the mean of q(z|x), missing entries filled; the shape of x."""
        return self.decode(self.encode(x))

    def sample(self, num_samples: int = 1, mean: bool = False) -> Tensor:
        """Draw from p(x), shape `(num_samples, *shape)`.

        Args:
            num_samples: How many.
            mean: Return means of p(x|z), not draws: pictures without pixel noise.
        """
        with self._evaluation():
            px = self.sample_px(num_samples)
            return px.mean if mean else px.sample()

    def sample_px(self, num_samples: int = 1) -> dist.TorchDistribution:
        """p(x|z) at draws of z from the prior: batch shape `(num_samples,)`."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with self._evaluation():
            return self.likelihood(self.sample_latent(num_samples))

    def sample_latent(self, num_samples: int = 1) -> Tensor:
        """Draw codes, as `decode` takes them, from p(z): shape `(num_samples, latent_dim)`."""
        with self._evaluation():
            return self.prior().sample((num_samples,))

    def interpolate(
        self,
        start: Tensor,
        end: Tensor,
        steps: int = 10,
        path: Literal["straight", "spherical"] = "straight",
    ) -> Tensor:
        """Decode the path between the codes of two data.

        Args:
            start: Data, shape `(batch, *shape)`.
            end: Data, shape `(batch, *shape)`.
            steps: Points of the path, both ends included.
            path: As in `interpolate_latent`.

        Returns:
            Means of p(x|z), shape `(steps, batch, *shape)`.
        """
        codes = self.encode(start), self.encode(end)
        return self.decode(self.interpolate_latent(*codes, steps, path))

    @staticmethod
    def interpolate_latent(
        first: Tensor,
        last: Tensor,
        steps: int = 10,
        path: Literal["straight", "spherical"] = "straight",
    ) -> Tensor:
        r"""Codes on the path from one to another.

        A spherical path turns at constant speed by the angle :math:`\omega` between them,

        .. math:: z_t = \frac{\sin((1 - t)\,\omega)}{\sin \omega} z_0
            + \frac{\sin(t\,\omega)}{\sin \omega} z_1,

        so its norm stays that of ends of equal norm, as draws of a standard normal in many
        dimensions nearly are; a straight path passes closer to the origin than either of them.

        Args:
            first: Codes, shape `(*, latent_dim)`.
            last: Codes, shape `(*, latent_dim)`.
            steps: Points of the path, both ends included.
            path: straight or spherical. Between codes in one direction, or in opposite ones, there
                is no arc: their path is straight.

        Returns:
            Codes, shape `(steps, *, latent_dim)`.

        References:
            Sampling Generative Networks (White, 2016), arXiv:1609.04468
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2 (both ends), got {steps}")
        if path not in ("straight", "spherical"):
            raise ValueError(f"path must be straight or spherical, got {path!r}")
        t = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)
        t = t.view(-1, *[1] * first.dim())
        straight = torch.lerp(first, last, t)
        if path == "straight":
            return straight
        a, b = (nn.functional.normalize(code, dim=-1) for code in (first, last))
        angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))[..., None]
        sine = angle.sin()
        arc = (((1 - t) * angle).sin() * first + (t * angle).sin() * last) / sine
        return torch.where(sine > 1e-4, arc, straight)


def new_name() -> str:
    """A name in Pyro's parameter store that no other model has."""
    return f"vae_{next(_count)}"


def check_modules(**parts: object) -> None:
    """Refuse parts, by role, that are no modules.

    Raises:
        TypeError: With the first.
    """
    for role, part in parts.items():
        if not isinstance(part, nn.Module):
            where = f" of pyrovae.{role}s" if role in ("prior", "likelihood", "guide") else ""
            raise TypeError(f"{role} must be a module{where}, got {part!r}")


def leave_out_missing(
    px: dist.TorchDistribution, x: Tensor
) -> tuple[dist.TorchDistribution, Tensor]:
    """The likelihood of the entries of x that are there."""
    if not isinstance(px, dist.Independent) or px.base_dist.event_shape:
        raise ValueError(
            f"missing entries need a likelihood whose entries are independent given z, not "
            f"{type(px).__name__}"
        )
    seen = ~x.isnan()
    return px.base_dist.mask(seen).to_event(px.reinterpreted_batch_ndims), x.nan_to_num()


def _agree(attribute: str, **parts: nn.Module) -> None:
    values = {name: getattr(part, attribute, None) for name, part in parts.items()}
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(f"the parts disagree on {attribute}: {listed}")
