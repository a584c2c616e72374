"""Networks: tensors to tensors, no probability.

A recipe such as `MLP(hidden=(200, 200))` says what kind of network it is; called with the shapes
that go in and come out, it makes one. So a part asks for as many outputs as its distribution has
parameters, and swapping parts never edits a network.

All layers but the last may run in reduced precision (see `autocast`); the last one never does:
rounded to bfloat16, the parameters of a sharp density are off by whole nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrovae._config import Configurable, shape_of

__all__ = ["MLP", "Conv", "Net", "Network", "Recurrent", "autocast"]

Shape = tuple[int, ...]

autocast: ContextVar[Callable[[], AbstractContextManager]] = ContextVar(
    "autocast", default=nullcontext
)
"""What every network enters around all of its layers but the last."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class Network(nn.Module):
    """A network from `(*, *in_shape)` to `(*, *out_shape)`: body, last layer, and a bias.

    Args:
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        body: Layers from `(rows, *in_shape)` to hidden units; in reduced precision if asked for.
        head: The last layer, without bias, to as many units as `out_shape` has.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, body: nn.Module, head: nn.Module):
        super().__init__()
        self.in_shape, self.out_shape = in_shape, out_shape
        self.body, self.head = body, head
        self.bias = nn.Parameter(torch.zeros(out_shape))
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, *parts: Tensor) -> Tensor:
        """Map `(*, *in_shape)` to `(*, *out_shape)`.

        Several vectors are taken for one, in which they stand side by side. What is in front of
        each is broadcast, after the first layer if that is linear: rows that stand beside every
        class go through it once.
        """
        if len(parts) > 1:
            return self._side_by_side(parts)
        (x,) = parts
        lead = x.shape[: x.dim() - len(self.in_shape)]
        if x.shape[len(lead) :] != self.in_shape:
            raise ValueError(
                f"the network takes tensors of shape (..., {str(self.in_shape)[1:-1].rstrip(',')}),"
                f" got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, *self.in_shape)
        with autocast.get()():
            hidden = self.body(rows)
        return self.head(hidden.to(x.dtype)).reshape(*lead, *self.out_shape) + self.bias

    def _side_by_side(self, parts: Sequence[Tensor]) -> Tensor:
        sizes = [part.shape[-1] for part in parts]
        layers = list(self.body) if isinstance(self.body, nn.Sequential) else []
        linear = [type(layer) for layer in layers[:2]] == [nn.Flatten, nn.Linear]
        if not linear or self.in_shape != (sum(sizes),):
            return self(join(*parts))
        first: Any = layers[1]
        weights = first.weight.split(sizes, 1)
        with autocast.get()():
            each = [F.linear(part, w) for part, w in zip(parts, weights, strict=True)]
            hidden = sum(each[1:], each[0])
            hidden = hidden if first.bias is None else hidden + first.bias
            rows = hidden.reshape(-1, hidden.shape[-1])
            for layer in layers[2:]:
                rows = layer(rows)
        out = self.head(rows.to(parts[0].dtype))
        return out.reshape(*hidden.shape[:-1], *self.out_shape) + self.bias


def join(*vectors: Tensor) -> Tensor:
    """Vectors side by side, what is in front of each broadcast."""
    lead = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
    return torch.cat([v.expand(*lead, -1) for v in vectors], -1)


class Net(Configurable):
    """Recipe for a network: `net(in_shape, out_shape)` makes it."""

    images_only = False
    """Whether one side of the network must be an image."""

    def __call__(self, in_shape: Shape, out_shape: Shape) -> nn.Module:
        """Make a network from `(*, *in_shape)` to `(*, *out_shape)`."""
        raise NotImplementedError


class MLP(Net):
    """Fully connected layers.

    For vectors, and for small images.

    Args:
        hidden: Units of each hidden layer.
        activation: elu, gelu, relu, silu, softplus or tanh.
        batch_norm: Normalise each hidden layer, which then has no bias, over the batch. Off by
            default: it makes the output for one datum depend on the others in training.

    References:
        200-200 units are those of Importance Weighted Autoencoders (Burda et al., 2016),
        arXiv:1509.00519, who use tanh
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (200, 200),
        activation: str = "silu",
        batch_norm: bool = False,
    ):
        self.hidden = shape_of(hidden, "hidden")
        self.activation = _activation(activation)
        self.batch_norm = batch_norm

    def __call__(self, in_shape: Shape, out_shape: Shape) -> Network:
        """Make the network."""
        sizes = (math.prod(in_shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers.append(nn.Linear(before, after, bias=not self.batch_norm))
            if self.batch_norm:
                layers.append(nn.BatchNorm1d(after))
            layers.append(self.activation())
        head = nn.Linear(sizes[-1], math.prod(out_shape), bias=False)
        return Network(in_shape, out_shape, nn.Sequential(*layers), head)


class Conv(Net):
    """Strided convolutions: an encoder from an image, a mirrored decoder to one.

    For images with structure larger than a few pixels. Each 3x3 convolution halves (the decoder's
    doubles) height and width; any image size and any number of image channels will do.

    Args:
        channels: Channels of each convolution, from the image inwards.
        hidden: Units of the fully connected layer between convolutions and vector.
        activation: elu, gelu, relu, silu, softplus or tanh.
        batch_norm: Normalise each convolution's output over the batch. Off by default: it makes the
            output for one datum depend on the others in training.

    Example:
        >>> encoder = Conv(channels=(8, 16))((1, 28, 20), (4,))
        >>> encoder(torch.zeros(5, 1, 28, 20)).shape
        torch.Size([5, 4])
    """

    images_only = True

    def __init__(
        self,
        channels: int | Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str = "silu",
        batch_norm: bool = False,
    ):
        self.channels = shape_of(channels, "channels")
        if not self.channels:
            raise ValueError("channels must name at least one convolution, got none")
        (self.hidden,) = shape_of(hidden, "hidden")
        self.activation = _activation(activation)
        self.batch_norm = batch_norm

    def __call__(self, in_shape: Shape, out_shape: Shape) -> Network:
        """Make an encoder if `in_shape` is an image's, a decoder if `out_shape` is."""
        if len(in_shape) == 3 and len(out_shape) != 3:
            return self._encoder(in_shape, out_shape)
        if len(out_shape) == 3 and len(in_shape) != 3:
            return self._decoder(in_shape, out_shape)
        raise ValueError(
            "Conv connects images of shape (channels, height, width) with vectors, got "
            f"{in_shape} and {out_shape}; use MLP for other data"
        )

    def _encoder(self, in_shape: Shape, out_shape: Shape) -> Network:
        layers: list[nn.Module] = []
        for before, after in pairwise((in_shape[0], *self.channels)):
            bias = not self.batch_norm
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=bias))
            layers += self._after(after)
        inner = math.prod(self._sizes(in_shape)[-1]) * self.channels[-1]
        layers += [nn.Flatten(), nn.Linear(inner, self.hidden), self.activation()]
        head = nn.Linear(self.hidden, math.prod(out_shape), bias=False)
        return Network(in_shape, out_shape, nn.Sequential(*layers), head)

    def _decoder(self, in_shape: Shape, out_shape: Shape) -> Network:
        sizes = self._sizes(out_shape)[::-1]
        channels = (*self.channels[::-1], out_shape[0])
        inner = (channels[0], *sizes[0])
        layers: list[nn.Module] = [nn.Flatten()]
        layers += [nn.Linear(math.prod(in_shape), self.hidden), self.activation()]
        layers += [nn.Linear(self.hidden, math.prod(inner)), self.activation()]
        layers.append(nn.Unflatten(1, inner))
        for i in range(len(sizes) - 2):
            bias = not self.batch_norm
            layers.append(_doubling(channels[i], channels[i + 1], sizes[i], sizes[i + 1], bias))
            layers += self._after(channels[i + 1])
        head = _doubling(channels[-2], channels[-1], sizes[-2], sizes[-1], bias=False)
        return Network(in_shape, out_shape, nn.Sequential(*layers), head)

    def _after(self, channels: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(channels)] if self.batch_norm else []
        return [*norm, self.activation()]

    def _sizes(self, image: Shape) -> list[Shape]:
        """Height and width before the first convolution and after each."""
        sizes = [image[1:]]
        for _ in self.channels:
            sizes.append(tuple((size + 1) // 2 for size in sizes[-1]))
        return sizes


def _doubling(
    before: int, after: int, small: Shape, large: Shape, bias: bool
) -> nn.ConvTranspose2d:
    """The convolution that undoes a stride of two, for a larger size that is odd or even."""
    padding = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
    return nn.ConvTranspose2d(
        before, after, 3, stride=2, padding=1, output_padding=padding, bias=bias
    )


class Recurrent(Net):
    """A gated recurrent unit that reads a sequence both ways; its two last states go on.

    For sequences: data of shape `(steps, features)`, the rows of an image, or the entries of a
    vector one by one. It is an encoder, and leaves the order of what comes out to the last layer;
    `RecurrentBernoulli` and `RecurrentNormal` of `likelihoods` write sequences.

    Args:
        hidden: Units of the state in each direction.

    References:
        Gated recurrent units: Learning Phrase Representations using RNN Encoder-Decoder (Cho et
        al., 2014), arXiv:1406.1078; in both directions: A Neural Representation of Sketch Drawings
        (Ha & Eck, 2017), arXiv:1704.03477
    """

    def __init__(self, hidden: int = 64):
        (self.hidden,) = shape_of(hidden, "hidden")

    def __call__(self, in_shape: Shape, out_shape: Shape) -> Network:
        """Make the network."""
        head = nn.Linear(2 * self.hidden, math.prod(out_shape), bias=False)
        return Network(in_shape, out_shape, _BothWays(in_shape, self.hidden), head)


class GRU(nn.Module):
    r"""Gated recurrent unit: how far a state moves, and where, is a function of input and state.

    .. math:: h' = u \, h + (1 - u) \tanh(W x + r \, U h), \quad
        r, u = \sigma(W_{r,u} x + U_{r,u} h)

    What the inputs add, `read(x)`, is one matrix product for all steps where they are known.

    Args:
        features: Size of an input x.
        hidden: Size of the state h.
    """

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.read = nn.Linear(features, 3 * hidden)
        self.recur = nn.Linear(hidden, 3 * hidden, bias=False)

    def forward(self, read: Tensor, state: Tensor) -> Tensor:
        """The next state `(*, hidden)`, of `read(x)` and the state before."""
        x_reset, x_update, x_new = read.chunk(3, -1)
        h_reset, h_update, h_new = self.recur(state).chunk(3, -1)
        update = torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        return update * state + (1 - update) * new


class _BothWays(nn.Module):
    """The last states of one unit that reads forwards and of one that reads backwards."""

    units: Any  # a list of GRUs, to the type checker any modules

    def __init__(self, shape: Shape, hidden: int):
        super().__init__()
        self.shape, self.hidden = shape, hidden
        features = to_steps(torch.empty(shape), shape).shape[-1]
        self.units = nn.ModuleList([GRU(features, hidden), GRU(features, hidden)])

    def forward(self, x: Tensor) -> Tensor:
        steps = to_steps(x, self.shape)
        last = []
        for unit, inputs in zip(self.units, (steps, steps.flip(-2)), strict=True):
            read = unit.read(inputs)
            state = read.new_zeros(*read.shape[:-2], self.hidden)
            for each in read.unbind(-2):
                state = unit(each, state)
            last.append(state)
        return torch.cat(last, -1)


def to_steps(x: Tensor, shape: Shape) -> Tensor:
    """Data `(*, *shape)` as sequences `(*, steps, features)`.

    The steps are the entries of a vector, the first dimension of a matrix, and the rows of an image
    `(channels, height, width)`.
    """
    dims = len(shape)
    if dims == 1:
        return x.unsqueeze(-1)
    return x if dims == 2 else x.transpose(-dims, 1 - dims).flatten(1 - dims)


def from_steps(steps: Tensor, shape: Shape) -> Tensor:
    """Sequences as data: the inverse of `to_steps`."""
    dims = len(shape)
    if dims == 1:
        return steps.squeeze(-1)
    if dims == 2:
        return steps
    return steps.unflatten(-1, (shape[0], *shape[2:])).transpose(-dims, 1 - dims)


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


DEFAULT = MLP
"""What is taken where none is named."""
