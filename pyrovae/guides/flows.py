"""Flows whose every parameter the encoder puts out: planar and Sylvester.

Noise from a diagonal normal goes through maps with tanh units, whose determinants are cheap and
whose inverses are not: these guides score their own draws alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import normalize, softplus

from pyrovae._config import shape_of
from pyrovae._distributions import diagonal_normal
from pyrovae._flows import Flowed, zuko
from pyrovae._part import latent_shape
from pyrovae.guides.base import Guide
from pyrovae.nets import Net

LIMIT = 0.999
"""How near a unit may come to folding space; at 1 its determinant is zero."""


class _AmortizedFlow(Guide):
    """Base: a diagonal normal, then steps with `step_params()` parameters each, from the encoder.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents.
        net: Recipe of the encoder.
        transforms: Number of steps.
    """

    scorable = False

    def __init__(self, shape: tuple[int, ...], latent_dim: int, net: Net | None, transforms: int):
        (self.transforms,) = shape_of(transforms, "transforms")
        super().__init__(shape, latent_dim, net)

    def param_shape(self) -> tuple[int]:
        """Mean and scale, then each step's parameters."""
        return (2 * self.event_shape[0] + self.transforms * self.step_params(),)

    def step_params(self) -> int:
        """How many parameters a step has."""
        raise NotImplementedError

    def steps(self, params: Tensor) -> list[Transform]:
        """The steps with these parameters, `(*, transforms, step_params())`."""
        raise NotImplementedError

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """The flow with this base and these steps."""
        (dim,) = self.event_shape
        loc, raw_scale, rest = params.split([dim, dim, params.shape[-1] - 2 * dim], dim=-1)
        steps = self.steps(rest.unflatten(-1, (self.transforms, -1)))
        transform = zuko.transforms.ComposedTransform(*steps)
        return Flowed(diagonal_normal(loc, raw_scale, 1), transform)


class Planar(_AmortizedFlow):
    r"""Planar flow: a diagonal normal bent along one direction per step.

    .. math:: z \leftarrow z + u(x) \tanh(w(x)^\top z + b(x))

    The cheapest flow; each step is a network with one hidden unit, so many latents need many steps.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out the base's mean and scale and, for
            each step, u (D numbers), w (D) and b (1).
        transforms: Number of steps.

    References:
        Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), arXiv:1505.05770
    """

    def __init__(
        self, shape: tuple[int, ...], latent_dim: int, net: Net | None = None, transforms: int = 8
    ):
        super().__init__(shape, latent_dim, net, transforms)

    def step_params(self) -> int:
        """U, w and b."""
        return 2 * self.event_shape[0] + 1

    def steps(self, params: Tensor) -> list[Transform]:
        """Planar maps."""
        (dim,) = self.event_shape
        u, w, bias = params.split([dim, dim, 1], dim=-1)
        inner, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
        # The paper's softplus(s) - 1 moved to pass through 0, lest u explode where w is near 0.
        bounded = softplus(inner + math.log(math.expm1(LIMIT))) - LIMIT
        u = u + (bounded - inner) * w / square.clamp(min=1e-12)
        parts = (part.unbind(-2) for part in (u, w, bias, bounded))
        return [_Planar(*step) for step in zip(*parts, strict=True)]


class OrthogonalSylvester(_AmortizedFlow):
    r"""Sylvester flow with orthogonal columns: a planar flow with M units per step.

    .. math:: z \leftarrow z + Q(x) R_1(x) \tanh(R_2(x) Q(x)^\top z + b(x))

    Q has M orthonormal columns, R_1 and R_2 are upper triangular. One step does what M planar ones
    do. For up to some dozens of latents, with an encoder whose last layer can be large.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out the base's mean and scale and, for
            each step, Q (D M numbers), R_1 and R_2 (M (M + 1) / 2 each) and b (M).
        transforms: Number of steps.
        num_ortho: M, the columns of Q, at most `latent_dim`; if None 8, or `latent_dim` where that
            is less.

    References:
        Sylvester Normalizing Flows for Variational Inference (van den Berg et al., 2018),
        arXiv:1803.05649; Q here is by QR decomposition, exact, instead of by iteration
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        transforms: int = 4,
        num_ortho: int | None = None,
    ):
        (dim,) = latent_shape(latent_dim)
        (self.num_ortho,) = shape_of(min(8, dim) if num_ortho is None else num_ortho, "num_ortho")
        if self.num_ortho > dim:
            raise ValueError(f"num_ortho must be at most {dim} (latent_dim), got {num_ortho}")
        super().__init__(shape, latent_dim, net, transforms)

    def step_params(self) -> int:
        """Q, R_1, R_2 and b."""
        return self.event_shape[0] * self.num_ortho + _triangles(self.num_ortho)

    def steps(self, params: Tensor) -> list[Transform]:
        """Sylvester maps."""
        size = self.event_shape[0] * self.num_ortho
        raw, rest = params.split([size, params.shape[-1] - size], dim=-1)
        raw = raw.unflatten(-1, (-1, self.num_ortho))
        # Columns near those of the identity: never zero, which has no decomposition.
        columns = raw + torch.eye(*raw.shape[-2:], dtype=raw.dtype, device=raw.device)
        q, r = torch.linalg.qr(columns)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # LAPACK's signs jump
        return _sylvester(q.unbind(-3), rest)


class HouseholderSylvester(_AmortizedFlow):
    r"""Sylvester flow with as many units as latents, turned by Householder reflections.

    .. math:: z \leftarrow z + Q(x) R_1(x) \tanh(R_2(x) Q(x)^\top z + b(x))

    Q is a product of H reflections, R_1 and R_2 are upper triangular. Every latent moves in every
    step: the strongest of these flows, and the dearest, for the encoder's last layer grows with the
    square of the number of latents.

    Args:
        shape: Shape of one datum, such as `(1, 28, 28)`.
        latent_dim: Number of latents, D.
        net: Recipe of the encoder; `MLP()` if None. It puts out the base's mean and scale and, for
            each step, H directions (H D numbers), R_1 and R_2 (D (D + 1) / 2 each) and b (D).
        transforms: Number of steps.
        num_reflections: H, how many reflections make a Q.

    References:
        Sylvester Normalizing Flows for Variational Inference (van den Berg et al., 2018),
        arXiv:1803.05649
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        net: Net | None = None,
        transforms: int = 4,
        num_reflections: int = 8,
    ):
        (self.num_reflections,) = shape_of(num_reflections, "num_reflections")
        super().__init__(shape, latent_dim, net, transforms)

    def step_params(self) -> int:
        """Directions, R_1, R_2 and b."""
        (dim,) = self.event_shape
        return dim * self.num_reflections + _triangles(dim)

    def steps(self, params: Tensor) -> list[Transform]:
        """Sylvester maps."""
        size = self.event_shape[0] * self.num_reflections
        raw, rest = params.split([size, params.shape[-1] - size], dim=-1)
        raw = raw.unflatten(-1, (-1, self.num_reflections))
        # Directions near those of the axes: never zero, which points nowhere.
        identity = torch.eye(raw.shape[-2], dtype=raw.dtype, device=raw.device)
        axes = identity[:, torch.arange(self.num_reflections, device=raw.device) % len(identity)]
        columns = normalize(raw + axes, dim=-2).unbind(-3)
        return _sylvester([_Reflections.along(v) for v in columns], rest)


class _Map(Transform):
    """A map of vectors that comes with its log determinant, and without an inverse."""

    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError(
            "a planar or Sylvester flow has no inverse that is a formula: it scores only the last "
            "draw it made (with gradients: by rsample). Take a guide that is scorable"
        )

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the log determinant of the map's derivative."""
        raise NotImplementedError


class _Planar(_Map):
    """Adds u tanh(w'x + b)."""

    def __init__(self, u: Tensor, w: Tensor, bias: Tensor, inner: Tensor):
        super().__init__()
        self.u, self.w, self.bias, self.inner = u, w, bias, inner

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh((self.w * x).sum(-1, keepdim=True) + self.bias)
        log_det = torch.log1p((1 - h.square()) * self.inner)
        return x + self.u * h, log_det.squeeze(-1)


class _Sylvester(_Map):
    """Adds Q R_1 tanh(R_2 Q'x + b); the triangles are those of one matrix, without its diagonal."""

    def __init__(
        self,
        q: Tensor | _Reflections,
        matrix: Tensor,
        first: Tensor,
        second: Tensor,
        bias: Tensor,
    ):
        super().__init__()
        self.q, self.bias = q, bias
        self.r1, self.r2 = (matrix.triu(1), first), (matrix.tril(-1).mT, second)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(_triangular(*self.r2, _times(self.q.mT, x)) + self.bias)
        log_det = torch.log1p((1 - h.square()) * self.r1[1] * self.r2[1]).sum(-1)
        return x + _times(self.q, _triangular(*self.r1, h)), log_det


class _Reflections:
    """The matrix I - v w, which is never written out."""

    def __init__(self, v: Tensor, w: Tensor):
        self.v, self.w, self.shape = v, w, (v.shape[-2], v.shape[-2])

    @classmethod
    def along(cls, v: Tensor) -> _Reflections:
        """The product of the reflections along unit columns v, `(*, D, H)`."""
        half = 0.5 * torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        triangle = (v.mT @ v).triu(1) + half
        return cls(v, torch.linalg.solve_triangular(triangle, v.mT, upper=True))

    @property
    def mT(self) -> _Reflections:
        """Its transpose."""
        return _Reflections(self.w.mT, self.v.mT)

    def __matmul__(self, x: Tensor) -> Tensor:
        return x - self.v @ (self.w @ x)


def _triangles(size: int) -> int:
    """Numbers in two triangles and a bias."""
    return size**2 + 2 * size


def _sylvester(q: Sequence[Tensor | _Reflections], params: Tensor) -> list[Transform]:
    """Steps with these Q, each `(*, D, M)`, and triangles and biases from the parameters.

    Both diagonals are kept between -1 and 1, so that their product stays above -1.
    """
    size = q[0].shape[-1]
    entries, second, bias = params.split([size**2, size, size], dim=-1)
    matrix = entries.unflatten(-1, (size, size))
    first, second = (
        math.sqrt(LIMIT) * torch.tanh(raw) for raw in (matrix.diagonal(dim1=-2, dim2=-1), second)
    )
    parts = (q, matrix.unbind(-3), first.unbind(-2), second.unbind(-2), bias.unbind(-2))
    return [_Sylvester(*step) for step in zip(*parts, strict=True)]


def _triangular(triangle: Tensor, diagonal: Tensor, v: Tensor) -> Tensor:
    return _times(triangle, v) + diagonal * v


def _times(matrix: Tensor | _Reflections, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)
