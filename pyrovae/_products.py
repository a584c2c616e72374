"""Matrix products of a traced graph, given to the faster of torch's two libraries for CPUs.

Torch multiplies float32 matrices with MKL, which uses half the width of the vector units of
processors that Intel did not make. oneDNN, which torch has aboard for convolutions, uses all of it:
400 GFLOP/s for 200 on two cores. Both round as float32 does.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, fx

_MULTIPLICATIONS = 4_000_000
"""In smaller products the call of oneDNN costs more than its speed gains."""

_aten = torch.ops.aten

torch.library.define("pyrovae::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("pyrovae::product", "CPU")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """A product of two matrices, plus a row if there is one."""
    row = None if bias is None else bias.contiguous()  # oneDNN takes no strides of it
    return torch.ops.mkldnn._linear_pointwise.default(a, dense(b).T, row, "none", [], "")


def dense(matrix: Tensor) -> Tensor:
    """A matrix without gaps between its rows or columns: for others oneDNN has no quick way."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


@torch.library.register_fake("pyrovae::product")
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(len(a), b.shape[1])


def available() -> bool:
    """Whether there is oneDNN, and a processor on which it is the faster one."""
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def hand_over(graph: fx.GraphModule) -> None:
    """Give a graph's large float32 products on an x86 processor to oneDNN.

    Args:
        graph: Traced by `make_fx`; changed in place.
    """
    if not available():
        return
    for node in list(graph.graph.nodes):
        if operands := _operands(node):
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(torch.ops.pyrovae.product.default, operands)
            product.meta = node.meta
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.recompile()


def _operands(node: fx.Node) -> tuple[Any, ...] | None:
    """Two matrices and a row to add, or none; None for a node that is no such product."""
    given: Any = node.args
    if node.target is _aten.mm.default:
        (a, b), bias = given, None
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, a, b = given
    else:
        return None
    left, right = a.meta["val"], b.meta["val"]
    is_row = bias is None or bias.meta["val"].shape == right.shape[1:]
    is_large = left.numel() * right.shape[1] >= _MULTIPLICATIONS
    on_cpu = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return (a, b, bias) if is_row and is_large and on_cpu else None
