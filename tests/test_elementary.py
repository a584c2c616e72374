"""log1p and expm1 by way of log and exp lose nothing to torch's own, and are left out of graphs."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from pyrovae import _elementary

LARGE = torch.logspace(-37, 37, 20_001, dtype=torch.float64)
EDGES = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
BELOW_ONE = LARGE[LARGE < 0.999999]
HALVES = torch.cat([1 + LARGE[LARGE < 1], -torch.tensor([1.0])]) - 1  # where 1 + x rounds
X = {
    "log1p": torch.cat([LARGE, -BELOW_ONE, HALVES, -torch.tensor([2.0]), EDGES]),
    "expm1": torch.cat([LARGE, -LARGE, EDGES]),
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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: binary_cross_entropy_with_logits(x, torch.ones_like(x)),
        lambda x: softplus(x).sum(),
        lambda x: logsigmoid(x).sum(),
        lambda x: torch.log1p(x.exp()).sum(),
        lambda x: torch.expm1(x).sum(),
    ],
    ids=["cross-entropy", "softplus", "logsigmoid", "log1p", "expm1"],
)
def test_neither_is_left_in_a_traced_loss_with_its_gradient(function):
    def both(x):
        value = function(x)
        return value, *torch.autograd.grad(value, x)

    x = torch.linspace(-30, 30, 7, requires_grad=True)
    graph = make_fx(both, decomposition_table=_elementary.by_way_of_log_and_exp())(x)
    ops = {str(node.target) for node in graph.graph.nodes}
    assert "aten.log.default" in ops
    assert not any(
        part in op for op in ops for part in ("log1p", "expm1", "softplus.d", "sigmoid_f", "cross")
    )
    torch.testing.assert_close(torch.no_grad()(graph)(x), both(x))
