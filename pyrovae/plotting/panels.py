"""Panels of points, bars and curves, and what they share: colours, labels, axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Told apart by colour-blind readers: Okabe and Ito's for lines, Tol's "muted" for classes.
BLUE, ORANGE, MISSING, GREY = "#0072B2", "#E69F00", "#D55E00", "#777777"
TEN = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#777777"),
)
MAX_CLASSES, MAX_ENTRIES = 20, 12


def some_rows(x: Tensor, num: int) -> Tensor:
    """At most `num` rows, spread evenly."""
    if not len(x) or num < 1:
        raise ValueError(f"expected at least one datum to show, got {len(x)} and room for {num}")
    return x[torch.linspace(0, len(x) - 1, min(num, len(x)), dtype=torch.double).round().long()]


def entry_panels(entries: int) -> tuple[Figure, dict[int, Axes]]:
    """A panel for each of up to 12 entries of a datum, spread evenly over them."""
    index = some_rows(torch.arange(entries), MAX_ENTRIES).tolist()
    columns = min(4, len(index))
    rows = math.ceil(len(index) / columns)
    size = max(4.5, 2.4 * columns), max(3.2, 2.2 * rows + 0.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(index) :]:
        ax.remove()
    return figure, dict(zip(index, axes, strict=False))


def scatter_entries(x: Tensor, again: Tensor) -> Figure:
    """Reconstructed against observed values of each entry, for x and again `(n, entries)`."""
    figure, panels = entry_panels(x.shape[1])
    for i, ax in panels.items():
        seen = ~x[:, i].isnan()
        observed, made = as_numpy(x[seen, i]), as_numpy(again[seen, i])
        ax.scatter(observed, made, s=8, alpha=0.5, color=BLUE, linewidths=0)
        ax.set_aspect("equal", adjustable="datalim")
        ax.axline((0, 0), slope=1, color=GREY, lw=1, ls="--")
        spread = np.square(observed - observed.mean()).sum() if len(observed) else 0.0
        fit = 1 - np.square(observed - made).sum() / spread if spread > 0 else math.nan
        ax.set_title(
            with_minus(f"x[{i}]   $R^2$ = {fit:.2f}") if spread > 0 else f"x[{i}]", size=10
        )
        tidy_axes(ax)
    figure.suptitle("Reconstructions of the observed entries")
    figure.supxlabel("observed", size=10)
    figure.supylabel("mean of p(x|z)", size=10)
    return figure


def histogram_entries(drawn: Tensor, x: Tensor | None) -> Figure:
    """Marginals of samples, and of data, both `(n, entries)`."""
    figure, panels = entry_panels(drawn.shape[1])
    for i, ax in panels.items():
        made = as_numpy(drawn[:, i])
        seen = made[:0] if x is None else as_numpy(x[~x[:, i].isnan(), i])
        edges = bin_edges(made, seen)
        made, seen = (values.clip(edges[0], edges[-1]) for values in (made, seen))
        if len(seen):
            ax.hist(seen, edges, density=True, color=ORANGE, alpha=0.6, label="data")
        ax.hist(made, edges, density=True, color=BLUE, histtype="step", lw=1.5, label="samples")
        ax.set_title(f"x[{i}]", size=10)
        tidy_axes(ax)
    for ax in [*panels.values()][-4:]:
        ax.set_xlabel("value")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Marginals of samples from the model" + ("" if x is None else " and of data"))
    figure.supylabel("density", size=10)
    return figure


def bin_edges(drawn: np.ndarray, data: np.ndarray) -> list[float]:
    """Bins over all but the outermost thousandths of both; one per value for a few integers."""
    both = [values for values in (drawn, data) if len(values)]
    low, high = (pick(np.quantile(v, q) for v in both) for pick, q in ((min, 0.001), (max, 0.999)))
    if all((v == np.round(v)).all() for v in both) and high - low <= 40:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1).tolist()
    bins = round(2 * len(both[-1]) ** (1 / 3))
    return np.histogram_bin_edges(both[-1], min(max(bins, 8), 30), (low, high)).tolist()


def histogram_by_label(ax: Axes, z: np.ndarray, y: Tensor | None) -> None:
    """One latent of shape `(n,)`: bars stacked by label, or points where labels are many."""
    ax.set_xlabel("z1")
    tidy_axes(ax)
    if y is not None and len(y.unique()) > MAX_CLASSES:
        ax.scatter(z, as_numpy(y), s=8, alpha=0.6, color=BLUE, linewidths=0)
        ax.set_ylabel("label y")
        return
    edges = np.histogram_bin_edges(z, 40)
    bottom = np.zeros(40)
    for i, (label, rows) in enumerate(rows_by_label(y, len(z)).items()):
        counts, _ = np.histogram(z[rows], edges)
        hatch = "///" if i > 9 else None
        bars: dict[str, Any] = {
            "bottom": bottom,
            "align": "edge",
            "color": label_colour(i, y),
            "hatch": hatch,
        }
        ax.bar(edges[:-1], counts, np.diff(edges), label=label, **bars)
        bottom = bottom + counts
    ax.set_ylabel("number of data")
    label_legend(ax, y)


def scatter_by_label(ax: Axes, z: np.ndarray, y: Tensor | None) -> None:
    """Points `(n, 2)`, each label in its colour and written at its median."""
    style: dict[str, Any] = {"s": np.clip(20000 / len(z), 7, 30), "alpha": 0.8, "linewidths": 0}
    if y is not None and len(y.unique()) > MAX_CLASSES:
        points = ax.scatter(z[:, 0], z[:, 1], c=as_numpy(y), cmap="viridis", **style)
        bar = ax.figure.colorbar(ScalarMappable(points.norm, points.cmap), ax=ax)
        bar.set_label("label y")
        return
    for i, (label, rows) in enumerate(rows_by_label(y, len(z)).items()):
        marker = "^" if i > 9 else "o"
        ax.scatter(*z[rows].T, color=label_colour(i, y), label=label, marker=marker, **style)
        if y is not None:
            across, up = np.median(z[rows], 0)
            name = ax.text(across, up, label, weight="bold", ha="center", va="bottom")
            name.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    label_legend(ax, y)


def rows_by_label(y: Tensor | None, num: int) -> dict[str, np.ndarray]:
    """Which of `num` rows have each label; all, if there are no labels."""
    if y is None:
        return {"": np.full(num, True)}
    return {str(label.item()): (y == label).numpy() for label in y.unique()}


def label_colour(i: int, y: Tensor | None) -> str:
    """Colour of the i-th label; one for all where there are no labels."""
    return BLUE if y is None else TEN[i % len(TEN)]


def label_legend(ax: Axes, y: Tensor | None) -> None:
    """The legend of the labels, with markers large enough to see."""
    if y is None:
        return
    legend = ax.legend(title="label y", loc="upper left", bbox_to_anchor=(1.01, 1))
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set(sizes=[36], alpha=1)


def principal_components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of `(n, d)`, and each one's share of the variance."""
    centred = z - z.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, [-1, -2]]
    axes = axes * np.sign(axes.sum(0))  # an eigenvector's sign is arbitrary: always take the same
    shares = variances[[-1, -2]].clip(0) / max(variances.sum(), 1e-300)
    return centred @ axes, shares


def curve_points(history: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Points `(epoch, value)` of each curve that history holds, by its name in the legend."""
    found = {}
    for key, name in names.items():
        rows = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        points = np.array(rows, dtype=float).reshape(-1, 2)
        if np.isfinite(points[:, 1]).any():
            found[name] = points[np.isfinite(points[:, 1])]
    return found


def fit_limits(ax: Axes, curves: list[np.ndarray]) -> None:
    """Limits that hold all but the first tenth of the epochs, at least one."""
    late = np.concatenate([c[max(1, len(c) // 10) if len(c) > 3 else 0 :, 1] for c in curves])
    room = 0.06 * (late.max() - late.min()) or 0.5
    ax.set_ylim(late.min() - room, late.max() + room)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def shade_warm_up(ax: Axes, history: Sequence[dict[str, Any]]) -> None:
    """Shade the epochs in which the weight of the KL is below one."""
    weights = curve_points(history, {"kl_weight": "weight"}).get("weight", np.ones((1, 2)))
    warm = weights[weights[:, 1] < 1, 0]
    if len(warm):
        first, last = warm.min() - 0.5, warm.max() + 0.5
        ax.axvspan(first, last, color=GREY, alpha=0.15, lw=0, label="KL weight < 1")


def least_and_most(values: Tensor, num: int) -> dict[str, Tensor]:
    """Indices of the least and the most likely data, never the same datum twice."""
    order = values.nan_to_num(nan=-math.inf, neginf=-math.inf).argsort(stable=True)
    num = min(num, max(1, len(order) // 2))
    rows = {"Least likely": order[:num], "Most likely": order.flip(0)[:num]}
    return rows if len(order) > 1 else {"The datum": order}


def histogram(ax: Axes, finite: np.ndarray, total: int) -> None:
    """Bars of the finite ones of `total` values, and their mean."""
    ax.hist(finite, min(60, max(10, math.isqrt(len(finite)))), color=BLUE, alpha=0.75)
    left_out = total - len(finite)
    rest = f"\nwithout {left_out:,} of {total:,} that are not finite" if left_out else ""
    mean = with_minus(f"mean {finite.mean():.1f} nats{rest}")
    ax.axvline(finite.mean(), color=MISSING, lw=1.5, label=mean)
    ax.set(title="log p(x) of each datum", xlabel="log p(x) (nats)", ylabel="number of data")
    ax.legend(loc="upper left")
    tidy_axes(ax)


def tidy_axes(ax: Axes) -> None:
    """A light grid, and no box."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)


def as_numpy(x: Tensor) -> np.ndarray:
    """A float64 array of a tensor."""
    return x.detach().cpu().double().numpy()


def with_minus(text: str) -> str:
    """With a minus sign as on the axes, not a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")
