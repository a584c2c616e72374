"""How to train, as plain values: what `fit` takes, checked, and the learning-rate schedules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from lightning_fabric import Fabric

from pyrovae import _processes

__all__ = ["SCHEDULES", "Options"]

PRECISIONS = ("32-true", "bf16-mixed")

Schedule = Callable[[float], float]


def _one_cycle(t: float) -> float:
    """Up from 1/25 in three tenths of training, then down to almost nothing, along cosines."""
    low, peak, end = 1 / 25, 0.3, 1e-4
    if t < peak:
        return low + (1 - low) * (1 - math.cos(math.pi * t / peak)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (t - peak) / (1 - peak))) / 2


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "one-cycle": _one_cycle,
}
"""Learning rate, in multiples of `lr`, at each fraction of training.

One-cycle: Super-Convergence (Smith & Topin, 2018), arXiv:1708.07120.
"""


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Nothing but warnings from a logger."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True)
class Options:
    """How to train; `fit` takes the same arguments and says what they are.

    Raises:
        ValueError: If one is out of range.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 4e-3
    schedule: str | Schedule = "one-cycle"
    kl_warmup: int | None = None
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"
    compile: bool | None = None

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "kl_warmup": 0, "patience": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name in ("kl_warmup", "patience"):
                continue
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number, at least {bound}, got {value!r}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known and not (name == "schedule" and callable(value)):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def fabric(self, devices: int = 1) -> Fabric:
        """Device, precision, and a place among the processes that were launched together.

        Args:
            devices: Processes to launch on this machine, by running the command that is running
                once more for each; where some were launched already, it is their number.

        Raises:
            ValueError: If there is no such device here.
        """
        found = _processes.launched()
        nodes, local = (1, devices) if found == (1, 1) else found
        strategy = "auto" if nodes * local == 1 else "ddp"
        with _quiet("lightning_fabric"):  # or it announces each choice
            try:
                fabric = Fabric(
                    accelerator=self.accelerator,
                    strategy=strategy,
                    devices=local,
                    num_nodes=nodes,
                    precision=self.precision,
                )
            except (ValueError, RuntimeError) as error:
                times = "" if local == 1 else f" {local} times over"
                raise ValueError(
                    f"accelerator {self.accelerator!r} is not to be had on this machine{times}: "
                    "take 'cpu' or 'auto'"
                ) from error
            fabric.launch()
        return fabric

    def rate(self, t: float) -> float:
        """Learning rate when a fraction `t` of training is done."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return self.lr * schedule(t)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it, as plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        schedule = self.schedule if isinstance(self.schedule, str) else "own"
        left_out = ("accelerator", "compile")
        return {n: v for n, v in plain.items() if n not in left_out} | {"schedule": schedule}
