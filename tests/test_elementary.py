"""log1p and expm1 by way of log and exp lose nothing to torch's own, and compiled graphs do so."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    elu,
    logsigmoid,
    mish,
    softplus,
)

from pyrovae import _elementary, compiled

LARGE = torch.logspace(-37, 37, 20_001, dtype=torch.float64)
EDGES = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
NEAR_MINUS_ONE = torch.tensor([-0.9999, -1.0, -1.0001, -2.0], dtype=torch.float64)
X = {
    "log1p": torch.cat([LARGE, -LARGE[LARGE < 0.999], NEAR_MINUS_ONE, EDGES]),
    "expm1": torch.cat([LARGE, -LARGE, EDGES]),
}
FUNCTIONS = {
    "cross-entropy": lambda x: binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "elu": lambda x: elu(x).sum(),
    "expm1": lambda x: torch.expm1(x).sum(),
    "log1p": lambda x: torch.log1p(x.exp()).sum(),
    "logaddexp": lambda x: torch.logaddexp(x, -x).sum(),
    "logsigmoid": lambda x: logsigmoid(x).sum(),
    "mish": lambda x: mish(x).sum(),
    "softplus": lambda x: softplus(x).sum(),
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_equal_to_torchs_within_a_few_roundings(name, dtype, compile):
    own, x = getattr(_elementary, name), X[name].to(dtype)
    found = (torch.compile(own) if compile else own)(x)
    exact = getattr(torch, name)(x.double())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact.to(dtype), rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "compile", "left"),
    [(torch.float32, True, False), (torch.bfloat16, True, None), (torch.float32, False, True)],
    ids=["compiled", "compiled, 16 bits", "not compiled"],
)
def test_a_graph_to_be_compiled_has_neither(name, dtype, compile, left):
    def both(x):
        value = FUNCTIONS[name](x)
        return value, *torch.autograd.grad(value, x)

    x = torch.linspace(-30, 30, 7, dtype=dtype, requires_grad=True)
    graph = compiled._traced(both, (x,), (x,), nullcontext, compile)
    ops = {str(node.target).split(".")[1] for node in graph.graph.nodes if "." in str(node.target)}
    slow = {name, "log1p", "expm1", "log_sigmoid_forward", "binary_cross_entropy_with_logits"}
    assert left is None or bool(ops & slow) == left
    torch.testing.assert_close(torch.no_grad()(graph)(x), both(x))
