"""How good predicted classes are, and their probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence.diagnostics import error_of_mean

BINS = 15
"""Of confidence, in which it is held against accuracy (Guo et al., 2017)."""


@dataclass(frozen=True)
class Classification:
    r"""Predicted classes beside the true ones.

    Attributes:
        probs: Probability of each class, shape `(N, num_classes)`.
        y: True classes, shape `(N,)`.
        data: What they are of, in words.

    Raises:
        ValueError: If the shapes do not fit, or a label is no class.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> Classification(probs, torch.tensor([0, 1])).error
        0.5

    References:
        calibration: On Calibration of Modern Neural Networks (Guo et al., 2017), arXiv:1706.04599
    """

    probs: Tensor
    y: Tensor
    data: str = ""

    def __post_init__(self) -> None:
        if self.probs.dim() != 2 or self.y.shape != self.probs.shape[:1] or not len(self.y):
            raise ValueError(
                "probs must have shape (N, num_classes) and y (N,), got "
                f"{tuple(self.probs.shape)} and {tuple(self.y.shape)}"
            )
        if int(self.y.min()) < 0 or int(self.y.max()) >= self.probs.shape[1]:
            raise ValueError(
                f"y must be classes from 0 to {self.probs.shape[1] - 1}, got values from "
                f"{int(self.y.min())} to {int(self.y.max())}"
            )

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each datum, shape `(N,)`."""
        return self.probs.argmax(-1)

    @property
    def wrong(self) -> Tensor:
        """1 for each datum whose class is another than predicted, else 0, shape `(N,)`."""
        return (self.predicted != self.y).double()

    @property
    def error(self) -> float:
        """Share of the data whose class is another than predicted."""
        return float(self.wrong.mean())

    @property
    def error_std_error(self) -> float:
        """Standard error of that as an estimate over all data of this kind."""
        return error_of_mean(self.wrong)

    @property
    def cross_entropy(self) -> float:
        """Mean of -log q(y|x), nats."""
        right = self.probs.double().gather(1, self.y[:, None])
        return float(-right.clamp(min=torch.finfo(torch.float32).tiny).log().mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy in bins of both."""
        confidence = self.probs.double().amax(-1)
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        off = torch.zeros(BINS, dtype=torch.float64, device=bins.device)
        off.index_add_(0, bins, confidence - (1 - self.wrong))
        return float(off.abs().sum() / len(self.y))

    def summary(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {
            "error": self.error,
            "error_std_error": self.error_std_error,
            "cross_entropy": self.cross_entropy,
            "calibration_error": self.calibration_error,
            "num_data": len(self.y),
            "num_classes": self.probs.shape[1],
            "data": self.data,
        }

    def __str__(self) -> str:
        """A paragraph to quote."""
        of = f" ({self.data})" if self.data else ""
        return (
            f"Classes: {self.error:.2%} of {len(self.y):,} data wrong, standard error "
            f"{self.error_std_error:.2%}{of}; cross-entropy {self.cross_entropy:.3f} nats, "
            f"expected calibration error {self.calibration_error:.2%}."
        )


def table(found: Classification | None, probs: Tensor) -> list[dict[str, Any]]:
    """A row for each datum: the class predicted, the true one if known, all probabilities."""
    rows = []
    labels = [None] * len(probs) if found is None else found.y.tolist()
    for i, (each, label) in enumerate(zip(probs.tolist(), labels, strict=True)):
        row: dict[str, Any] = {"index": i, "predicted": max(range(len(each)), key=each.__getitem__)}
        if label is not None:
            row["label"] = label
        rows.append(row | {f"p{k}": p for k, p in enumerate(each)})
    return rows
