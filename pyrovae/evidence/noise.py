r"""The normal noise that a guide's draws are made of: drawn wider, or as evenly spread points.

A guide makes its draw of standard normal noise, z = T(eps), and log p(x, z) - log q(z|x) is a
function of eps. Noise of another density r is as good, if the weights say so:

.. math:: p(x) = E_{r(\epsilon)} \left[ \frac{p(x, T(\epsilon))}{q(T(\epsilon) \mid x)} \,
    \frac{N(\epsilon; 0, I)}{r(\epsilon)} \right].

That needs nothing of T. Where T has an inverse (normals, flows), the weights are those of the guide
whose noise has density r, as the Jacobian determinant of T is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae import program
from pyrovae.program import Args, PyroFunction

NORMAL = {getattr(torch.ops.aten, name) for name in ("normal", "normal_", "randn", "randn_like")}
"""Torch's operators that draw normal noise: whatever a distribution calls ends in one of them."""

COPIES = 32
"""Independent randomizations of the points, whose spread is the error."""

BITS = 30
"""Of a point's coordinate: what torch's direction numbers have."""


class Normals(TorchDispatchMode):
    """Sends every draw of standard normal noise through a function.

    Args:
        change: From the noise to what takes its place; of the same shape.

    Raises:
        Refused: If anything else is drawn.
    """

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.change = change

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; replace what it draws."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return out
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if func.overloadpacket in NORMAL:
            loc, scale = given.get("mean", 0.0), given.get("std", 1.0)
            return out.copy_(loc + scale * self.change((out - loc) / scale))
        if "dropout_p" in names and not given.get("dropout_p"):  # attention, as it is in evaluation
            return out
        raise program.Refused(
            f"the guide draws noise that is not normal ({func.overloadpacket.__name__}), and only "
            "normal noise can be widened or made of Sobol points: leave widen and sobol as they "
            "are, or take a guide that is a normal distribution or a flow"
        )


class Place(NamedTuple):
    """Where the rows are in one draw of noise, dimensions counted from the end.

    Attributes:
        particles: The dimension of size K.
        data: The dimension of size N; the same if it holds all K * N rows.
        size: How many numbers a row has.
    """

    particles: int
    data: int
    size: int

    def rows_first(self, noise: Tensor) -> Tensor:
        """A view with shape `(K, N, ...)`, or `(K * N, ...)`."""
        if self.particles == self.data:
            return noise.movedim(self.data, 0)
        return noise.movedim((self.particles, self.data), (0, 1))


class Noise:
    """What a guide draws, by row.

    Args:
        guide: q(z|x), a Pyro function of `args`.
        args: A few data.

    Attributes:
        dim: How many numbers a row's draw is made of.

    Raises:
        Refused: If it draws anything but normal noise, or noise that is not of one row.
    """

    def __init__(self, guide: PyroFunction, args: Args):
        shapes = [_shapes(guide, args, k, n) for k, n in ((2, 3), (2, 5), (4, 3))]
        if len({tuple(map(len, of_one_run)) for of_one_run in shapes}) > 1:
            raise program.Refused("how often the guide draws noise depends on the number of data")
        self.places = [_place(*alike) for alike in zip(*shapes, strict=True)]
        self.dim = sum(place.size for place in self.places)
        if not self.dim:
            raise program.Refused(
                "the guide draws no noise that could be widened or made of Sobol points: leave "
                "widen and sobol as they are"
            )

    def draw(
        self,
        sample: Callable[[int], program.Draw],
        num_particles: int,
        source: Callable[[Tensor, slice], Tensor],
    ) -> tuple[program.Draw, Tensor]:
        """Draw from the guide by noise of another source.

        Args:
            sample: What draws, a function of K.
            num_particles: K.
            source: From standard normal noise `(K, N, d)`, and which of the row's numbers it is, to
                what takes its place.

        Returns:
            The draws, and the squared length of the noise of each, shape `(K, N)`.
        """
        places, first, squares = iter(self.places), 0, torch.zeros(())

        def change(noise: Tensor) -> Tensor:
            nonlocal first, squares
            place = next(places)
            rows = place.rows_first(noise)
            old = rows.reshape(num_particles, -1, place.size)
            new = source(old, slice(first, first + place.size)).to(old)
            first, squares = first + place.size, squares.to(old) + new.square().sum(-1)
            rows.copy_(new.reshape(rows.shape))
            return noise

        with Normals(change):
            drawn = sample(num_particles)
        return drawn, squares


class Sobol:
    """Scrambled Sobol points as normal noise, for the data of one block.

    Particle k is point k // R of randomization k % R. One random linear scramble serves all, and
    each randomization of each datum has a digital shift of its own: each point is uniform, so the
    mean weight is without bias, and errors of randomizations and of data are uncorrelated.

    Args:
        num_data: N.
        dim: Numbers that a row's noise has.
        copies: R, the number of randomizations.

    Raises:
        Refused: If `dim` is more than there are direction numbers for.

    References:
        Scrambled Net Variance for Integrals of Smooth Functions (Owen, 1997);
        On the L2-Discrepancy for Anchored Boxes (Matousek, 1998);
        Recent Advances in Randomized Quasi-Monte Carlo Methods (L'Ecuyer & Lemieux, 2002)
    """

    def __init__(self, num_data: int, dim: int, copies: int):
        if dim > SobolEngine.MAXDIM:
            raise program.Refused(
                f"a draw of the guide is made of {dim:,} numbers, and Sobol points have at most "
                f"{SobolEngine.MAXDIM:,}: leave sobol=False"
            )
        self.copies = copies
        self._engine = SobolEngine(dim, scramble=True, seed=int(torch.randint(2**31, ())))
        self._shifts = torch.randint(2**BITS, (copies, num_data, dim))
        self._points = self._shifts.new_zeros(0, dim)

    def __call__(self, first: int, count: int, data: Tensor) -> Tensor:
        """Noise of `count` particles from `first` on, for some data: `(count, N, dim)`, float64."""
        k = torch.arange(first, first + count)
        while (missing := int(k[-1]) // self.copies + 1 - len(self._points)) > 0:
            drawn = self._engine.draw(missing, dtype=torch.float64) * 2**BITS
            whole = drawn.round().long().clamp(max=2**BITS - 1)
            self._points = torch.cat([self._points, whole])
        shifted = self._points[k // self.copies][:, None] ^ self._shifts[k % self.copies][:, data]
        return torch.special.ndtri(
            (shifted.double() + 0.5) / 2**BITS
        )  # in the middle of a cell: not 0, 1


def _shapes(guide: PyroFunction, args: Args, num_particles: int, num_data: int) -> list[Any]:
    """Shapes of what the guide draws, in order, for so many particles and data."""
    shapes = []

    def note(noise: Tensor) -> Tensor:
        shapes.append(noise.shape)
        return noise

    sample = program.sampler(
        guide, tuple(arg[torch.arange(num_data, device=arg.device) % len(arg)] for arg in args)
    )
    with Normals(note):
        sample(num_particles)
    return shapes


def _place(shape: torch.Size, more_data: torch.Size, more_particles: torch.Size) -> Place:
    """Where the rows are, from what grows with their number."""
    data, particles = _changed(shape, more_data), _changed(shape, more_particles)
    found = {2, 3} if data != particles else {6}
    sizes = {shape[dim] for dim in (*data, *particles)}
    if len(data) != 1 or len(particles) != 1 or sizes != found:
        raise program.Refused(
            f"the guide draws noise of shape {tuple(shape)} for two particles of three data, which "
            "does not belong to one row each: leave widen and sobol as they are"
        )
    return Place(particles[0], data[0], shape.numel() // 6)


def _changed(left: Iterable[int], right: Iterable[int]) -> list[int]:
    """Dimensions that differ, counted from the end."""
    pairs = list(zip(left, right, strict=True))
    return [i - len(pairs) for i, (a, b) in enumerate(pairs) if a != b]
