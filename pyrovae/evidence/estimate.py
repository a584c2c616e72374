"""log p(x) by any method, and the ELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence.annealed import Annealed
from pyrovae.evidence.cost import Forecast, forecast
from pyrovae.evidence.exact import Exact
from pyrovae.evidence.identity import kept_in
from pyrovae.evidence.importance import Importance
from pyrovae.evidence.method import Method
from pyrovae.evidence.result import LogPx
from pyrovae.evidence.walk import Walk, at_least
from pyrovae.evidence.weights import weigher
from pyrovae.program import Args, PyroFunction

METHODS: dict[str, type[Method]] = {
    kind.__name__.lower(): kind for kind in (Importance, Annealed, Exact)
}
"""Methods by the names that `log_px` takes."""


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
    num_particles: int | None = None,
    *,
    method: str | Method = "importance",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    blocks: Sequence[int] | None = None,
    shared: bool = False,
    compile: bool | None = None,
    progress: bool = False,
    keep: str | Path | None = None,
    announce: Callable[[Forecast], None] | None = None,
) -> LogPx:
    """Estimate log p(x) of each datum, with what is needed to judge it.

    The noise is keyed by the seed and the block: a run over some of the blocks gives those data the
    same numbers as a run over all. Nothing of the caller's changes: no parameter, buffer, mode,
    setting or random state.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set (whose units
            and description the result then has).
        num_particles: K, the number of draws per datum, or of chains; None takes the method's own
            (5,000 draws, 16 chains).
        method: "importance", "annealed" or "exact", or one of these with other settings than its
            defaults, such as `evidence.Annealed(num_distributions=1000)`.
        seed: Of the noise; None takes a new one, recorded in the result.
        dtype: At least float32; `torch.float64` runs on a copy of the modules. "exact" always does.
        block_size: Data in a block; None chooses by K. Another size is other noise.
        blocks: Numbers of the blocks to run; None runs all. `LogPx.join` joins them.
        shared: Divide the blocks among the processes of torch's process group; all must call, and
            each gets the whole result.
        compile: Compile the log weights; None compiles where K times the number of data pays for
            it. Other noise.
        progress: Show a bar.
        keep: A file that keeps blocks as they are done, for a long run that may be stopped: the
            same call goes on from there, and comes to the same. It stays when all is done.
        announce: Is told, before the long part, what it will cost, where the method knows that.

    Returns:
        Values, errors and diagnostics with shape `(N,)`, in nats.

    Raises:
        ValueError: If an argument is out of range, the program cannot be scored per datum, a log
            weight is NaN, or the file holds part of another estimate.

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
    method = method_of(method)
    k = at_least("num_particles", method.particles if num_particles is None else num_particles, 1)
    size = method.block_size(k) if block_size is None else block_size
    if method.dtype and dtype not in (None, method.dtype):
        raise ValueError(f"method {method.name!r} runs in {method.dtype} alone, got dtype {dtype}")
    walk = Walk(model, guide, x, k, seed, method.dtype or dtype, size, blocks)
    estimate = method.estimator(walk, compile)
    kept = kept_in(keep, walk, seed, shared, method=method.identity, compile=compile)
    if announce and (told := forecast(walk, method, kept, shared=shared)):
        announce(told)
    return LogPx.join(walk.map(estimate, progress=progress, shared=shared, kept=kept))


def exact(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    rule: str = "adaptive",
    tolerance: float = 1e-6,
    max_evaluations: int = 200_000,
    progress: bool = False,
) -> LogPx:
    """Values of log p(x) without chance, where there is a way: see `Exact`.

    A closed form for linear-Gaussian programs, a sum over discrete latents of few values,
    quadrature over one to three continuous ones; in float64.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x. What it samples counts, and for quadrature about where;
            its density does not.
        x: Data: a tensor `(N, *shape)`, a tuple of tensors, or a split of a data set.
        rule: Of quadrature: "adaptive" or "gauss-hermite".
        tolerance: Of quadrature: the error at which refining stops, nats.
        max_evaluations: Of quadrature: densities of a datum evaluated at most.
        progress: Show a bar.

    Returns:
        Values with their errors, which are bounds and not chance, in nats, shape `(N,)`.

    Raises:
        ValueError: If the program has no such way, with the reason.
    """
    method = Exact(rule, tolerance, max_evaluations)
    return log_px(model, guide, x, method=method, seed=0, progress=progress)


def method_of(method: str | Method) -> Method:
    """A method, or the one of this name with its defaults.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()
