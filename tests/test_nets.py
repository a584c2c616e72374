"""Networks: shapes in, shapes out, precision, and messages."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pyrovae import guides, likelihoods, nets
from pyrovae._config import from_config, to_config
from pyrovae.conditional import of

IMAGES = [(1, 1, 1), (1, 5, 7), (1, 8, 8), (2, 9, 4), (1, 28, 20), (1, 28, 28), (3, 32, 32)]
NETS: dict[str, Callable[..., nets.Net]] = {
    "MLP": lambda **options: nets.MLP(hidden=(6, 5), **options),
    "Conv": lambda **options: nets.Conv(channels=(4, 3, 2), hidden=6, **options),
    "Recurrent": lambda **_: nets.Recurrent(hidden=6),
}
NORMALISED = ("MLP", "Conv")
"""Recipes that take batch normalisation."""


def test_every_public_recipe_is_in_the_table() -> None:
    recipes = {name for name in nets.__all__ if _is_recipe(getattr(nets, name))}
    assert recipes == set(NETS)


def _is_recipe(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nets.Net) and found is not nets.Net


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_output_has_the_shape_asked_for(
    name: str, image: tuple[int, ...], batch_norm: bool
) -> None:
    make = NETS[name](batch_norm=batch_norm)
    encoder, decoder = make(image, (7,)), make((2,), (2 * image[0], *image[1:]))
    for lead in ((4,), (2, 3)):
        assert encoder(torch.rand(*lead, *image)).shape == (*lead, 7)
        assert decoder(torch.rand(*lead, 2)).shape == (*lead, 2 * image[0], *image[1:])
    assert encoder.eval()(torch.rand(image)).shape == (7,)
    assert decoder.eval()(torch.rand(2)).shape == (2 * image[0], *image[1:])


@pytest.mark.parametrize("name", NETS)
def test_rows_are_mapped_one_by_one(name: str) -> None:
    net = NETS[name]()((1, 5, 7), (3,)).double()
    x = torch.rand(2, 3, 1, 5, 7, dtype=torch.float64)
    one_by_one = torch.stack([torch.stack([net(x[i, j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(net(x), one_by_one)


@pytest.mark.parametrize("name", NORMALISED)
def test_batch_norm_looks_at_the_batch_in_training_only(name: str) -> None:
    net = NETS[name](batch_norm=True)((1, 8, 8), (3,))
    x = torch.rand(6, 1, 8, 8)
    assert not torch.allclose(net(x)[:2], net(x[:2]))
    net.eval()
    assert torch.allclose(net(x)[:2], net(x[:2]), atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter(name: str) -> None:
    for net, x in (
        (NETS[name]()((1, 8, 8), (3,)), torch.rand(5, 1, 8, 8)),
        (NETS[name](activation="elu")((2,), (1, 8, 8)), torch.randn(5, 2)),
    ):
        net(x).square().sum().backward()
        assert all(param.grad is not None and param.grad.any() for param in net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_the_last_layer_is_float32_under_autocast(name: str) -> None:
    seen: dict[str, torch.dtype] = {}

    def note(label: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.update({label: output.dtype})

    token = nets.autocast.set(lambda: torch.autocast("cpu", torch.bfloat16))
    try:
        for net, shape in (
            (NETS[name]()((1, 8, 8), (3,)), (5, 1, 8, 8)),
            (NETS[name]()((2,), (1, 8, 8)), (5, 2)),
        ):
            body = next(m for m in net.body.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
            body.register_forward_hook(note("body"))
            net.head.register_forward_hook(note("head"))
            out = net(torch.rand(shape))
            assert out.dtype == torch.float32
            assert not torch.equal(out, out.bfloat16().float())
            assert seen == {"body": torch.bfloat16, "head": torch.float32}
    finally:
        nets.autocast.reset(token)


def test_output_starts_at_the_bias() -> None:
    net = nets.MLP()((2,), (1, 3, 4))
    assert net.bias.shape == (1, 3, 4)
    assert not net.bias.any()
    assert [name for name, _ in net.named_parameters() if name.startswith("head")] == [
        "head.weight"
    ]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (4, 1, 7, 5), (4, 2, 5, 7)], ids=str)
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    net = NETS[name]()((1, 5, 7), (3,))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 1, 5, 7\), got "):
        net(torch.zeros(shape))


def test_a_vector_is_named_without_a_stray_comma() -> None:
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), got \(3,\)"):
        nets.MLP()((2,), (3,))(torch.zeros(3))


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((1, 4, 4), (1, 4, 4)), ((4, 4), (2,))], ids=str)
def test_conv_connects_images_with_vectors(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"Conv connects images .* use MLP for other data"):
        nets.Conv()(*shapes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nets.MLP(hidden=(3, 0)), "hidden must be positive integers"),
        (lambda: nets.MLP(hidden=("a",)), "hidden must be positive integers"),
        (lambda: nets.MLP(activation="rel"), "activation must be one of elu, .* got 'rel'"),
        (lambda: nets.Conv(channels=()), "channels must name at least one"),
        (lambda: nets.Conv(channels=(-1,)), "channels must be positive integers"),
        (lambda: nets.Conv(hidden=0), "hidden must be positive integers"),
        (lambda: nets.Conv(activation="x"), "activation must be one of"),
        (lambda: nets.Recurrent(hidden=0), "hidden must be positive integers"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_layer_may_be_a_number_and_none_is_linear() -> None:
    assert nets.MLP(hidden=3).hidden == (3,)
    assert nets.Conv(channels=3).channels == (3,)
    linear = nets.MLP(hidden=())((2,), (3,))
    assert sum(param.numel() for param in linear.parameters()) == 9


@pytest.mark.parametrize("name", NETS)
def test_a_recipe_is_rebuilt_and_makes_new_weights(name: str) -> None:
    recipe = NETS[name](activation="silu", batch_norm=True)
    again = from_config(json.loads(json.dumps(to_config(recipe))))
    assert vars(again).keys() == vars(recipe).keys()
    one, two = again((1, 8, 8), (3,)), again((1, 8, 8), (3,))
    assert one.state_dict().keys() == recipe((1, 8, 8), (3,)).state_dict().keys()
    assert not torch.equal(one.head.weight, two.head.weight)


def test_a_recipe_says_nothing_by_itself() -> None:
    with pytest.raises(NotImplementedError):
        nets.Net()((1,), (1,))


# Vectors side by side -----------------------------------------------------------------------------


class Own(nets.Net):
    """A network that is not one of ours."""

    def __call__(self, in_shape: Any, out_shape: Any) -> nn.Module:
        return nn.Linear(in_shape[0], out_shape[0])


BODIES: dict[str, Callable[[], nn.Module]] = {
    "two layers": lambda: nets.MLP((6, 5))((7,), (2, 3)),
    "one layer": lambda: nets.MLP((6,))((7,), (2, 3)),
    "none": lambda: nets.MLP(())((7,), (2, 3)),
    "batch norm": lambda: nets.MLP((6, 5), batch_norm=True)((7,), (2, 3)),
    "to an image": lambda: nets.Conv((4, 3), hidden=6)((7,), (1, 8, 8)),
    "unflattened": lambda: nets.Network(
        (7,), (2, 3), nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5)), nn.Linear(5, 6, bias=False)
    ),
    "no layers": lambda: nets.Network((7,), (2, 3), nn.Linear(7, 5), nn.Linear(5, 6, bias=False)),
}
LEADS: list[list[tuple[int, ...]]] = [
    [(5,), (5,)],
    [(5,), ()],
    [(4, 5), (5,)],
    [(5,), (4, 1)],
    [(3, 1, 5), (4, 1)],
    [(2, 5), (5,), (2, 1)],
]


@pytest.mark.parametrize("lead", [*LEADS, [(), ()]], ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_vectors_side_by_side_are_one_vector(name: str, lead: list[tuple[int, ...]]) -> None:
    net = BODIES[name]().double()
    if lead == [(), ()] and name == "batch norm":
        net.eval()
    for param in net.parameters():
        param.data.add_(0.3 * torch.randn_like(param))
    sizes = (4, 3) if len(lead) == 2 else (1, 4, 2)
    parts = [
        torch.randn(*front, size, dtype=torch.float64)
        for front, size in zip(lead, sizes, strict=True)
    ]
    joined = nets.join(*parts)
    assert joined.shape[:-1] == torch.broadcast_shapes(*lead)
    first = slice(None, sizes[0])
    torch.testing.assert_close(joined[..., first], parts[0].expand_as(joined[..., first]))
    torch.testing.assert_close(net(*parts), net(joined))


def test_rows_beside_every_class_go_through_the_first_layer_once() -> None:
    seen = []
    net = nets.MLP((6,))((7,), (2,))
    net.body[1].register_forward_hook(lambda *_: pytest.fail("the layer ran on joined rows"))
    net.body[2].register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert net(torch.randn(5, 4), torch.randn(3, 1, 3)).shape == (3, 5, 2)
    assert seen == [(15, 6)]


def test_gradients_reach_every_part() -> None:
    net, x, y = nets.MLP((6,))((7,), (2,)).double(), torch.randn(5, 4), torch.randn(3, 1, 3)
    inputs = [x.double().requires_grad_(), y.double().requires_grad_(), *net.parameters()]
    found = torch.autograd.grad(net(*inputs[:2]).square().sum(), inputs)
    expected = torch.autograd.grad(net(nets.join(*inputs[:2])).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [guides.Normal, guides.IAF, likelihoods.Bernoulli])
@pytest.mark.parametrize("own", [False, True])
def test_parts_take_vectors_side_by_side(kind: Any, own: bool) -> None:
    if own and kind is guides.IAF:
        pytest.skip("its context is asked of the same network")
    part = kind((7,), 3, Own() if own else nets.MLP((6,)))
    if kind is likelihoods.Bernoulli:
        part = kind((2,), 7, Own() if own else nets.MLP((6,)))
    x, y = torch.randn(5, 4), torch.randn(4, 1, 3)
    px, expected = of(part, x, y), part(nets.join(x, y))
    assert px.batch_shape == expected.batch_shape == (4, 5)
    torch.testing.assert_close(px.mean, expected.mean)


def test_vectors_of_a_wrong_length_are_refused() -> None:
    net = nets.MLP((6,))((7,), (2,))
    with pytest.raises(ValueError, match=r"takes tensors of shape \(\.\.\., 7\), got \(5, 8\)"):
        net(torch.zeros(5, 4), torch.zeros(5, 4))


def test_side_by_side_runs_in_the_precision_asked_for() -> None:
    net, x, y = nets.MLP((6, 5))((7,), (2,)), torch.randn(5, 4), torch.randn(3, 1, 3)
    exact = net(x, y)
    token = nets.autocast.set(lambda: torch.autocast("cpu", torch.bfloat16))
    try:
        rounded = net(x, y)
    finally:
        nets.autocast.reset(token)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


# Sequences ----------------------------------------------------------------------------------------


def test_a_gated_recurrent_unit_is_that_of_torch() -> None:
    unit, theirs = nets.GRU(3, 5), nn.GRUCell(3, 5, bias=False)
    with torch.no_grad():
        unit.read.bias.zero_()
        theirs.weight_ih.copy_(unit.read.weight)
        theirs.weight_hh.copy_(unit.recur.weight)
    x, state = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(unit(unit.read(x), state), theirs(x, state))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 4, 3), (2, 4, 3, 5)], ids=str)
def test_data_are_sequences_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 6, *shape)
    steps = nets.to_steps(x, shape)
    assert steps.shape[:3] == (2, 6, 4)
    assert torch.equal(nets.from_steps(steps, shape), x)
    first = x[..., 0] if len(shape) == 1 else x[:, :, 0] if len(shape) == 2 else x[:, :, :, 0]
    assert torch.equal(steps[:, :, 0], first.reshape(2, 6, -1))


def test_a_sequence_is_read_in_order() -> None:
    net = nets.Recurrent(hidden=6)((4, 3), (2,))
    x = torch.randn(5, 4, 3)
    assert not torch.allclose(net(x), net(x[:, [1, 0, 2, 3]]), atol=1e-4)
    forwards, backwards = net.body(x).chunk(2, -1)
    net.body.units[1].load_state_dict(net.body.units[0].state_dict())
    torch.testing.assert_close(net.body(x.flip(1)).chunk(2, -1)[1], forwards)
    assert not torch.allclose(forwards, backwards)
