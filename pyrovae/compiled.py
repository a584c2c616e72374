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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import _elementary, _products

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Function = TypeVar("Function", bound=Callable[..., Sequence[Any]])
Step = Callable[..., tuple[Tensor, Sequence[Tensor]]]

TOLERANCE = 1e-4
"""Relative difference of a graph from its program that rounding explains."""

WARM_UP = 3
"""Runs before a CUDA graph is captured, in which libraries take what memory they need."""


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


def compile_function(
    function: Function,
    args: Sequence[Tensor],
    trial: Sequence[Tensor],
    kept: Callable[[], AbstractContextManager],
    task: str,
) -> Function | None:
    """Trace and compile a function for arguments of these shapes.

    None comes back, with a warning, if that fails; also where the graph says something else than
    the function on other arguments: what Python or numpy draws or decides is frozen in a graph.

    Args:
        function: From tensors to tensors or sequences of tensors.
        args: Example arguments, to trace with.
        trial: Other arguments of the same shapes, to compare graph and function on.
        kept: Puts random state and buffers back: runs here draw numbers and move batch statistics.
        task: What runs uncompiled where it fails, for the warning.
    """
    try:
        graph = _traced(function, args, trial, kept, compile=True)
        return _made(graph, args, kept)
    except Exception as error:  # whatever Pyro, the tracer, the compiler or a toolchain raises
        _warn(task, error)
        return None


class Halves(NamedTuple):
    """A function cut in two: `function(*args, *others) = rest(*first(*args), *others)`.

    Attributes:
        first: What depends on the first arguments alone.
        rest: What is left.
    """

    first: Callable[..., tuple[Tensor, ...]]
    rest: Callable[..., tuple[Tensor, ...]]


def compile_halves(
    function: Callable[..., tuple[Tensor, ...]],
    args: Sequence[Tensor],
    trial: Sequence[Tensor],
    count: int,
    kept: Callable[[], AbstractContextManager],
    compile: bool,
    task: str,
) -> Halves | None:
    """Trace a function without randomness, and cut off what its first arguments decide alone.

    None comes back if that fails, with a warning if it was to be compiled.

    Args:
        function: From tensors to tensors.
        args: Example arguments, to trace with.
        trial: Other arguments of the same shapes, to compare graph and function on.
        count: How many arguments stay while the others change.
        kept: Puts random state and buffers back.
        compile: Compile the rest; else it runs as it was traced.
        task: What runs uncompiled where it fails, for the warning.
    """
    try:
        graph = _traced(function, args, trial, kept, compile)
        first, rest = _cut(graph, count)
        fixed = first(*trial[:count])
        for others in (args[count:], trial[count:]):  # twice: the first half's numbers stay
            _compare(function(*trial[:count], *others), rest(*fixed, *others))
        made = _made(rest, (*first(*args[:count]), *args[count:]), kept) if compile else rest
        return Halves(torch.no_grad()(first), torch.no_grad()(made))
    except Exception as error:  # as above
        if compile:
            _warn(task, error)
        return None


def _cut(graph: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What depends on the first `count` arguments alone, as one graph, and the rest as another."""
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    later = set(inputs[count:])
    for node in nodes:
        if node.op == "output" or later.intersection(node.all_input_nodes):
            later.add(node)
    early = [node for node in nodes if node not in later]
    passed = [n for n in early if n.op != "get_attr" and later.intersection(n.users)]
    copies: dict[fx.Node, fx.Node] = {}
    first, rest = fx.Graph(), fx.Graph()
    for node in early:
        copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(tuple(copies[node] for node in passed))
    copies = {}
    for node in passed:
        copies[node] = rest.placeholder(f"given_{node.name}")
        copies[node].meta = node.meta
    for node in nodes:
        if node in later or node.op == "get_attr":
            copies[node] = rest.node_copy(node, copies.__getitem__)
    for half in (first, rest):
        half.eliminate_dead_code()
    return fx.GraphModule(graph, first), fx.GraphModule(graph, rest)


def _traced(
    function: Callable[..., Any],
    args: Sequence[Tensor],
    trial: Sequence[Tensor],
    kept: Callable[[], AbstractContextManager],
    compile: bool,
) -> fx.GraphModule:
    """A graph of the function, to be compiled or not, that agrees with it on other arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with kept():
            on_cpu = all(arg.device.type == "cpu" for arg in args)
            table = _elementary.by_way_of_log_and_exp() if compile and on_cpu else None
            graph: fx.GraphModule = make_fx(function, decomposition_table=table)(*args)
        _refuse_frozen(function, torch.no_grad()(graph), trial, kept)
    return graph


def _made(
    graph: fx.GraphModule, args: Sequence[Tensor], kept: Callable[[], AbstractContextManager]
) -> Any:
    """A graph, compiled for these arguments and run once."""
    # Says that there is no GPU on machines with a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _products.hand_over(graph)  # after the trial: other libraries round otherwise
        # Torch's noise, that of eager runs, is quicker on a CPU than the compiler's own.
        compiled = torch.no_grad()(torch.compile(graph, options={"fallback_random": True}))
        with kept():
            compiled(*args)
    return compiled


def _warn(task: str, error: Exception) -> None:
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    warnings.warn(
        f"{task} runs uncompiled: the program could not be compiled ({reason})", stacklevel=3
    )


def captures(device: torch.device) -> bool:
    """Whether work on a device can be captured as a CUDA graph."""
    return device.type == "cuda"


def capture(
    function: Callable[..., Tensor], args: Sequence[Tensor]
) -> Callable[..., Tensor] | None:
    """One CUDA graph of all that a function launches: a call copies its arguments and replays it.

    None comes back, with a warning, if that fails. The function runs a few times, to be warm.

    Args:
        function: From tensors to a tensor, in any of which the device waits for nothing. What it
            changes it must change in place.
        args: Example arguments, on the device.
    """
    own = [arg.clone() for arg in args]
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*own)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"steps are launched one by one: no CUDA graph of them ({reason})", stacklevel=2
        )
        return None

    def replay(*args: Tensor) -> Tensor:
        for mine, given in zip(own, args, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return output.clone()

    return replay


def _refuse_frozen(
    function: Function,
    graph: Function,
    trial: Sequence[Tensor],
    kept: Callable[[], AbstractContextManager],
) -> None:
    """Compare a graph with its function under the same noise: to rounding they do the same."""
    with kept():
        expected = function(*trial)
    with kept():
        found = graph(*trial)
    _compare(expected, found)


def _compare(expected: Any, found: Any) -> None:
    for exact, given in zip(map(_flat, expected), map(_flat, found), strict=True):
        off = float((given - exact).norm() / exact.norm().clamp(min=1e-30))
        if off > TOLERANCE:
            raise ValueError(
                f"on other data its graph is off by a fraction {off:.2g}: numbers drawn or "
                "decisions taken outside torch are frozen in a graph"
            )


def _flat(output: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [output] if isinstance(output, Tensor) else output
    return torch.cat([part.flatten() for part in parts]).nan_to_num()
