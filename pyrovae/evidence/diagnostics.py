"""What the log weights of one datum say of the estimate made from them.

Every function takes log weights with shape `(K, N)` in nats and returns shape `(N,)`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

CONSTANT = 1e-3
"""Weights whose logarithms spread less than this are constant: what is left is rounding."""

FEWEST = 25
"""Particles that a tail is fitted to at least: it is a fifth of them, and five."""


def log_mean_exp(log_w: Tensor) -> Tensor:
    r"""Log of the mean weight, :math:`\log \tfrac1K \sum_k w_k`."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def std_error(log_w: Tensor) -> Tensor:
    """Standard error of `log_mean_exp` by the delta method; NaN for one particle.

    To be trusted only where the weights have a variance: see `khat`.
    """
    k = len(log_w)
    if k == 1:
        return torch.full_like(log_w[0], math.nan)
    return ((k / effective_sample_size(log_w) - 1).clamp(min=0) / (k - 1)).sqrt()


def error_of_mean(values: Tensor) -> float:
    """Standard error of the mean of values `(N,)` over the choice of data; NaN for one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def effective_sample_size(log_w: Tensor) -> Tensor:
    r"""How many equal weights would be as good, :math:`(\sum w)^2 / \sum w^2`.

    References:
        A Note on the Effective Sample Size (Kong, 1992)
    """
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def gain_per_doubling(log_w: Tensor) -> Tensor:
    """What the last doubling of K added: L_K less the mean over its two halves; NaN for K = 1."""
    if len(log_w) == 1:
        return torch.full_like(log_w[0], math.nan)
    halves = torch.stack([log_mean_exp(half) for half in log_w.tensor_split(2)])
    return log_mean_exp(log_w) - halves.mean(0)


def khat(log_w: Tensor) -> Tensor:
    """Shape of the weights' right tail: above 0.7 neither estimate nor error can be relied on.

    -inf where the largest weights are equal; inf where a few carry everything, so that there is no
    tail to fit; NaN for too few particles.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646
    """
    if len(log_w) == 1:
        return torch.full_like(log_w[0], math.nan)
    values = [_tail_shape(column) for column in log_w.T.cpu().numpy()]
    return torch.tensor(values, dtype=log_w.dtype, device=log_w.device)


def _tail_shape(log_w: np.ndarray) -> float:
    k = len(log_w)
    largest = np.sort(log_w)[-math.ceil(min(k / 5, 3 * math.sqrt(k))) - 1 :]
    if largest[-1] == -math.inf:  # no weight at all
        return math.inf
    if (log_w if k < FEWEST else largest).min() > largest[-1] - CONSTANT:
        return -math.inf
    if k < FEWEST:
        return math.nan
    if np.exp(largest[len(largest) // 4] - largest[-1]) == 0:  # too few weights for a tail
        return math.inf
    with np.errstate(all="ignore"):  # it divides by excesses that are zero
        _, shape = array_stats.psislw(-_floored(log_w))
    return math.inf if np.isnan(shape) else float(shape)


def std_error_of_copies(log_w: Tensor, copies: int) -> Tensor:
    """Standard error where draw k is of randomization k % R: of the spread of their R means.

    Draws of one randomization depend on each other, randomizations do not.

    Args:
        log_w: Log weights, nats, shape `(K, N)`.
        copies: R.
    """
    return std_error(torch.stack([log_mean_exp(log_w[r::copies]) for r in range(copies)]))


def std_error_of_strata(log_w: Tensor, second: Tensor) -> Tensor:
    r"""Standard error where so many draws are made of one part of a mixture, so many of another.

    .. math:: \frac1{\bar w} \sqrt{\sum_j (K_j / K)^2 \, s_j^2 / K_j}

    for parts of :math:`K_j` draws whose weights have standard deviation :math:`s_j`.

    Args:
        log_w: Log weights, nats, shape `(K, N)`.
        second: Which draws are of the second part, shape `(K,)`.
    """
    whole, squares = log_mean_exp(log_w), torch.zeros_like(log_w[0])
    for part in (log_w[~second], log_w[second]):
        share = (log_mean_exp(part) - whole).exp() * len(part) / len(log_w)
        error = std_error(part).where(share > 0, 0.0)  # weights of zero: no error, and no mean
        squares = squares + (share * error).square()
    return squares.sqrt()


def smoothed(log_w: Tensor, khat: Tensor) -> Tensor:
    """Log weights whose largest are quantiles of the Pareto distribution that was fitted to them.

    The mean weight has less variance and a bias. What has no `khat` stays as it is.

    Args:
        log_w: Log weights, nats, shape `(K, N)`.
        khat: Their tails' shapes, `khat(log_w)`.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646
    """
    found = log_w.clone()
    for n in khat.isfinite().nonzero().flatten().tolist():
        column = _floored(log_w[:, n].cpu().numpy())
        with np.errstate(all="ignore"):
            normalised, _ = array_stats.psislw(-column)
        body = column.argmin()  # where nothing was smoothed: the two differ by a constant
        shifted = normalised + (column[body] - normalised[body])
        found[:, n] = torch.from_numpy(shifted).to(found)
    return found


def _floored(log_w: np.ndarray) -> np.ndarray:
    """Log weights without infinities, which arviz cannot fit: these are weights of zero too."""
    return np.maximum(log_w, log_w.max() - 1e4)
