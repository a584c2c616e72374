"""Log weights of a block of data, compiled where there are particles enough to pay for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyrovae import compiled, program
from pyrovae.evidence.walk import ROWS, Walk
from pyrovae.program import Args

COMPILE_PARTICLES = 5_000_000
"""A run of at least this many, over all data, is compiled: it saves two seconds in a million."""

Weigher = Callable[[Args], Tensor]


def weigher(walk: Walk, compile: bool | None = None) -> Weigher:
    """A function from a block's data to its log weights, nats, shape `(K, N)`.

    A compiled one draws other noise than one that is not.

    Args:
        walk: Where model, guide and K come from.
        compile: None compiles where it pays, by all data, so that a part of the blocks gets the
            same noise.
    """
    model, guide, k = walk.programs.model, walk.programs.guide, walk.num_particles
    plain = partial(program.log_weights, model, guide)
    if compile is None:
        compile = len(walk.split) * k >= COMPILE_PARTICLES
    step = ROWS // walk.size
    if not compile or step < 1 or k < step:
        return lambda args: plain(args, k, ROWS)
    graphs: list[Callable[..., tuple[Tensor]] | None] = []

    def piece(*args: Tensor) -> tuple[Tensor]:
        return (plain(args, step),)

    def weights(args: Args) -> Tensor:
        if len(args[0]) != walk.size:  # the last block
            return plain(args, k, ROWS)
        if not graphs:  # here, where modes, precision and noise are those of the estimate
            kept = partial(program.undisturbed, model, guide)
            other = tuple(arg.flip(0) for arg in args)
            graphs.append(compiled.compile_function(piece, args, other, kept, "log p(x)"))
        if graphs[0] is None:
            return plain(args, k, ROWS)
        pieces = [graphs[0](*args)[0] for _ in range(k // step)]
        return torch.cat([*pieces, *([plain(args, k % step)] if k % step else [])])

    return weights
