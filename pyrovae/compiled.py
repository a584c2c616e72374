"""A Pyro program's loss and gradients as one compiled tensor graph.

The loss and its gradients are traced together, with Pyro's handlers running once, and the graph of
plain tensor operations is compiled. Traced forward only and differentiated afterwards, a graph
loses every `detach`, `no_grad` and hand-written backward pass without a word.

Parameters and buffers are closures of the graph, which follows them as they change. Numbers, modes
and Python's control flow are frozen: what varies during training is an argument. A graph is tried
on other arguments than it was traced with before it is trusted.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Step = Callable[..., tuple[Tensor, Sequence[Tensor]]]

TOLERANCE = 1e-4
"""Relative difference of a graph from its program that rounding explains."""


def with_gradients(loss: Loss, params: Sequence[Tensor], clip_norm: float | None = None) -> Step:
    """The loss with its terms, stacked, and its gradient for each parameter.

    Args:
        loss: A function to a scalar and, by name, scalars to report.
        params: Leaves to differentiate for; zero where the loss does not depend on one.
        clip_norm: Norm to which a larger gradient is scaled down; None leaves it.
    """

    def step(*args: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        value, terms = loss(*args)
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        output = torch.stack([value, *terms.values()]).detach()
        return output, finished(grads, params, clip_norm)

    return step


def finished(
    grads: Sequence[Tensor], params: Sequence[Tensor], clip_norm: float | None
) -> list[Tensor]:
    """Gradients as a fused optimizer takes them: in their parameters' layout, clipped if asked."""
    clipped = grads if clip_norm is None else _clipped(grads, clip_norm)
    return [_laid_out(grad, p) for grad, p in zip(clipped, params, strict=True)]


def _clipped(grads: Sequence[Tensor], norm: float) -> list[Tensor]:
    """Gradients whose joint norm is at most `norm`."""
    total = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    factor = (norm / total).clamp(max=1.0)
    return [grad * factor for grad in grads]


def _laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout, which a fused optimizer takes for granted."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def compile_step(
    step: Step,
    args: Sequence[Tensor],
    trial: Sequence[Tensor],
    kept: Callable[[], AbstractContextManager],
    fallback_random: bool = False,
) -> Step | None:
    """Trace and compile a step for arguments of these shapes; None, with a warning, where it fails.

    It fails too where the graph says something else than the program on other arguments: what
    Python or numpy draws or decides is frozen in a graph.

    Args:
        step: What `with_gradients` returns.
        args: Example arguments, to trace with.
        trial: Other arguments of the same shapes, to compare graph and step on.
        kept: Puts random state and buffers back: runs here draw numbers and move batch statistics.
        fallback_random: Draw the very noise of eager runs, at a little cost in speed.
    """
    # Says that there is no GPU on machines with a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    options: dict[str, Any] = {"fallback_random": True} if fallback_random else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with kept():
                graph = make_fx(step)(*args)
            _refuse_frozen(step, torch.no_grad()(graph), trial, kept)
            compiled = torch.no_grad()(torch.compile(graph, options=options))
            with kept():
                compiled(*args)
    except Exception as error:  # whatever Pyro, the tracer, the compiler or a toolchain raises
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        warnings.warn(
            f"training runs uncompiled: the program could not be compiled ({reason})", stacklevel=2
        )
        return None
    return compiled


def _refuse_frozen(
    step: Step, graph: Step, trial: Sequence[Tensor], kept: Callable[[], AbstractContextManager]
) -> None:
    """Compare a graph with its program under the same noise: the operations are the same too."""
    with kept():
        terms, grads = step(*trial)
    with kept():
        found, found_grads = graph(*trial)
    pairs = [("loss", terms, found), ("gradient", _flat(grads), _flat(found_grads))]
    for what, expected, given in pairs:
        given, expected = given.nan_to_num(), expected.nan_to_num()
        off = float((given - expected).norm() / expected.norm().clamp(min=1e-30))
        if off > TOLERANCE:
            raise ValueError(
                f"the {what} of its graph is off by a fraction {off:.2g} on another batch: numbers "
                "drawn or decisions taken outside torch are frozen in a graph"
            )


def _flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])
