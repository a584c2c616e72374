"""A Pyro program's loss and gradients as one compiled tensor graph.

The loss and its gradients are traced together, with Pyro's handlers running once, and the graph of
plain tensor operations is compiled. Traced forward only and differentiated afterwards, a graph
loses every `detach`, `no_grad` and hand-written backward pass without a word.

Parameters and buffers are closures of the graph, which follows them as they change. Numbers, modes
and Python's control flow are frozen: what varies during training is an argument.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Step = Callable[..., tuple[Tensor, Sequence[Tensor]]]


def with_gradients(loss: Loss, params: Sequence[Tensor], clip_norm: float | None = None) -> Step:
    """The loss with its terms, stacked, and its gradient for each parameter.

    Args:
        loss: A function to a scalar and, by name, scalars to report.
        params: Leaves to differentiate for; zero where the loss does not depend on one.
        clip_norm: Norm to which a larger gradient is scaled down; None leaves it.
    """

    def step(*args: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        value, terms = loss(*args)
        exact = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        grads = exact if clip_norm is None else _clipped(exact, clip_norm)
        laid_out = [_laid_out(grad, p) for grad, p in zip(grads, params, strict=True)]
        return torch.stack([value, *terms.values()]).detach(), laid_out

    return step


def _clipped(grads: Sequence[Tensor], norm: float) -> list[Tensor]:
    """Gradients whose joint norm is at most `norm`."""
    total = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    factor = (norm / total).clamp(max=1.0)
    return [grad * factor for grad in grads]


def _laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout, which a fused optimizer takes for granted."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def compile_step(step: Step, args: Sequence[Tensor], fallback_random: bool = False) -> Step | None:
    """Trace and compile a step for arguments of these shapes; None, with a warning, where it fails.

    Tracing and the first run draw random numbers and move batch statistics: the caller puts both
    back.

    Args:
        step: What `with_gradients` returns.
        args: Example arguments.
        fallback_random: Draw the very noise of eager runs, at a little cost in speed.
    """
    # Says that there is no GPU on machines with a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    options: dict[str, Any] = {"fallback_random": True} if fallback_random else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make_fx(step)(*args)
            compiled = torch.no_grad()(torch.compile(graph, options=options))
            compiled(*args)
    except Exception as error:  # whatever Pyro, the tracer, the compiler or a toolchain raises
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        warnings.warn(
            f"training runs uncompiled: the program could not be compiled ({reason})", stacklevel=2
        )
        return None
    return compiled
