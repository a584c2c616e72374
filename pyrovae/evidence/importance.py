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
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae import nets, program
from pyrovae._random import key
from pyrovae.data import as_split
from pyrovae.evidence import diagnostics
from pyrovae.evidence.result import LogPx
from pyrovae.program import Args, PyroFunction

ROWS = 800
"""Rows of the model run at once: activations of this many stay in the processor's cache."""

MIN_BLOCK = 8
"""Data in a block with many particles."""

T = TypeVar("T")


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
    walk = _Walk(model, guide, x, num_particles, seed)
    return torch.cat(walk.map(lambda log_w, log_det, _: log_w.mean(0) + log_det))


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

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0])
        >>> log_px(model, guide, x, num_particles=10).values  # this guide is the exact posterior
        tensor([-1.2655, -1.5155], dtype=torch.float64)
    """
    if method != "importance":
        raise ValueError(f"method must be 'importance', got {method!r}")
    walk = _Walk(model, guide, x, num_particles, seed, dtype, block_size, blocks)
    return LogPx.join(walk.map(functools.partial(_estimate, walk), progress))


def _estimate(walk: _Walk, log_w: Tensor, log_det: Tensor, num_dims: float) -> LogPx:
    if not (log_w < math.inf).all():
        raise ValueError(
            "a log weight is NaN or infinite: model or guide gives a density that is not a number "
            "for this data; check the weights and the data"
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
        data=walk.split.description,
        num_dims=num_dims,
    )


class _Walk:
    """The data, a block at a time."""

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
        for name, value, least in (
            ("num_particles", num_particles, 1),
            ("block_size", 1 if block_size is None else block_size, 1),
            ("seed", 0 if seed is None else seed, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.num_particles = num_particles
        self.seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        self.split = as_split(x)
        self.size = block_size or min(max(ROWS // num_particles, MIN_BLOCK), ROWS)
        total = -(-len(self.split) // self.size)
        self.numbers = list(range(total) if blocks is None else blocks)
        distinct = set(self.numbers)
        if not distinct or not distinct <= set(range(total)) or len(distinct) < len(self.numbers):
            raise ValueError(f"blocks must be among 0 to {total - 1}, each once, got {blocks}")
        self.programs = _in_precision(model, guide, dtype)

    def map(
        self, function: Callable[[Tensor, Tensor, float], T], progress: bool = False
    ) -> list[T]:
        """What a function makes of each block: log weights `(K, n)`, log_det, observed entries."""
        model, guide = self.programs.model, self.programs.guide
        with torch.no_grad(), self.programs.running():
            with program.undisturbed(model, guide):
                program.check(model, guide, self._args(slice(0, 7)), alone=True)
            bar = tqdm(self.numbers, desc="log p(x)", disable=not progress)
            return [function(*self._block(number)) for number in bar]

    def _block(self, number: int) -> tuple[Tensor, Tensor, float]:
        model, guide = self.programs.model, self.programs.guide
        index = slice(number * self.size, (number + 1) * self.size)
        with program.undisturbed(model, guide), program.in_mode(False, model, guide):
            torch.manual_seed(key(self.seed, number))
            args = self._args(index)
            with program.validation(True):
                self._validate(args, index)
            with program.validation(False):
                log_w = program.log_weights(model, guide, args, self.num_particles, ROWS).double()
        num_dims = math.nan if len(args) > 1 else float((~args[0].isnan()).sum()) / len(args[0])
        return log_w, self.split.log_det[index].to(log_w), num_dims

    def _validate(self, args: Args, index: slice) -> None:
        """One particle under validation: data outside the support get no density, but a reason."""
        try:
            program.log_weights(self.programs.model, self.programs.guide, args, 1)
        except (ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            last = index.start + len(args[0]) - 1
            raise ValueError(
                f"the program fails on data {index.start} to {last}: {reason}"
            ) from error

    def _args(self, index: slice) -> Args:
        return tuple(self.programs.to(arg) for arg in program.as_args(self.split[index]))


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Model and guide in the precision that the estimate is made in.

    Attributes:
        model: p(x, z).
        guide: q(z|x).
        dtype: What they were brought to; None where they run as they are.
        device: Where they are; None where they do not say.
    """

    model: PyroFunction
    guide: PyroFunction
    dtype: torch.dtype | None
    device: torch.device | None

    def to(self, tensor: Tensor) -> Tensor:
        """Bring data to where the programs are."""
        tensor = tensor.to(self.device) if self.device else tensor
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """In this precision, whatever the caller's; Pyro's store is as it was afterwards."""
        default, store = torch.get_default_dtype(), pyro.get_param_store()
        device_type = self.device.type if self.device else "cpu"
        token = nets.autocast.set(nullcontext)
        try:
            torch.set_default_dtype(self.dtype or default)
            with (
                program.store_kept(),
                torch.autocast(device_type, enabled=False),
                store.scope(_converted(store, self.dtype)) if self.dtype else nullcontext(),
            ):
                yield
        finally:
            torch.set_default_dtype(default)
            nets.autocast.reset(token)


def _converted(store: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The store's state with its parameters in another precision."""
    state = store.get_state()
    floats = {n: p.detach().to(dtype) for n, p in state["params"].items() if p.is_floating_point()}
    return {**state, "params": {**state["params"], **floats}}


def _in_precision(model: PyroFunction, guide: PyroFunction, dtype: torch.dtype | None) -> _Programs:
    """Model and guide in `dtype`, copied if they are in another."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    owned = [p for m in program.modules(model, guide) for p in m.parameters()]
    stored = list(pyro.get_param_store().get_state()["params"].values())
    now = {p.dtype for p in (*owned, *stored) if p.is_floating_point()}
    low = now & {torch.bfloat16, torch.float16}
    wanted = dtype or (torch.float32 if low else None)
    if wanted and {p.dtype for p in owned if p.is_floating_point()} - {wanted}:
        model, guide = copy.deepcopy((model, guide))
        for module in program.modules(model, guide):
            if module not in program.owners(model, guide):
                raise ValueError(
                    f"{wanted} runs on a copy, and the modules of a plain function cannot be "
                    "copied: make them attributes of an nn.Module, or convert them yourself"
                )
            module.to(wanted)
    return _Programs(model, guide, wanted, owned[0].device if owned else None)
