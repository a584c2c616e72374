r"""Integrals on a lattice that follows the mass.

.. math:: \int f(u) \, du \approx |\det A| \sum_{k \in \mathbb{Z}^D} f(c + A k).

For a smooth density that decays on all sides this trapezoid rule converges faster than any power
of the spacing: a normal density is integrated to 5e-9 by nodes one standard deviation apart. Where
the mass is, is not known. So a coarse lattice comes first, wide enough to have its highest node
inside, and then, over and over, the nodes that may be near mass are kept, their neighbours added,
and the lattice shrunk: to the spread that it finds as long as that is less than its spacing, to
half when it is not.

References:
    The Exponentially Convergent Trapezoidal Rule (Trefethen & Weideman, 2014),
    doi:10.1137/130932132
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.evidence.joint import LogDensity
from pyrovae.evidence.quadrature import Integral

SIDES = {1: 41, 2: 21, 3: 13}
"""Nodes along each side of the first lattice, by dimension."""

ROUNDS = 60
"""Lattices of a datum, at most."""

SPARE = 7.0
"""Nats below the tolerance at which mass is left out."""

CONVERGING = 0.5
"""What sums over every second node differ by, at most, where a lattice says anything."""

LAYERS = 200
"""By which a lattice grows, at most: tails are cut off there, and counted as an error."""

RESOLVED = 0.8
"""Variance along a lattice, in squared spacings, from which on it resolves the density."""


class Lattice(NamedTuple):
    """A lattice of each datum, u = c + A k for whole numbers k.

    Attributes:
        centre: c of each, shape `(N, D)`.
        axes: A of each, its columns from one node to the next, shape `(N, D, D)`.
    """

    centre: Tensor
    axes: Tensor

    def u(self, owner: Tensor, nodes: Tensor) -> Tensor:
        """Latents at nodes of these data, shape `(M, D)`."""
        return self.centre[owner] + (self.axes[owner] @ nodes.to(self.axes)[:, :, None])[:, :, 0]

    def nearest(self, owner: Tensor, u: Tensor) -> Tensor:
        """The nodes nearest to latents of these data."""
        away = (u - self.centre[owner])[:, :, None]
        return torch.linalg.solve(self.axes[owner], away)[:, :, 0].round().long()


class Cells(NamedTuple):
    """Nodes of lattices with what is known there.

    Attributes:
        owner: Whose each is, shape `(M,)`.
        nodes: Whole numbers, shape `(M, D)`.
        log_f: Log densities, shape `(M,)`.
        near: Whether mass may be near, shape `(M,)`.
    """

    owner: Tensor
    nodes: Tensor
    log_f: Tensor
    near: Tensor

    def of(self, kept: Tensor) -> Cells:
        """Those of some data, a mask `(N,)`."""
        return Cells(*(part[kept[self.owner]] for part in self))

    def total(self, log_terms: Tensor, num_data: int) -> Tensor:
        """Log of each datum's sum of exponentials, shape `(N,)`."""
        top = _highest(log_terms, self.owner, num_data).clamp(min=-1e300)
        sums = torch.zeros_like(top).index_add(0, self.owner, (log_terms - top[self.owner]).exp())
        return sums.log() + top


class Follower:
    """The integral of each datum's density, on lattices of its own.

    Args:
        log_f: Log densities.
        draws: From where mass may be, shape `(S, N, D)`.
        tolerance: Of the result, nats.
        max_evaluations: Of each datum's density, at most, once it is found.
    """

    def __init__(self, log_f: LogDensity, draws: Tensor, tolerance: float, max_evaluations: int):
        self.log_f, self.tolerance = log_f, tolerance
        self.depth = SPARE - math.log(tolerance)
        self.num_data, self.dim = draws.shape[1:]
        self.spent = torch.zeros_like(draws[0, :, 0], dtype=torch.long)
        self.lattice, self.box = self._enclosing(draws)
        self.limit = self.spent + max_evaluations

    def integrate(self) -> Integral:
        """Follow the mass until halving the lattice changes next to nothing."""
        left = torch.ones_like(self.spent, dtype=torch.bool)
        log_z = torch.full_like(self.lattice.centre[:, 0], math.nan)
        error = torch.full_like(log_z, math.inf)
        owner, nodes = _product(left.nonzero()[:, 0], self.box)
        for _ in range(ROUNDS):
            cells, complete = self._fill(owner, nodes)
            found, off, outside = self._sum(cells)
            log_z = torch.where(left & (complete | log_z.isnan()), found, log_z)
            error = torch.where(left & complete, off + outside, error)
            left = left & complete & ~(off <= self.tolerance)
            if not left.any():
                break
            owner, nodes = self._shrink(cells.of(left))
        return Integral(log_z, error, self.spent)

    def _evaluate(self, owner: Tensor, u: Tensor) -> Tensor:
        self.spent.index_add_(0, owner, torch.ones_like(owner))
        log_f = self.log_f(owner, u)
        if (log_f == math.inf).any():
            raise ValueError(
                "log p(x, z) is infinite at a latent: model or data have a density without bounds, "
                "which no grid integrates"
            )
        return log_f.nan_to_num(-math.inf, neginf=-math.inf)  # far out, numbers overflow

    def _enclosing(self, draws: Tensor) -> tuple[Lattice, Tensor]:
        """A box of nodes about the best draw, with the highest node inside."""
        everyone = torch.arange(self.num_data, device=draws.device)
        log_f = self._evaluate(everyone.repeat(len(draws)), draws.flatten(0, 1))
        log_f = log_f.unflatten(0, (len(draws), -1))
        if (log_f.amax(0) == -math.inf).any():
            raise ValueError(
                "p(x, z) is zero, or no number, at all draws of a datum's latents: check the "
                "weights, and that the data can come from the model"
            )
        centre = draws[log_f.argmax(0), everyone]
        side = SIDES[self.dim]
        half = 1.5 * (draws - centre).abs().amax(0)
        lattice = Lattice(centre, torch.diag_embed(half / (side // 2)))
        places = torch.arange(side, device=draws.device) - side // 2
        box = torch.cartesian_prod(*[places] * self.dim).reshape(-1, self.dim)
        wide = everyone
        for _ in range(ROUNDS):
            owner, nodes = _product(wide, box)
            log_f = self._evaluate(owner, lattice.u(owner, nodes)).unflatten(0, (len(wide), -1))
            wide = wide[(box[log_f.argmax(1)].abs() == side // 2).any(1)]
            if not len(wide):
                break
            lattice.axes[wide] *= 2
        return lattice, box

    def _fill(self, owner: Tensor, nodes: Tensor) -> tuple[Cells, Tensor]:
        """Evaluate these nodes, and on from where mass may be near to where there is none.

        Returns:
            The nodes, and which data had evaluations enough for theirs.
        """
        known = Cells(owner[:0], nodes[:0], self.lattice.centre[:0, 0], owner[:0].bool())
        complete = torch.ones_like(self.spent, dtype=torch.bool)
        for _ in range(LAYERS):
            wanted = owner.bincount(minlength=self.num_data)
            complete = complete & ((wanted == 0) | (self.spent + wanted <= self.limit))
            owner, nodes = owner[complete[owner]], nodes[complete[owner]]
            if not len(owner):
                break
            log_f = self._evaluate(owner, self.lattice.u(owner, nodes))
            fresh = Cells(owner, nodes, log_f, torch.ones_like(owner, dtype=torch.bool))
            known = Cells(*(torch.cat(parts) for parts in zip(known, fresh, strict=True)))
            known, edge, owner, nodes = self._look(known)
        else:
            known = known._replace(near=known.near & ~edge)
        return known, complete

    def _look(self, cells: Cells) -> tuple[Cells, Tensor, Tensor, Tensor]:
        """Where mass may be near, where neighbours of these places are missing, and which.

        A log density that is concave rises from a node to anywhere in its cell by no more than half
        the sum, over directions, of what it differs by from its neighbours.
        """
        keys, strides = _keys(cells.owner, cells.nodes)
        keys, order = keys.sort()
        owner, nodes, log_f, _ = (part[order] for part in cells)
        reach, missing = log_f, []
        for dim, stride in enumerate(strides):
            rises = []
            for sign in (-1, 1):
                beside = torch.searchsorted(keys, keys + sign * stride).clamp(max=len(keys) - 1)
                there = keys[beside] == keys + sign * stride
                rise = (log_f[beside] - log_f).abs().nan_to_num(0.0, posinf=0.0)
                rises.append(torch.where(there, rise, 0.0))
                missing.append((dim, sign, ~there))
            reach = reach + torch.maximum(*rises) / 2
        near = reach >= (_highest(log_f, owner, self.num_data) - self.depth)[owner]
        wanted = [(near & absent, dim, sign) for dim, sign, absent in missing]
        step = torch.eye(self.dim, dtype=nodes.dtype, device=nodes.device)
        beyond = torch.cat([nodes[mask] + sign * step[dim] for mask, dim, sign in wanted])
        owners = torch.cat([owner[mask] for mask, _, _ in wanted])
        edge = torch.stack([mask for mask, _, _ in wanted]).any(0)
        return Cells(owner, nodes, log_f, near), edge, *_distinct(owners, beyond)

    def _sum(self, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
        """Each datum's integral, nats, its error inside the lattice, and that outside.

        By how much sums over every second node differ, over every fourth and every eighth, tells
        how fast the sum converges: by the same factor once more, if not faster. Outside, a density
        is taken to fall like a power of the distance.
        """
        total = cells.total(cells.log_f, self.num_data)
        second, fourth, eighth = (self._spread(cells, total, every) for every in (2, 4, 8))
        slower = (fourth / eighth.clamp(max=1.0)).nan_to_num(0.0)
        factor = torch.maximum((second / fourth.clamp(max=1.0)).nan_to_num(0.0), slower)
        off = 4 * factor * torch.maximum(second, factor.square() * fourth)  # one is small by chance
        off = torch.where(second < CONVERGING, off, math.inf)
        mean, _ = self._moments(cells, total)
        far = (cells.nodes - mean[cells.owner]).norm(dim=1).clamp(min=1.0).log()
        edge = cells.total(torch.where(cells.near, -math.inf, cells.log_f + far), self.num_data)
        volume = torch.linalg.slogdet(self.lattice.axes).logabsdet
        return total + volume, off, (edge - total).exp()

    def _spread(self, cells: Cells, total: Tensor, every: int) -> Tensor:
        """By how much sums over every so many nodes differ, from whichever one begins."""
        begins = (cells.nodes % every * every ** torch.arange(self.dim).to(cells.nodes)).sum(1)
        sums = total.new_zeros(self.num_data, every**self.dim)
        share = (cells.log_f - total[cells.owner]).exp()
        sums = sums.index_put((cells.owner, begins), share, accumulate=True)
        return (sums * every**self.dim - 1).square().mean(1).sqrt()

    def _moments(self, cells: Cells, total: Tensor) -> tuple[Tensor, Tensor]:
        """Means and covariances on the lattices, in spacings."""
        mass = (cells.log_f - total[cells.owner]).exp()[:, None]
        mean = total.new_zeros(self.num_data, self.dim)
        mean = mean.index_add(0, cells.owner, mass * cells.nodes)
        away = cells.nodes - mean[cells.owner]
        outer = mass[:, :, None] * away[:, :, None] * away[:, None, :]
        return mean, outer.new_zeros(self.num_data, self.dim, self.dim).index_add(
            0, cells.owner, outer
        )

    def _shrink(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """A finer lattice, and its nodes to start from."""
        mean, cov = self._moments(cells, cells.total(cells.log_f, self.num_data))
        same = torch.eye(self.dim).to(cov)
        spread, vectors = torch.linalg.eigh(cov + same / 12)  # as if spread over each cell
        resolved = spread[:, 0] > RESOLVED
        stretch = vectors @ (spread.clamp(max=1.0).sqrt()[:, :, None] * vectors.mT)
        stretch = torch.where(resolved[:, None, None], same / 2, stretch)
        mean = torch.where(resolved[:, None], 0.0, mean)
        owner, nodes = cells.owner[cells.near], cells.nodes[cells.near]
        u = self.lattice.u(owner, nodes)
        centre, axes = self.lattice
        centre = centre + (axes @ mean[:, :, None])[:, :, 0]
        self.lattice = Lattice(centre, axes @ stretch)
        nodes = self.lattice.nearest(owner, u)
        places = torch.arange(-1, 2, device=nodes.device)
        around = torch.cartesian_prod(*[places] * self.dim).reshape(-1, self.dim)
        children = (nodes[:, None] + around).flatten(0, 1)
        return _distinct(owner.repeat_interleave(len(around)), children)


def _highest(log_f: Tensor, owner: Tensor, num_data: int) -> Tensor:
    """Each datum's largest value, shape `(N,)`."""
    lowest = log_f.new_full((num_data,), -math.inf)
    return lowest.scatter_reduce(0, owner, log_f, "amax")


def _product(which: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The same nodes for each of some data."""
    return which.repeat_interleave(len(nodes)), nodes.repeat(len(which), 1)


def _distinct(owner: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Each node of each datum once."""
    if not len(owner):
        return owner, nodes
    keys, order = _keys(owner, nodes)[0].sort()
    first = order[torch.cat([torch.ones_like(keys[:1]), keys.diff()]) != 0]
    return owner[first], nodes[first]


def _keys(owner: Tensor, nodes: Tensor) -> tuple[Tensor, list[int]]:
    """A number for each node of each datum, and what it changes by to the next in each direction.

    Next to the outermost nodes there is room for one more.
    """
    low = nodes.amin(0) - 1
    sizes = (nodes.amax(0) - low + 2).tolist()
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    offsets = ((nodes - low) * torch.tensor(strides, device=nodes.device)).sum(1)
    return owner * math.prod(sizes) + offsets, strides
