"""What an estimate will cost, measured on a piece of it before it begins."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyrovae import _processes
from pyrovae.evidence.keep import Kept
from pyrovae.evidence.method import Method
from pyrovae.evidence.target import COMPILE_ROWS
from pyrovae.evidence.walk import Walk
from pyrovae.evidence.weights import COMPILE_PARTICLES
from pyrovae.program import Args

MEASURED = 0.3
"""Seconds for which pieces are timed, after the first; one that takes longer is timed once."""

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
"""Of time, in seconds."""

COMPILED = min(COMPILE_PARTICLES, COMPILE_ROWS)
"""From so many evaluations on a run may be compiled, which its trial is not."""


@dataclass(frozen=True)
class Forecast:
    """Work and time of an estimate.

    Attributes:
        num_data: How many data there are.
        num_left: How many of them are still to be estimated.
        each: Evaluations of the program that each takes.
        unit: What these are.
        seconds: For what is left.
    """

    num_data: int
    num_left: int
    each: int
    unit: str
    seconds: float

    def __str__(self) -> str:
        """The product, and the time that it takes."""
        done = self.num_data - self.num_left
        before = f"{done:,} of {self.num_data:,} data are done already. " if done else ""
        total = _rounded(self.num_left * self.each)
        how = " uncompiled" if self.num_data * self.each >= COMPILED else ""
        work = f"{self.num_left:,} data x {self.each:,} {self.unit} = {total}"
        return f"{before}{work}: about {_duration(self.seconds)}{how}"


def forecast(
    walk: Walk,
    method: Method,
    kept: Kept | None = None,
    ways: int = 1,
    shared: bool = False,
) -> Forecast | None:
    """Work and time of what is left of an estimate; None where the method does not say.

    The trial runs pieces of the very program, on a few of its data, uncompiled; nothing of the
    caller's changes.

    Args:
        walk: Data and programs.
        method: How log p(x) is estimated.
        kept: Blocks that are done already.
        ways: 2 where the estimator runs backwards, too.
        shared: Divide what is left among processes, which should all call.
    """
    each = method.work(walk.num_particles, ways)
    if not each:
        return None
    done = kept.found if kept else {}
    left = sum(_size(walk, number) for number in walk.numbers if number not in done)
    total = sum(_size(walk, number) for number in walk.numbers)
    each_takes = _measured(walk, method) if left else 0.0
    processes = _processes.size() if shared else 1
    return Forecast(total, left, each, method.unit, left * each * each_takes / processes)


def _measured(walk: Walk, method: Method) -> float:
    """Seconds that an evaluation takes."""
    begin = method.trial(walk)

    def timed(few: Args) -> float:
        size = min(walk.size, len(walk.split))
        return _seconds(begin(tuple(arg[torch.arange(size) % len(arg)] for arg in few)))

    return walk.on_few(timed)


def _size(walk: Walk, number: int) -> int:
    return len(range(len(walk.split))[walk.where(number)])


def _seconds(piece: Callable[[], int]) -> float:
    """Seconds for one evaluation; a piece says how many it makes."""
    start, count = _now(), piece()  # not warm
    first = _now() - start
    if first >= MEASURED:
        return first / count
    start, count = _now(), 0
    while (spent := _now() - start) < MEASURED:
        count += piece()
    return spent / count


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _rounded(count: int) -> str:
    """A number to two or three places, in words."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def _duration(seconds: float) -> str:
    """Two units of time, or one where the second is nothing."""
    whole = max(1, round(seconds))
    for (name, size), (finer, part) in itertools.pairwise(UNITS):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {finer}" if rest else "")
    return f"{whole} s"
