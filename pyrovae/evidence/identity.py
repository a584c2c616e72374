"""What an estimate is of, in few words: by it a file of blocks knows what it is a part of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae import program
from pyrovae._random import key
from pyrovae.evidence.keep import Kept
from pyrovae.evidence.walk import Walk
from pyrovae.program import Args, PyroFunction


def kept_in(
    path: str | Path | None, walk: Walk, seed: int | None, shared: bool = False, **others: Any
) -> Kept | None:
    """The blocks of an estimate that a file keeps; None where there is to be no file.

    Args:
        path: The file, or None.
        walk: Data and programs.
        seed: As it was given: without one there is nothing to go on with.
        shared: Whether processes estimate together.
        others: What else decides, as in `identity`.

    Raises:
        ValueError: If there is no seed, or the file holds part of another estimate.
    """
    if path is None:
        return None
    if seed is None:
        raise ValueError("keep needs a seed: a stopped run goes on only under the same noise")
    return Kept(path, identity(walk, **others), shared)


def identity(walk: Walk, **others: Any) -> dict[str, Any]:
    """All that decides what is made of a block, by the words for it.

    Data are told by their bits, as the program sees them; a program by its weights, and by log
    weights of a few data, since a changed function may have the same weights.

    Args:
        walk: Data and programs.
        others: What else decides.
    """
    programs = walk.programs

    def trial(few: Args) -> Tensor:
        torch.manual_seed(0)
        return program.log_weights(programs.model, programs.guide, few, 1).flatten()

    log_w = walk.on_few(trial)
    return {
        **{name.replace("_", " "): value for name, value in others.items()},
        "number of particles": walk.num_particles,
        "seed": walk.seed,
        "size of a block": walk.size,
        "precision": str(log_w.dtype),
        "data": _digest(_data(walk)),
        "weights": _digest(_state(programs.model, programs.guide)),
        "program": log_w.tolist(),
    }


def _data(walk: Walk) -> Iterator[Tensor]:
    """The data as the program sees them, block by block under the noise of each."""
    with program.undisturbed(walk.programs.model, walk.programs.guide):
        for number in range(-(-len(walk.split) // walk.size)):
            torch.manual_seed(key(walk.seed, number))
            yield from walk.args(walk.where(number))
    yield walk.split.log_det


def _state(*functions: PyroFunction) -> Iterator[Tensor]:
    """What a program's modules hold, and what is in Pyro's store where functions use that."""
    for module in program.modules(*functions):
        yield from (v for _, v in sorted(module.state_dict().items()) if isinstance(v, Tensor))
    if not program.owners(*functions):
        yield from (value for _, value in sorted(pyro.get_param_store().items()))


def _digest(tensors: Iterable[Tensor]) -> str:
    """A number for the bits of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().flatten()
        digest.update(flat.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
