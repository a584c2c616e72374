"""Networks: shapes in, shapes out, precision, and messages."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pyrovae import nets
from pyrovae._config import from_config, to_config

IMAGES = [(1, 1, 1), (1, 5, 7), (1, 8, 8), (2, 9, 4), (1, 28, 20), (1, 28, 28), (3, 32, 32)]
NETS: dict[str, Callable[..., nets.Net]] = {
    "MLP": lambda **options: nets.MLP(hidden=(6, 5), **options),
    "Conv": lambda **options: nets.Conv(channels=(4, 3, 2), hidden=6, **options),
}


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


@pytest.mark.parametrize("name", NETS)
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
