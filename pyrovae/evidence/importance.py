r"""Importance-weighted bounds on log p(x).

.. math:: L_K = \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

is a lower bound of log p(x) in expectation for every K, is the ELBO for K = 1, and rises to
log p(x) with K. The data are walked in blocks of a few: a block's log weights are kept whole, so
every statistic is one expression, and memory depends neither on the number of data nor much on K.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence import diagnostics
from pyrovae.evidence.result import LogPx
from pyrovae.evidence.walk import Walk
from pyrovae.evidence.weights import Weigher, weigher
from pyrovae.program import Args, PyroFunction


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
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set (whose units
            the result then has).
        num_particles: K, the number of draws per datum.
        seed: Of the noise; None takes a new one.

    Returns:
        Nats, with shape `(N,)`. For a split its `log_det` is added: the bound is on the density of
        the data as they were before they were scaled or standardized.

    Raises:
        ValueError: If `num_particles` is less than one, or the program cannot be scored per datum.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """
    walk = Walk(model, guide, x, num_particles, seed)
    weigh = weigher(walk, compile=False)

    def bound(args: Args, index: slice) -> Tensor:
        log_w = weigh(args).double()
        return log_w.mean(0) + walk.split.log_det[index].to(log_w)

    return torch.cat(walk.map(bound))


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
    shared: bool = False,
    compile: bool | None = None,
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
        blocks: Numbers of the blocks to run; None runs all. `LogPx.join` joins them.
        shared: Divide the blocks among the processes of torch's process group; all must call, and
            each gets the whole result.
        compile: Compile the log weights; None compiles where K times the number of data pays for
            it. Other noise.
        progress: Show a bar.

    Returns:
        Values, errors and diagnostics with shape `(N,)`, in nats.

    Raises:
        ValueError: If an argument is out of range, the program cannot be scored per datum, or a log
            weight is NaN.

    Example:
        >>> import pyro
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
    walk = Walk(model, guide, x, num_particles, seed, dtype, block_size, blocks)
    estimate = functools.partial(_estimate, walk, weigher(walk, compile))
    return LogPx.join(walk.map(estimate, progress=progress, shared=shared))


def _estimate(walk: Walk, weigh: Weigher, args: Args, index: slice) -> LogPx:
    log_w = weigh(args).double()
    if not (log_w < math.inf).all():
        raise ValueError(
            "a log weight is NaN or infinite: model or guide gives a density that is not a number "
            "for this data; check the weights and the data"
        )
    return LogPx(
        values=diagnostics.log_mean_exp(log_w) + walk.split.log_det[index].to(log_w),
        std_error=diagnostics.std_error(log_w),
        ess=diagnostics.effective_sample_size(log_w),
        khat=diagnostics.khat(log_w),
        gain_per_doubling=diagnostics.gain_per_doubling(log_w),
        method="importance",
        num_particles=walk.num_particles,
        seed=walk.seed,
        data=walk.split.description,
        num_dims=math.nan if len(args) > 1 else float((~args[0].isnan()).sum()) / len(args[0]),
    )
