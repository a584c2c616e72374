r"""Importance-weighted bounds on log p(x).

.. math:: L_K = \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

is a lower bound of log p(x) in expectation for every K, is the ELBO for K = 1, and rises to
log p(x) with K. The data are walked in blocks of a few: a block's log weights are kept whole, so
every statistic is one expression, and memory depends neither on the number of data nor much on K.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae import program
from pyrovae._random import key
from pyrovae.data import as_split
from pyrovae.evidence import diagnostics
from pyrovae.evidence.result import LogPx
from pyrovae.program import Args, PyroFunction

ROWS = 800
"""Rows of the model run at once: activations of this many stay in the processor's cache."""

MIN_BLOCK = 8
"""Data in a block with many particles."""


def elbo(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_particles: int = 1,
    seed: int | None = None,
) -> Tensor:
    r"""Evidence lower bound of each datum.

    .. math:: \tfrac1K \sum_k \log p(x, z_k) - \log q(z_k \mid x), \quad z_k \sim q(z \mid x)

    Unbiased for the bound; the gap to log p(x) is KL(q(z|x) || p(z|x)). Sites marked for
    enumeration are summed out.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        num_particles: K, the number of draws per datum.
        seed: Of the noise; None takes a new one.

    Returns:
        Nats, with shape `(N,)`.

    Raises:
        ValueError: If `num_particles` is less than one, or the program cannot be scored per datum.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """
    blocks = _Blocks(model, guide, x, num_particles, seed)
    with torch.no_grad():
        means = [log_w.mean(0) + log_det for log_w, log_det, _ in blocks]
    return torch.cat(means)


def log_px(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_particles: int = 5000,
    *,
    method: str = "importance",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    blocks: Sequence[int] | None = None,
    progress: bool = False,
) -> LogPx:
    """Importance-weighted estimate of log p(x) for each datum, with its diagnostics.

    The noise is keyed by the seed and the block: a run over some of the blocks gives those data the
    same numbers as a run over all. Nothing of the caller's changes: no parameter, buffer, mode,
    setting or random state.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set (whose units
            and description the result then has).
        num_particles: K, the number of draws per datum.
        method: "importance".
        seed: Of the noise; None takes a new one, recorded in the result.
        dtype: At least float32; `torch.float64` runs on a copy of the modules.
        block_size: Data in a block; None chooses by K. Another size is other noise.
        blocks: Numbers of the blocks to run, for sharding; None runs all. `LogPx.join` joins them.
        progress: Show a bar.

    Returns:
        Values, errors and diagnostics with shape `(N,)`, in nats.

    Raises:
        ValueError: If an argument is out of range, the program cannot be scored per datum, or a log
            weight is NaN.
    """
    if method != "importance":
        raise ValueError(f"method must be 'importance', got {method!r}")
    walk = _Blocks(model, guide, x, num_particles, seed, dtype, block_size, blocks)
    parts = []
    with torch.no_grad():
        for log_w, log_det, num_dims in tqdm(walk, desc="log p(x)", disable=not progress):
            parts.append(_estimate(log_w, log_det, num_dims, walk))
    return LogPx.join(parts)


def _estimate(log_w: Tensor, log_det: Tensor, num_dims: float, walk: _Blocks) -> LogPx:
    if log_w.isnan().any():
        raise ValueError(
            "a log weight is NaN: model or guide gives a density that is not a number for this "
            "data; check the weights and the data"
        )
    return LogPx(
        values=diagnostics.log_mean_exp(log_w) + log_det,
        std_error=diagnostics.std_error(log_w),
        ess=diagnostics.effective_sample_size(log_w),
        khat=diagnostics.khat(log_w),
        gain_per_doubling=diagnostics.gain_per_doubling(log_w),
        method="importance",
        num_particles=walk.num_particles,
        seed=walk.seed,
        data=walk.description,
        num_dims=num_dims,
    )


class _Blocks:
    """The log weights of the data, a block at a time: `(K, block)`, log_det, observed entries."""

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction,
        x: Any,
        num_particles: int,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        block_size: int | None = None,
        blocks: Sequence[int] | None = None,
    ):
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        self.num_particles = num_particles
        self.seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        self.split = as_split(x)
        self.description = self.split.description
        self.size = block_size or min(max(ROWS // num_particles, MIN_BLOCK), ROWS)
        total = -(-len(self.split) // self.size)
        self.numbers = range(total) if blocks is None else blocks
        if not all(0 <= number < total for number in self.numbers) or not self.numbers:
            raise ValueError(f"blocks must be among 0 to {total - 1}, got {blocks}")
        self.model, self.guide, self.to = _in_precision(model, guide, dtype)
        program.check(self.model, self.guide, self._args(slice(0, 7)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        for number in self.numbers:
            index = slice(number * self.size, (number + 1) * self.size)
            args = self._args(index)
            with (
                program.undisturbed(self.model, self.guide),
                program.in_mode(False, self.model, self.guide),
                pyro.validation_enabled(False),
            ):
                torch.manual_seed(key(self.seed, number))
                log_w = self._log_weights(args)
            log_det = self.split.log_det[index].to(log_w)
            yield log_w, log_det, float((~args[0].isnan()).sum()) / len(args[0])

    def _log_weights(self, args: Args) -> Tensor:
        """A block's log weights in float64, computed a few rows at a time."""
        step = max(1, ROWS // len(args[0]))
        counts = [min(step, self.num_particles - k) for k in range(0, self.num_particles, step)]
        chunks = [program.log_weights(self.model, self.guide, args, k) for k in counts]
        return torch.cat(chunks).double()

    def _args(self, index: slice) -> Args:
        return tuple(self.to(arg) for arg in program.as_args(self.split[index]))


def _in_precision(
    model: PyroFunction, guide: PyroFunction, dtype: torch.dtype | None
) -> tuple[PyroFunction, PyroFunction, Callable[[Tensor], Tensor]]:
    """Model and guide in `dtype`, copied if they are in another, and how to bring data there."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    floats = [p for m in program.modules(model, guide) for p in m.parameters()]
    now = {p.dtype for p in floats if p.is_floating_point()}
    wanted = dtype or (torch.float32 if now & {torch.bfloat16, torch.float16} else None)
    if wanted and now - {wanted}:
        model, guide = copy.deepcopy((model, guide))
        for module in program.modules(model, guide):
            if module not in program.owners(model, guide):
                raise ValueError(
                    f"{wanted} runs on a copy, and the modules of a plain function cannot be "
                    "copied: make them attributes of an nn.Module, or convert them yourself"
                )
            module.to(wanted)
    device = floats[0].device if floats else None

    def to(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device) if device else tensor
        return tensor.to(wanted) if wanted and tensor.is_floating_point() else tensor

    return model, guide, to
