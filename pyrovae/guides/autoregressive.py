r"""Flows whose steps are networks: inverse autoregressive flows and neural splines.

.. math:: z = \mu(x) + \sigma(x) \, f_T(\dots f_1(\epsilon; c(x)) \dots; c(x)), \quad
    \epsilon \sim N(0, I)

Each step changes every entry by a monotone function of it that depends on the entries before. The
encoder puts out mu, sigma and a context c, which every step sees. Steps start near the identity, so
training starts at a diagonal normal; applied before mu and sigma, they work where the noise is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

from pyrovae._config import shape_of
from pyrovae._distributions import positive
from pyrovae._flows import Flowed, zuko
from pyrovae.guides.base import Guide
from pyrovae.nets import Net


class _Autoregressive(Guide):
    """Base: the steps, their networks and their context.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the encoder.
        transforms: Number of steps.
        hidden: Units of each hidden layer of a step's network.
        context_dim: Size of the context.
        univariate: Monotone function of one entry, made of parameters.
        shapes: Shapes of those parameters.
    """

    passes: int | None = None
    """Runs of a step's network that invert it; None for one per latent."""

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None,
        transforms: int,
        hidden: int | Sequence[int],
        context_dim: int,
        univariate: Callable[..., Transform],
        shapes: Sequence[tuple[int, ...]],
    ):
        (self.transforms,) = shape_of(transforms, "transforms")
        (self.context_dim,) = shape_of(context_dim, "context_dim")
        super().__init__(shape, latent_dim, net)
        options: dict[str, Any] = {
            "passes": self.passes,
            "univariate": univariate,
            "shapes": shapes,
            "hidden_features": shape_of(hidden, "hidden"),
            "activation": nn.SiLU,
        }
        make = partial(zuko.flows.autoregressive.MaskedAutoregressiveTransform, **options)
        steps = [make(latent_dim, context_dim, order=self._order(i)) for i in range(transforms)]
        for step in steps:
            with torch.no_grad():
                step.hyper[-1].weight.mul_(0.01)
                step.hyper[-1].bias.zero_()
        self.steps = nn.ModuleList(steps)

    def param_shape(self) -> tuple[int]:
        """Mean, scale and context."""
        return (2 * self.event_shape[0] + self.context_dim,)

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """The flow with this mean, scale and context."""
        (dim,) = self.event_shape
        loc, raw_scale, context = params.split([dim, dim, self.context_dim], dim=-1)
        steps = [step(context) for step in self.steps]
        scaled = AffineTransform(loc, positive(raw_scale), event_dim=1)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return Flowed(noise, zuko.transforms.ComposedTransform(*steps, scaled))

    def _order(self, step: int) -> Tensor:
        """Which entry comes how early: one way and back."""
        order = torch.arange(self.latent_dim)
        return order if step % 2 == 0 else order.flip(0)


class IAF(_Autoregressive):
    """Inverse autoregressive flow: each entry is scaled and shifted by functions of those before.

    For posteriors with any dependence between latents and one mode. Each step scales an entry by a
    factor between 0.1 and 10. Sampling and scoring a draw take one pass of each step; scoring
    another value takes one per latent.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out mean, scale and context:
            `2 * D + context_dim` numbers.
        transforms: Number of steps.
        hidden: Units of each hidden layer of a step's network.
        context_dim: Size of the context.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        arXiv:1606.04934
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        transforms: int = 4,
        hidden: int | Sequence[int] = (128,),
        context_dim: int = 64,
    ):
        affine = partial(zuko.transforms.MonotonicAffineTransform, slope=0.1)
        super().__init__(shape, latent_dim, net, transforms, hidden, context_dim, affine, [(), ()])


class NeuralSpline(_Autoregressive):
    """Neural spline flow: each entry goes through a spline that depends on those before.

    The most flexible guide: several modes, any dependence. Sampling and scoring a draw take one
    pass of each step; scoring another value takes one per latent (`NeuralSplineCoupling`: two).

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out mean, scale and context:
            `2 * D + context_dim` numbers.
        transforms: Number of steps.
        bins: Pieces of each spline, which covers noise from -5 to 5 and is the identity beyond.
        hidden: Units of each hidden layer of a step's network.
        context_dim: Size of the context.

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032, in the direction of
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        arXiv:1606.04934
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        transforms: int = 3,
        bins: int = 8,
        hidden: int | Sequence[int] = (128,),
        context_dim: int = 64,
    ):
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        super().__init__(
            shape,
            latent_dim,
            net,
            transforms,
            hidden,
            context_dim,
            zuko.transforms.MonotonicRQSTransform,
            [(bins,), (bins,), (bins - 1,)],
        )


class NeuralSplineCoupling(NeuralSpline):
    """Neural spline flow in two halves: the second goes through splines that depend on the first.

    Quick both ways, so the choice where log q(z|x) is needed at other values than its own draws:
    doubly reparameterized gradients, annealing from the guide, a prior made of it. A little less
    flexible per step than `NeuralSpline`. The arguments are the same.

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032
    """

    passes = 2

    def _order(self, step: int) -> Tensor:
        """Halves drawn anew for every other step, and swapped in between."""
        generator = torch.Generator().manual_seed(step // 2)
        order = torch.randperm(self.latent_dim, generator=generator)
        return order if step % 2 == 0 else self.latent_dim - 1 - order
