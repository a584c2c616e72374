r"""What turns stored values into what the model sees.

Three of the five ways are maps that change the density, a fourth draws new data, and a fifth only
writes them otherwise:

* grey levels 0 to m are dequantized, :math:`(x + u) / (m + 1)` with uniform u;
* grey values are scaled, :math:`x / m`;
* real values are standardized, :math:`(x - \text{loc}) / \text{scale}`;
* grey values are binarized: a new binary datum, one with probability :math:`x / m`;
* levels 0 to m are seen as :math:`x / m`, for likelihoods that give each level a probability.

The first three move a log density by the logarithm of their Jacobian, `Preprocess.log_det`, which
brings it back to the original units. A binarized datum has no original units to go back to, and a
probability has no units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["BINARIZE", "KINDS", "Preprocess"]

KINDS = ("binary", "grey", "levels", "real", "counts")
BINARIZE = ("dynamic", "fixed", "none")

# Dequantized values stay strictly between 0 and 1, where Beta and logit densities are finite.
_EPS = torch.finfo(torch.float32).eps
_ROWS = 2000


@dataclass(frozen=True, eq=False)
class Preprocess:
    """Stored values to what the model sees, as plain settings that survive JSON.

    Attributes:
        stored_kind: How stored values are read: one of `KINDS`.
        shape: Shape of one datum.
        max_value: Largest grey value or level: 255 for 8 bits, 1.0 for floats in [0, 1] and other
            kinds.
        binarize: One of `BINARIZE`; anything but "none" needs grey values.
        dequantize: Add uniform noise to grey levels; needs `max_value` above one.
        missing: NaN marks a missing entry.
        loc: Mean of each entry over the training data, or None.
        scale: Standard deviation of each entry over the training data, or None.
        seed: Of the noise that is drawn once.

    Raises:
        ValueError: If the settings contradict each other.
    """

    stored_kind: str
    shape: tuple[int, ...]
    max_value: float = 1.0
    binarize: str = "none"
    dequantize: bool = False
    missing: bool = False
    loc: Tensor | None = field(default=None, repr=False)
    scale: Tensor | None = field(default=None, repr=False)
    seed: int = 777

    def __post_init__(self) -> None:
        one_of("kind", self.stored_kind, KINDS)
        one_of("binarize", self.binarize, BINARIZE)
        if self.binarize != "none" and self.stored_kind != "grey":
            raise ValueError(
                f"binarize={self.binarize!r}: expected grey data, got {self.stored_kind} data; "
                "leave binarize out"
            )
        if self.dequantize and not self._has_levels:
            raise ValueError(
                "dequantize=True: expected grey levels that are not binarized, got "
                f"{self._stored()}; pass binarize='none' for levels of kind 'grey', "
                "dequantize=False for others"
            )
        if self.scale is not None and self.stored_kind != "real":
            raise ValueError(
                f"standardize=True: expected real data, got {self.stored_kind} data; "
                "leave standardize out or pass kind='real'"
            )

    @property
    def kind(self) -> str:
        """What the model sees: "binary", "grey" and "levels" (in [0, 1]), "real" or "counts"."""
        return self.stored_kind if self.binarize == "none" else "binary"

    @property
    def noisy(self) -> bool:
        """Whether a call draws noise."""
        return self.dequantize or self.binarize != "none"

    def __call__(self, x: Tensor) -> Tensor:
        """What the model sees of stored values, with noise from torch's global generator.

        Args:
            x: Stored values, with shape `(batch, *shape)`.

        Returns:
            float32, with the shape of x. Missing entries stay NaN.
        """
        return self._see(x, _uniform)

    def fix(self, x: Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One draw of the call, set by a seed and equal on every device.

        The global generator is left alone, and the first rows of x get the same values whatever
        follows them.

        Args:
            x: Stored values, with shape `(batch, *shape)`.
            seed: Of the noise.
            dtype: Of the result; `torch.uint8` holds binary values without missing entries.
        """
        generator = torch.Generator().manual_seed(seed)

        def uniform(p: Tensor) -> Tensor:
            return torch.rand(p.shape, generator=generator, dtype=p.dtype)

        seen = [self.to("cpu")._see(rows, uniform).to(dtype) for rows in x.cpu().split(_ROWS)]
        return torch.cat(seen).to(x.device)

    def log_det(self, x: Tensor) -> Tensor:
        r"""Log determinant of the map's Jacobian, summed over observed entries.

        .. math:: \log p(x) = \log p_{\text{model}}(\text{preprocess}(x)) + \text{log\_det}(x)

        Args:
            x: Stored values, with shape `(batch, *shape)`.

        Returns:
            Nats to add to the model's log density, with shape `(batch,)`.
        """
        observed = ~x.isnan().flatten(1)
        if self.scale is not None:
            return -(observed * self.scale.log().flatten()).sum(1).to(torch.float32)
        return observed.sum(1).to(torch.float32) * math.log(1 / self._width)

    def to(self, device: torch.device | str) -> Preprocess:
        """The same settings, with `loc` and `scale` on a device."""
        if self.loc is None or self.scale is None:
            return self
        return replace(self, loc=self.loc.to(device), scale=self.scale.to(device))

    def describe(self, split: str | None = None) -> str:
        """What is done to the data in a few words, for all splits or for the one named.

        Args:
            split: Name of a split; all but "train" are drawn once.
        """
        return self._treatment(split) + (", NaN marks missing entries" if self.missing else "")

    def to_config(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_config` builds an equal object."""
        config = asdict(self) | {"shape": list(self.shape)}
        for name in ("loc", "scale"):
            value = getattr(self, name)
            config[name] = None if value is None else value.tolist()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """Inverse of `to_config`."""
        tensors = {
            name: None if config[name] is None else torch.tensor(config[name], dtype=torch.float64)
            for name in ("loc", "scale")
        }
        return cls(**(config | tensors | {"shape": tuple(config["shape"])}))

    def _treatment(self, split: str | None) -> str:
        if not self.noisy:
            return self._stored()
        once = f"once with seed {self.seed}"
        verb = "dequantized" if self.dequantize else "binarized"
        if split is None and self.binarize != "fixed":
            afresh = "afresh" if self.dequantize else "dynamically"
            return f"grey pixels {verb} {afresh} in training, {once} in validation and test"
        if split == "train" and self.binarize != "fixed":
            return f"{verb} {'afresh at each access' if self.dequantize else 'dynamically'}"
        return f"{verb} {once}" if split else f"grey pixels {verb} {once}"

    @property
    def _has_levels(self) -> bool:
        return self.stored_kind == "grey" and self.binarize == "none" and self.max_value > 1

    @property
    def _width(self) -> float:
        """Length of the interval, in stored units, that becomes [0, 1]."""
        if self.kind != "grey":
            return 1.0
        return self.max_value + 1 if self.dequantize else self.max_value

    def _stored(self) -> str:
        words = {
            "binary": "static binary",
            "grey": "grey pixels scaled to [0, 1]",
            "levels": f"{self.max_value + 1:g} levels, each with a probability",
            "real": "real values as stored" if self.scale is None else "standardized",
            "counts": "counts as stored",
        }
        return words[self.stored_kind] if self.binarize == "none" else "binarized data"

    def _see(self, x: Tensor, uniform: Callable[[Tensor], Tensor]) -> Tensor:
        if self.loc is not None and self.scale is not None:
            return ((x - self.loc) / self.scale).to(torch.float32)
        x = x.to(torch.float32)
        if self.binarize != "none":
            seen = (uniform(x) < x / self.max_value).to(torch.float32)
            return torch.where(x.isnan(), x, seen) if self.missing else seen
        if self.dequantize:
            return ((x + uniform(x)) / self._width).clamp(_EPS, 1 - _EPS)
        return x / (self.max_value if self.kind == "levels" else self._width)


def _uniform(x: Tensor) -> Tensor:
    """Uniform noise of x's shape; on a CPU of 16 bits, in a third of the time of `torch.rand`."""
    if x.device.type != "cpu":  # where numbers are not drawn one after the other
        return torch.rand_like(x)
    words = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 4 + 1,))
    halves = words.view(torch.int32)
    bits = torch.cat([halves & 0xFFFF, (halves >> 16) & 0xFFFF])[: x.numel()]
    return (bits.view(x.shape).to(x.dtype) + 0.5) / 2**16


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` that lists the choices, unless value is one of them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
