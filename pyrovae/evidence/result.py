"""An estimate of log p(x) with what is needed to judge it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrovae.evidence.diagnostics import error_of_mean

PER_DATUM = ("values", "std_error", "ess", "khat", "gain_per_doubling", "spent")

CLAIMS = {"a lower bound": ">=", "an estimate": "~", "the value": "="}
"""What an estimate is in expectation, and the sign for it."""

NOTICEABLE = 1e-3
"""An error of an exact value to be told of, nats."""

ALIKE = 0.4
"""Share of few weights that count, below which these are too far apart."""

RELIABLE = 0.7
"""The k-hat above which importance sampling is not to be relied on (Vehtari et al., 2024)."""


class OverData:
    """Numbers of each datum, and what they say of all.

    Attributes:
        values: Nats, shape `(N,)`.
    """

    values: Tensor

    @property
    def mean(self) -> float:
        """Mean over the data, nats per datum."""
        return float(self.values.mean())

    @property
    def test_std_error(self) -> float:
        """Standard error of the mean as an estimate over all data of this kind; NaN for one."""
        return error_of_mean(self.values)


@dataclasses.dataclass(frozen=True)
class LogPx(OverData):
    """Estimates of log p(x), one for each datum, in nats with all constants.

    Attributes:
        values: log p(x) of each datum, shape `(N,)`: in expectation a lower bound.
        std_error: Monte Carlo standard error of each, shape `(N,)`; of an exact value, what bounds
            its error.
        ess: Effective sample size of each, shape `(N,)`.
        khat: Pareto k-hat of each datum's weights, shape `(N,)`.
        gain_per_doubling: What the last doubling of K added to each, shape `(N,)`.
        spent: Log weights that each was made of, shape `(N,)`: K, or more where it was asked for.
        method: The estimator.
        num_particles: K.
        seed: Of the noise.
        how: What the estimator did, in words.
        settings: The estimator's own settings.
        claim: What the values are in expectation, one of `CLAIMS`.
        data: What the data are: set, split, binarization.
        num_dims: Observed entries of the mean datum, for bits per dimension.
    """

    values: Tensor
    std_error: Tensor
    ess: Tensor
    khat: Tensor
    gain_per_doubling: Tensor
    spent: Tensor
    method: str
    num_particles: int
    seed: int
    how: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    claim: str = "a lower bound"
    data: str = ""
    num_dims: float = math.nan

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of the mean: other noise, same data."""
        return float(self.std_error.square().sum().sqrt()) / len(self.values)

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
        known = {(part.how, part.num_particles, part.seed, part.data) for part in parts}
        if not known:
            raise ValueError("there is no estimate to join")
        if len(known) != 1:
            raise ValueError(f"estimates of different settings cannot be joined: {known}")
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
            "how": self.how,
            "settings": self.settings,
            "claim": self.claim,
            "num_particles": self.num_particles,
            "spent_mean": float(self.spent.double().mean()),
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
        if self.claim == "the value":
            return self._exactly()
        gain = float(self.gain_per_doubling.mean())
        sentences = [
            f"log p(x) {CLAIMS[self.claim]} {self.mean:.2f} nats per datum: {self.claim} by "
            f"{self.how}{self._spending()} (seed {self.seed}), mean over {n:,} data"
            + (f" ({self.data})." if self.data else "."),
            f"Standard error {self._errors()}{self._bits()}.",
        ]
        if self.num_particles > 1:
            sentences.append(f"The last doubling of K added {gain:.3f} nats.")
        sentences.append(self._of_few() if self.khat.isnan().all() else self._of_many(gain))
        return " ".join(sentences)

    def _of_many(self, gain: float) -> str:
        above = (
            f"k-hat is above {RELIABLE} for {self.num_unreliable:,} of {len(self.values):,} data"
        )
        return above + self._advice(gain)

    def _of_few(self) -> str:
        """What can be said of weights that are too few for k-hat, such as those of chains."""
        if self.num_particles == 1:
            return "There is no telling how far one weight is from the others."
        alike = f"{float(self.ess.mean()):.1f} of {self.num_particles:,} weights count on average"
        if float(self.ess.mean()) < ALIKE * self.num_particles:
            return f"{alike}: the bound is loose, and a longer run raises it."
        return f"{alike}."

    def _exactly(self) -> str:
        """The paragraph of values without chance."""
        n, error = len(self.values), float(self.std_error.max())
        off = int((self.std_error > NOTICEABLE).sum())
        sentences = [
            f"log p(x) = {self.mean:.4f} nats per datum: the value by {self.how}, mean over {n:,} "
            + (f"data ({self.data})." if self.data else "data."),
            f"By its own account no datum is off by more than {error:.1e} nats."
            if not off
            else f"{off:,} of {n:,} data may be off by more than {NOTICEABLE} nats, the worst by "
            f"{error:.1e}: raise max_evaluations, or anneal.",
        ]
        if n > 1:
            sentences.append(
                f"Standard error {self.test_std_error:.2f} from the choice of test data"
                f"{self._bits()}."
            )
        return " ".join(sentences)

    def _spending(self) -> str:
        mean = float(self.spent.double().mean())
        return "" if mean == self.num_particles else f", {mean:,.0f} on average"

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
                "loose by an unknown amount. Take method annealed in the place of more particles "
                "(Wu et al., 2017), or train a better guide."
            )
        if gain > max(0.01, 3 * self.mean_std_error):
            return "; the bound still rises with K: take more particles."
        return "."
