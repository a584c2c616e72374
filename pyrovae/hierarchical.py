r"""Variational autoencoders with several layers of latents.

The prior is a chain: z_L at the top, and each layer a normal given the one above it, down to z_1,
from which the data come:

.. math:: p(x, z_1, ..., z_L) = p(z_L) \, p(z_{L-1} | z_L) \cdots p(z_1 | z_2) \, p(x | z_1).

The guide can go through the layers in either order: up from the data, as
:math:`q(z_1|x) \, q(z_2|z_1) \cdots` (`HierarchicalVAE`), or down from the top, as the model does
(`LadderVAE`).

References:
    Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519;
    Ladder Variational Autoencoders (Soenderby et al., 2016), arXiv:1602.02282
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.guides import Guide
from pyrovae.likelihoods import Likelihood
from pyrovae.priors import Prior
from pyrovae.vae import VAE, check_modules

__all__ = ["HierarchicalVAE", "LadderVAE"]


class HierarchicalVAE(VAE):
    """A VAE with L layers of latents, inferred from the data upwards: q(z1|x) q(z2|z1) ...

    For latents of latents, with any guides. Layers far from the data are hard to bring to use this
    way (see `LadderVAE`). The code of a datum is z1, the layer next to it: `encode` gives
    it, `decode` and `interpolate` start from it. `sample` starts at the top.

    A conditional p(z1|z2) is what a guide is, a distribution of a vector given a tensor:
    `guides.Normal((dim2,), dim1)`.

    Args:
        prior: p(zL), of the top layer. One that is made of the guide is made of the top layer's,
            q(zL|zL-1), and starts at codes of data.
        conditionals: p(z1|z2), ..., p(zL-1|zL): `conditionals[0](z2)` is a distribution of z1.
        likelihood: p(x|z1).
        guides: q(z1|x), q(z2|z1), ..., q(zL|zL-1): as many as layers.
        missing: Whether NaN in x marks a missing entry: the likelihood leaves it out, and the guide
            sees zero for it. Needs a likelihood whose entries are independent given z1.

    Raises:
        TypeError: If a part is no module, or a conditional or guide is none of `guides`.
        ValueError: If the parts do not fit each other, or a conditional cannot score any z.

    Example:
        >>> from pyrovae import guides, likelihoods, priors
        >>> shape = (1, 8, 8)
        >>> vae = HierarchicalVAE(
        ...     priors.StandardNormal(latent_dim=2),
        ...     [guides.Normal((2,), latent_dim=5)],
        ...     likelihoods.Bernoulli(shape, latent_dim=5),
        ...     [guides.Normal(shape, latent_dim=5), guides.Normal((5,), latent_dim=2)],
        ... )
        >>> vae.sample(3).shape, vae.encode(torch.zeros(4, 1, 8, 8)).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([4, 5]))

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
    """

    conditionals: Any  # a list of guides, to the type checker any modules
    encoders: Any

    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Guide],
        likelihood: Likelihood,
        guides: Sequence[Guide],
        missing: bool = False,
    ):
        self._begin(missing)
        check_modules(prior=prior, likelihood=likelihood)
        _check_guides("conditionals", conditionals)
        _check_guides("guides", guides)
        if len(conditionals) != len(guides) - 1:
            raise ValueError(
                f"conditionals must hold one distribution less than guides, which has "
                f"{len(guides)} layers; got {len(conditionals)}"
            )
        self.prior, self.likelihood = prior, likelihood
        self.conditionals, self.encoders = nn.ModuleList(conditionals), nn.ModuleList(guides)
        self._check_shapes()
        self._check_families()
        if hasattr(prior, "connect"):
            prior.connect(guides[-1])

    def model(self, x: Tensor) -> None:
        """p(zL) ... p(z1|z2) p(x|z1) for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.encoders)}", self.prior())
            for layer, conditional in self._downwards():
                z = pyro.sample(f"z{layer}", conditional(z))
            self._observe_given(self.likelihood(z), x)

    def guide(self, x: Tensor) -> None:
        """q(z1|x) q(z2|z1) ... for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        below = self._seen(x)
        with pyro.plate("data", len(x)):
            for layer, encoder in enumerate(self.encoders, 1):
                below = pyro.sample(f"z{layer}", encoder(below))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z1|x): batch shape that of x before `shape`, event shape `(latent_dims[0],)`."""
        return self.encoders[0](self._seen(x))

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """Number of latents of each layer, from the data up."""
        return tuple(encoder.latent_dim for encoder in self.encoders)

    @classmethod
    def shape_above(cls, guide: Guide) -> tuple[int, ...]:
        """Shape of what the guide of the next layer reads: a draw of this layer."""
        return guide.event_shape

    def initialize(self, x: Tensor) -> None:
        """Start new parts at training data x, `(n, *shape)`: the prior at what its guide reads."""
        with self._evaluation():
            read = self._read(self._seen(x))
        starts = [(self.prior, read[-1]), (self.likelihood, x)]
        for part, data in (*starts, *zip(self.encoders, read, strict=True)):
            if initialize := getattr(part, "initialize", None):
                initialize(data)

    def sample_latent(self, num_samples: int = 1) -> Tensor:
        """Draw z1 by way of all layers above it, shape `(num_samples, latent_dims[0])`."""
        with self._evaluation():
            z = self.prior().sample((num_samples,))
            for _, conditional in self._downwards():
                z = conditional(z).sample()
            return z

    def _downwards(self) -> list[tuple[int, Guide]]:
        """The layers below the top and their conditionals, in the order of the model."""
        return list(enumerate(self.conditionals, 1))[::-1]

    def _read(self, x: Tensor) -> list[Tensor]:
        """What each layer's guide reads, at the means of the layers below."""
        read = [x]
        for encoder in self.encoders[:-1]:
            read.append(encoder(read[-1]).mean)
        return read

    def _check_shapes(self) -> None:
        """Refuse parts that do not fit each other."""
        first, top = self.encoders[0], self.encoders[-1]
        _check_fit("likelihood", self.likelihood, shape=first.shape, latent_dim=first.latent_dim)
        _check_fit("prior", self.prior, shape=top.shape, latent_dim=top.latent_dim)
        pairs = pairwise(self.encoders)
        for i, ((below, above), p) in enumerate(zip(pairs, self.conditionals, strict=True)):
            _check_fit(f"guides[{i + 1}]", above, shape=self.shape_above(below))
            given = (above.latent_dim,)
            _check_fit(f"conditionals[{i}]", p, shape=given, latent_dim=below.latent_dim)

    def _check_families(self) -> None:
        """Refuse distributions that cannot do what is asked of them."""
        for i, conditional in enumerate(self.conditionals):
            if not conditional.scorable:
                raise ValueError(
                    f"conditionals[{i}] ({type(conditional).__name__}) scores only its own draws: "
                    "take one that scores any z, such as guides.Normal"
                )


class LadderVAE(HierarchicalVAE):
    r"""A VAE with L layers of latents, inferred from the top downwards: q(zL|x) ... q(z1|x, z2).

    What goes up from the data is deterministic: each guide's net reads the parameters that the one
    below put out. On the way down, each layer joins what its guide says with what the model says,
    as one normal is multiplied by another, precision by precision:

    .. math:: q(z_l|x, z_{l+1}) \propto N(z_l; \hat\mu_l(x), \hat\sigma_l(x)^2) \, p(z_l|z_{l+1})

    so higher layers can stay in use where those of a `HierarchicalVAE` are left idle. Below the
    top, guides and conditionals are diagonal normals; the top guide may be any. The code of a datum
    is z1, its mean taken along the means of the layers above.

    Train it as the paper does, with batch normalisation in the nets (`MLP(batch_norm=True)`) and a
    warm-up of the KL: without both, all layers may stay at the prior. What goes up in the paper are
    hidden layers beside the parameters; here it is the parameters themselves.

    Args:
        prior: p(zL), of the top layer. One that is made of the guide is made of the top layer's,
            and starts at what that reads of data.
        conditionals: p(z1|z2), ..., p(zL-1|zL): `conditionals[0](z2)` is a distribution of z1.
        likelihood: p(x|z1).
        guides: N(mu1, sigma1^2), ..., q(zL|x), as many as layers: the first reads x, each other
            one the parameters of that below, `guides.Normal(below.param_shape(), latent_dim)`.
        missing: Whether NaN in x marks a missing entry: the likelihood leaves it out, and the guide
            sees zero for it. Needs a likelihood whose entries are independent given z1.

    Raises:
        TypeError: If a part is no module, or a conditional or guide is none of `guides`.
        ValueError: If the parts do not fit each other, or one below the top is no diagonal normal.

    Example:
        >>> from pyrovae import guides, likelihoods, priors
        >>> below = guides.Normal((1, 8, 8), latent_dim=5)
        >>> vae = LadderVAE(
        ...     priors.StandardNormal(latent_dim=2),
        ...     [guides.Normal((2,), latent_dim=5)],
        ...     likelihoods.Bernoulli((1, 8, 8), latent_dim=5),
        ...     [below, guides.Normal(below.param_shape(), latent_dim=2)],
        ... )
        >>> vae.sample(3).shape, vae.encode(torch.zeros(4, 1, 8, 8)).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([4, 5]))

    References:
        Ladder Variational Autoencoders (Soenderby et al., 2016), arXiv:1602.02282
    """

    def guide(self, x: Tensor) -> None:
        """q(zL|x) ... q(z1|x, z2) for a batch x of shape `(batch, *shape)`."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            pyro.sample("z1", self._down(x, pyro.sample))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z1|x, z2) at the means of the layers above: event shape `(latent_dims[0],)`."""
        return self._down(x, lambda _, q: q.mean)

    @classmethod
    def shape_above(cls, guide: Guide) -> tuple[int, ...]:
        """Shape of what the guide of the next layer reads: the parameters of this one."""
        return guide.param_shape()

    def _down(
        self, x: Tensor, choose: Callable[[str, dist.TorchDistribution], Tensor]
    ) -> dist.TorchDistribution:
        """q(z1|x, z2), each layer above set to what `choose` makes of its name and posterior."""
        read = self._read(self._seen(x))
        q = self.encoders[-1](read[-1])
        for layer, conditional in self._downwards():
            z = choose(f"z{layer + 1}", q)
            q = _product(self.encoders[layer - 1].distribution(read[layer]), conditional(z))
        return q

    def _read(self, x: Tensor) -> list[Tensor]:
        """What each layer's guide reads: x, then the parameters of the layer below."""
        read = [x]
        for encoder in self.encoders[:-1]:
            read.append(encoder.net(read[-1]))
        return read

    def _check_families(self) -> None:
        """Refuse what cannot be multiplied."""
        for name, parts in (("guides", self.encoders[:-1]), ("conditionals", self.conditionals)):
            for i, part in enumerate(parts):
                if not part.is_diagonal_normal:
                    raise ValueError(
                        f"{name}[{i}] ({type(part).__name__}) is no diagonal normal, and top-down "
                        "inference multiplies those below the top: take guides.Normal there, or "
                        "infer bottom-up with HierarchicalVAE"
                    )


def _product(a: dist.TorchDistribution, b: dist.TorchDistribution) -> dist.TorchDistribution:
    """The diagonal normal whose density is proportional to the product of two: precisions add."""
    share = b.variance / (a.variance + b.variance)
    scale = a.stddev * share.sqrt()
    return dist.Normal(torch.lerp(b.mean, a.mean, share), scale).to_event(1)


def _check_guides(name: str, parts: Sequence[Guide]) -> None:
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Guide) for p in parts):
        raise TypeError(f"{name} must be a list of modules of pyrovae.guides, got {parts!r}")


def _check_fit(name: str, part: nn.Module, **needed: Any) -> None:
    """Refuse a part that says of itself what its neighbours cannot do with."""
    for attribute, value in needed.items():
        if getattr(part, attribute, value) != value:
            raise ValueError(
                f"{name} has {attribute} {getattr(part, attribute)}, and the parts around it need "
                f"{value}"
            )
