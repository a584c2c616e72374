r"""Models compared by log p(x) of the same data.

.. math:: \Delta = \tfrac1N \sum_n \log p_a(x_n) - \log p_b(x_n), \qquad
    \mathrm{se}(\Delta)^2 = \tfrac1N \operatorname{var}_n [\log p_a(x_n) - \log p_b(x_n)]

Data that are hard for one model are hard for the other, so the error of a paired difference is far
below those of the two means. It holds the noise of both estimates, which is shown apart: what
remains is the choice of test data. Models trained with several seeds enter with their mean over
seeds, datum by datum, and the spread over seeds is an error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.evidence.result import RELIABLE, LogPx, OverData

Found = LogPx | Tensor | Sequence[LogPx]

SAME_UNITS = ("real values as stored", "standardized")
"""Treatments of data whose log p(x) is in the units that they were stored in."""


@dataclass(frozen=True)
class Entry(OverData):
    """A model in a comparison.

    Attributes:
        values: Log p(x) of each datum, the mean over seeds, shape `(N,)`.
        std_error: Monte Carlo standard error of each, shape `(N,)`; NaN where nobody says.
        seeds: Mean over the data for each seed, shape `(S,)`.
        estimates: What it was made of; none where values were given.
    """

    values: Tensor
    std_error: Tensor
    seeds: Tensor
    estimates: tuple[LogPx, ...] = ()

    @classmethod
    def of(cls, found: Found) -> Entry:
        """One estimate, one of each seed, or values."""
        if isinstance(found, Tensor):
            values = found.double()
            return cls(values, torch.full_like(values, math.nan), values.mean()[None])
        runs = (found,) if isinstance(found, LogPx) else tuple(found)
        values = torch.stack([run.values for run in runs]).double()
        noise = torch.stack([run.std_error for run in runs]).double()
        noise = noise.square().sum(0).sqrt() / len(runs)
        return cls(values.mean(0), noise, values.mean(1), runs)

    @property
    def seed_std_error(self) -> float:
        """Standard error of the mean as an estimate over all seeds; NaN for one."""
        return error_of_mean(self.seeds)

    @property
    def num_unreliable(self) -> int:
        """For how many data k-hat is above 0.7, in the seed where they are most."""
        return max((run.num_unreliable for run in self.estimates), default=0)


@dataclass(frozen=True)
class Difference(OverData):
    """What one model gives to each datum more than another.

    Attributes:
        values: Nats, shape `(N,)`.
        mean_std_error: Monte Carlo standard error of the mean: other noise, same data.
        seed_std_error: Standard error of the mean from the choice of seeds; NaN if either
            has but one.
    """

    values: Tensor
    mean_std_error: float
    seed_std_error: float

    @property
    def share(self) -> float:
        """Share of the data to which the first gives more."""
        return float((self.values > 0).double().mean())


@dataclass(frozen=True)
class Comparison:
    """Log p(x) of the same data under several models; `str` is a table in Markdown.

    Attributes:
        entries: Models by name, the first the one that others are compared with.
    """

    entries: dict[str, Entry]

    def difference(self, name: str, other: str | None = None) -> Difference:
        """What a model gives to each datum more than another; None is the first."""
        a, b = self.entries[name], self.entries[self.names[0] if other is None else other]
        noise = torch.hypot(a.std_error, b.std_error).square().sum().sqrt() / len(a.values)
        by_seed = math.hypot(a.seed_std_error, b.seed_std_error)
        return Difference(a.values - b.values, float(noise), by_seed)

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self.entries)

    def rows(self) -> list[dict[str, Any]]:
        """A row per model: its mean, and its difference to the first with the errors of both."""
        return [
            {
                "model": name,
                "log_px": entry.mean,
                "test_std_error": entry.test_std_error,
                "num_seeds": len(entry.seeds),
                "seed_std_error": entry.seed_std_error,
                "difference": found.mean,
                "difference_test_std_error": found.test_std_error,
                "difference_mean_std_error": found.mean_std_error,
                "difference_seed_std_error": found.seed_std_error,
                "better_on": found.share,
            }
            for name, entry in self.entries.items()
            for found in [self.difference(name)]
        ]

    def __str__(self) -> str:
        """A table in Markdown, and what it says."""
        return f"{self._table()}\n\n{self._words()}"

    def _table(self) -> str:
        first, seeds = self.names[0], any(len(e.seeds) > 1 for e in self.entries.values())
        head = ["model", "log p(x)", "error", f"less {first}", "error", "of it Monte Carlo"]
        head += ["seeds"] * seeds + ["better on"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for row in self.rows():
            cells = [row["model"], f"{row['log_px']:.2f}", _nats(row["test_std_error"])]
            if row["model"] == first:
                lines.append(cells + [""] * (len(head) - len(cells)))
                continue
            cells += [f"{row['difference']:+.2f}", _nats(row["difference_test_std_error"])]
            cells += [_nats(row["difference_mean_std_error"], 3)]
            cells += [_nats(row["difference_seed_std_error"])] * seeds
            lines.append([*cells, f"{row['better_on']:.0%}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _words(self) -> str:
        entries = list(self.entries.values())
        count = f"{len(entries[0].values):,} data"
        known = next((run for run in entries[0].estimates), None)
        sentences = [
            f"Nats per datum, mean over {count}" + (f" ({known.data})." if known else "."),
            f"Differences are to {self.names[0]}, datum by datum; their error is that over the "
            "choice of test data, with Monte Carlo's part of it beside it.",
        ]
        if known:
            sentences.insert(1, f"log p(x) is {known.claim} by {known.how}.")
        if any(len(entry.seeds) > 1 for entry in entries):
            sentences.append(self._seeds())
        unreliable = {n: e.num_unreliable for n, e in self.entries.items() if e.num_unreliable}
        if known and known.claim == "a lower bound":
            sentences.append(
                "Differences of lower bounds favour the model whose bound is the tighter one."
            )
        if unreliable:
            told = ", ".join(f"{number:,} under {name}" for name, number in unreliable.items())
            sentences.append(f"k-hat is above {RELIABLE} for this many data: {told}.")
        return " ".join(sentences)

    def _seeds(self) -> str:
        told = (
            f"{name} {len(entry.seeds)} (standard deviation {_nats(float(entry.seeds.std()))})"
            for name, entry in self.entries.items()
            if len(entry.seeds) > 1
        )
        return (
            f"Means over seeds of log p(x): {', '.join(told)}; the error from their choice has a "
            "column of its own."
        )


def compare(found: Mapping[str, Found]) -> Comparison:
    """Compare models by log p(x) of the same data, datum by datum.

    All must be estimated alike: a lower bound of one model against the value of another would
    count the bound's own gap against the model, as would bounds of other methods, settings or K.
    Only values without a gap are compared however they were come by.

    Args:
        found: By the models' names: what `log_px` found; a list of that, one for each seed that a
            model was trained with; or a tensor of values, shape `(N,)`, such as ELBOs. The first is
            the one that the others are compared with.

    Raises:
        ValueError: If there are fewer than two models, or they are not of the same data, or not
            estimated alike.
        TypeError: If one is something else.

    Example:
        >>> found = compare({"a": torch.tensor([-2.0, -5.0]), "b": torch.tensor([-1.0, -3.0])})
        >>> found.difference("b").mean, found.difference("b").test_std_error
        (1.5, 0.5)
    """
    if len(found) < 2:
        raise ValueError(f"it takes two models or more to compare, got {len(found)}")
    for name, one in found.items():
        _check(name, one)
    entries = {name: Entry.of(one) for name, one in found.items()}
    first, *others = entries.items()
    for other in others:
        _check_counts(first, other)
    runs = [(name, run) for name, entry in entries.items() for run in entry.estimates]
    if runs and not all(entry.estimates for entry in entries.values()):
        given = next(name for name, entry in entries.items() if not entry.estimates)
        raise ValueError(
            f"{given} is a tensor, which does not say how log p(x) was estimated, and "
            f"{runs[0][0]} does: give tensors for all, or what log_px found"
        )
    for run in runs[1:]:
        _check_same_data(runs[0], run)
        _check_same_method(runs[0], run)
    return Comparison(entries)


Named = tuple[str, LogPx]


def _check(name: str, one: Any) -> None:
    runs = one if isinstance(one, (list, tuple)) else [one]
    if not runs or not all(isinstance(run, LogPx) for run in runs):
        if not isinstance(one, Tensor) or one.dim() != 1 or not len(one):
            got = f"a tensor {tuple(one.shape)}" if isinstance(one, Tensor) else repr(one)[:60]
            raise TypeError(
                f"{name} must be what log_px found, a list of that, or a tensor (N,), got {got}"
            )
        return
    for run in runs[1:]:
        _check_counts((name, Entry.of(runs[0])), (name, Entry.of(run)))


def _check_counts(first: tuple[str, Entry], other: tuple[str, Entry]) -> None:
    sizes = [len(entry.values) for _, entry in (first, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{first[0]} has {sizes[0]:,} data and {other[0]} {sizes[1]:,}: only the same data can "
            "be compared datum by datum"
        )


def _check_same_data(first: Named, other: Named) -> None:
    kept, stored = SAME_UNITS
    data = [run.data.replace(stored, kept) for _, run in (first, other)]
    if data[0] != data[1]:
        raise ValueError(
            f"{first[0]} and {other[0]} are not of the same data, treated alike: {first[1].data!r} "
            f"and {other[1].data!r}"
        )


def _check_same_method(first: Named, other: Named) -> None:
    (a, one), (b, two) = first, other
    if one.claim != two.claim:
        raise ValueError(
            f"log p(x) is {one.claim} for {a} and {two.claim} for {b}: the difference would count "
            "the gap of the estimate against the model. Estimate both by one method"
        )
    how = [(run.method, run.settings, run.num_particles) for run in (one, two)]
    if one.claim != "the value" and how[0] != how[1]:
        raise ValueError(
            f"log p(x) was estimated by {one.how} for {a}, by {two.how} for {b}, with gaps of "
            "their own that the difference would hold: estimate both alike"
        )


def _nats(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
