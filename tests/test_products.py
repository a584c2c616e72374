"""Products that a graph hands to oneDNN: the numbers of torch's own, whatever the layout."""

import platform

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import _products

pytestmark = pytest.mark.skipif(not _products.available(), reason="oneDNN on x86 only")

ROWS, INNER, COLUMNS = 300, 200, 400


def matrix(rows, columns):
    """In several layouts."""
    return {
        "rows": torch.randn(rows, columns),
        "columns": torch.randn(columns, rows).T,
        "one row": torch.randn(1, columns).expand(rows, columns),
        "one column": torch.randn(rows, 1).expand(rows, columns),
        "one number": torch.randn(()).expand(rows, columns),
        "strided": torch.randn(2 * rows, 2 * columns)[::2, ::2],
        "shifted": torch.randn(rows * columns + 1)[1:].view(rows, columns),
    }


ROW = {
    "none": None,
    "dense": torch.randn(COLUMNS),
    "strided": torch.randn(2 * COLUMNS)[::2],
    "one number": torch.randn(()).expand(COLUMNS),
}


@pytest.mark.parametrize(
    ("left", "right", "row"),
    [(layout, "columns", "dense") for layout in matrix(1, 1)]
    + [("columns", layout, "none") for layout in matrix(1, 1)]
    + [("rows", "rows", row) for row in ROW],
)
def test_products_are_exact_to_rounding_in_every_layout(left, right, row):
    a, b, bias = matrix(ROWS, INNER)[left], matrix(INNER, COLUMNS)[right], ROW[row]
    a64, b64, bias64 = a.double(), b.double(), 0 if bias is None else bias.double()
    off = (torch.ops.pyrovae.product(a, b, bias) - (a64 @ b64 + bias64)).norm()
    assert off < 1e-5 * (a64.abs() @ b64.abs()).norm()


def test_on_the_right_gaps_are_closed():  # in them oneDNN multiplies a thousand times slower
    for name, b in matrix(INNER, COLUMNS).items():
        found = _products.dense(b)
        assert torch.equal(found, b)
        assert found.is_contiguous() or found.T.is_contiguous(), name
    weight = torch.randn(COLUMNS, INNER + 10)[:, :INNER]
    assert _products.dense(weight.T).is_contiguous()
    assert _products.dense(torch.randn(COLUMNS, INNER).T).T.is_contiguous()  # as it is


def products(function, *args):
    """How many products of a traced function oneDNN gets; the numbers stay."""
    graph = make_fx(function)(*args)
    expected = graph(*args)
    _products.hand_over(graph)
    torch.testing.assert_close(graph(*args), expected, rtol=1e-4, atol=1e-4)
    return sum(node.target is torch.ops.pyrovae.product.default for node in graph.graph.nodes)


def test_a_layer_and_its_gradients_are_handed_over():
    layer, x = torch.nn.Linear(INNER, COLUMNS), torch.randn(2, ROWS, INNER, requires_grad=True)

    def loss(x):
        return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])

    assert products(loss, x) == 3


@pytest.mark.parametrize(
    ("function", "a", "b"),
    [
        (torch.mm, torch.randn(20, INNER), torch.randn(INNER, COLUMNS)),
        (torch.mm, torch.randn(ROWS, INNER).double(), torch.randn(INNER, COLUMNS).double()),
        (torch.mm, torch.randn(ROWS, INNER).bfloat16(), torch.randn(INNER, COLUMNS).bfloat16()),
        (
            lambda a, b: torch.addmm(torch.ones(ROWS, COLUMNS), a, b),
            *(torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)),
        ),
        (
            lambda a, b: torch.addmm(torch.ones(COLUMNS), a, b, alpha=2),
            *(torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)),
        ),
        (torch.matmul, torch.randn(3, ROWS, INNER), torch.randn(3, INNER, COLUMNS)),
    ],
    ids=["small", "float64", "bfloat16", "plus a matrix", "scaled", "batches"],
)
def test_other_products_are_left_alone(function, a, b):
    assert products(function, a, b) == 0


def test_other_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert products(torch.mm, torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)) == 0
