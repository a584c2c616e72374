"""An estimate of log p(x) with what is needed to judge it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PER_DATUM = ("values", "std_error", "ess", "khat", "gain_per_doubling")
RELIABLE = 0.7
"""The k-hat above which importance sampling is not to be relied on (Vehtari et al., 2024)."""


@dataclasses.dataclass(frozen=True)
class LogPx:
    """Estimates of log p(x), one for each datum, in nats with all constants.

    Attributes:
        values: log p(x) of each datum, shape `(N,)`: in expectation a lower bound.
        std_error: Monte Carlo standard error of each, shape `(N,)`.
        ess: Effective sample size of each, shape `(N,)`.
        khat: Pareto k-hat of each datum's weights, shape `(N,)`.
        gain_per_doubling: What the last doubling of K added to each, shape `(N,)`.
        method: The estimator.
        num_particles: K.
        seed: Of the noise.
        data: What the data are: set, split, binarization.
        num_dims: Observed entries of the mean datum, for bits per dimension.
    """

    values: Tensor
    std_error: Tensor
    ess: Tensor
    khat: Tensor
    gain_per_doubling: Tensor
    method: str
    num_particles: int
    seed: int
    data: str = ""
    num_dims: float = math.nan

    @property
    def mean(self) -> float:
        """Mean over the data, nats per datum."""
        return float(self.values.mean())

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean: other noise, same data."""
        return float(self.std_error.square().sum().sqrt()) / len(self.values)

    @property
    def test_std_error(self) -> float:
        """Standard error of the mean as an estimate over all data of this kind; NaN for one."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.std()) / math.sqrt(len(self.values))

    @property
    def bits_per_dim(self) -> float:
        """-log2 p(x) per observed entry; NaN where nothing is observed."""
        if not self.num_dims:
            return math.nan
        return -self.mean / (self.num_dims * math.log(2))

    @property
    def num_unreliable(self) -> int:
        """For how many data k-hat is above 0.7."""
        return int((self.khat > RELIABLE).sum())

    @classmethod
    def join(cls, parts: Sequence[LogPx]) -> LogPx:
        """Put estimates of consecutive blocks of data together.

        Give each part once and in the order of the data, all of one `block_size`: a part that is
        missing, comes twice or out of place is not noticed.

        Raises:
            ValueError: If they differ in method, K, seed or data, or there is none.
        """
        settings = {(part.method, part.num_particles, part.seed, part.data) for part in parts}
        if not settings:
            raise ValueError("there is no estimate to join")
        if len(settings) != 1:
            raise ValueError(f"estimates of different settings cannot be joined: {settings}")
        sizes = torch.tensor([float(len(part.values)) for part in parts])
        dims = torch.tensor([part.num_dims for part in parts])
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in PER_DATUM}
        joined["num_dims"] = float((sizes * dims).sum() / sizes.sum())
        return dataclasses.replace(parts[0], **joined)

    def summary(self) -> dict[str, Any]:
        """The numbers over all data, ready for JSON."""
        return {
            "mean": self.mean,
            "mean_std_error": self.mean_std_error,
            "test_std_error": self.test_std_error,
            "bits_per_dim": self.bits_per_dim,
            "method": self.method,
            "num_particles": self.num_particles,
            "seed": self.seed,
            "num_data": len(self.values),
            "num_dims": self.num_dims,
            "data": self.data,
            "gain_per_doubling": float(self.gain_per_doubling.mean()),
            "ess_median": float(self.ess.median()),
            "khat_median": float(self.khat.median()),
            "khat_above_0.7": self.num_unreliable,
        }

    def __str__(self) -> str:
        """A paragraph to quote."""
        n = len(self.values)
        gain = float(self.gain_per_doubling.mean())
        sentences = [
            f"log p(x) >= {self.mean:.2f} nats per datum: a lower bound by {self.method} sampling "
            f"from the guide with K = {self.num_particles:,} particles (seed {self.seed}), mean "
            f"over {n:,} data" + (f" ({self.data})." if self.data else "."),
            f"Standard error {self._errors()}{self._bits()}.",
        ]
        if self.num_particles > 1:
            sentences.append(f"The last doubling of K added {gain:.3f} nats.")
        if self.khat.isnan().all():
            sentences.append("There are too few particles for k-hat.")
        else:
            above = f"k-hat is above {RELIABLE} for {self.num_unreliable:,} of {n:,} data"
            sentences.append(above + self._advice(gain))
        return " ".join(sentences)

    def _errors(self) -> str:
        errors = {"from Monte Carlo": f"{self.mean_std_error:.3f}"}
        errors["from the choice of test data"] = f"{self.test_std_error:.2f}"
        known = [f"{value} {source}" for source, value in errors.items() if value != "nan"]
        return ", ".join(known) or "unknown"

    def _bits(self) -> str:
        bits = self.bits_per_dim
        return "" if math.isnan(bits) else f"; {bits:.4f} bits per dimension"

    def _advice(self, gain: float) -> str:
        if self.num_unreliable > len(self.values) / 10:
            return (
                ": their weights have tails too heavy for these standard errors, and the bound is "
                "loose by an unknown amount. Take more particles; where that does not help, anneal "
                "from the guide to the posterior (Wu et al., 2017), or train a better guide."
            )
        if gain > max(0.01, 3 * self.mean_std_error):
            return "; the bound still rises with K: take more particles."
        return "."
