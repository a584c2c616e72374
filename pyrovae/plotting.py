"""Pictures of a trained VAE: what it sees, what it makes, and how sure it is.

Every function returns a `matplotlib.figure.Figure`; `figure.savefig("name.png")` writes it. Images
have shape `(C, H, W)` with one or three channels; data of any other shape are drawn entry by entry.
No picture changes the model, its mode or the random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

from pyrovae.program import undisturbed
from pyrovae.vae import VAE

__all__ = [
    "figures",
    "interpolations",
    "latent_space",
    "log_px_histogram",
    "manifold",
    "reconstructions",
    "samples",
    "training_curves",
]

# Told apart by colour-blind readers: Okabe and Ito's for lines, Tol's "muted" for classes.
BLUE, ORANGE, MISSING, GREY = "#0072B2", "#E69F00", "#D55E00", "#777777"
TEN = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#777777"),
)
MAX_CLASSES, MAX_ENTRIES = 20, 12

Limits = tuple[float, float]


def reconstructions(vae: VAE, x: Tensor, num: int = 10) -> Figure:
    """Data beside the mean of p(x|z) at the mean of q(z|x).

    Images in two rows, missing entries in orange. Other data entry by entry, each a scatter of
    reconstructed against observed values with its R^2, for up to 1,000 data and 12 entries.

    Args:
        vae: The model.
        x: Data, shape `(n, *shape)`, NaN where missing.
        num: Images to show, spread evenly over x.
    """
    x = _some(x, num if _is_image(x.shape[1:]) else 1000)
    again = vae.reconstruct(x)
    if not _is_image(x.shape[1:]):
        return _scatter_entries(x.flatten(1), again.flatten(1))
    figure, ax, (_, down) = _picture(
        torch.stack([x, again]), _limits(x), "Data and reconstructions"
    )
    ax.set_yticks(down, ["data", "reconstruction"])
    _explain_missing(ax, x)
    return figure


def samples(
    vae: VAE, rows: int = 8, columns: int = 8, x: Tensor | None = None, seed: int = 0
) -> Figure:
    """What the model makes up: z from the prior, then p(x|z).

    For images the means of p(x|z), without pixel noise; for other data the marginal of up to 12
    entries over 2,000 draws of x, noise included, so that data and samples can be compared.

    Args:
        vae: The model.
        rows: Images from top to bottom.
        columns: Images from left to right.
        x: Data, shape `(n, *shape)`, for their grey levels or their marginals.
        seed: Of the draws.
    """
    with undisturbed(vae):
        torch.manual_seed(seed)
        drawn = vae.sample(rows * columns, mean=True)
        if not _is_image(drawn.shape[1:]):
            drawn = vae.sample(2000)
            return _histogram_entries(drawn.flatten(1), None if x is None else x.flatten(1))
    title = "Samples: means of p(x|z), z from the prior"
    grid = drawn.unflatten(0, (rows, columns))
    return _picture(grid, _limits(drawn if x is None else x), title)[0]


def latent_space(vae: VAE, x: Tensor, y: Tensor | None = None, max_points: int = 5000) -> Figure:
    """Where the data lie in the latent space: the mean of q(z|x) of each.

    One latent is drawn as a histogram, two as they are, more as their first two principal
    components.

    Args:
        vae: The model.
        x: Data, shape `(n, *shape)`.
        y: A label of each, shape `(n,)`: up to 20 values get a colour each, more a colour bar.
        max_points: Data to show, spread evenly over x.

    Raises:
        ValueError: If y is not as long as x.
    """
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must be as long as x, {len(x)}, got {len(y)}")
    shown = _some(x, max_points)
    y = None if y is None else _some(y, max_points).detach().cpu()
    z = _numpy(torch.cat([vae.encode(batch) for batch in shown.split(500)]))
    figure = Figure(figsize=(6.5, 5.5), dpi=150, layout="constrained")
    ax = figure.subplots()
    of = f" of {len(x):,}" if len(shown) < len(x) else ""
    ax.set_title(f"Posterior means (n = {len(shown):,}{of})")
    if z.shape[1] == 1:
        _histogram_by_label(ax, z[:, 0], y)
        return figure
    names = ["z1", "z2"]
    if z.shape[1] > 2:
        z, shares = _principal_components(z)
        names = [f"PC {i} ({share:.0%} of variance)" for i, share in enumerate(shares, 1)]
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.set_aspect("equal", adjustable="datalim")
    _scatter_by_label(ax, z, y)
    figure.draw_without_rendering()  # equal aspects move the limits: tick labels need new room
    return figure


def manifold(vae: VAE, size: int = 15) -> Figure:
    """The plane of a two-dimensional latent space, decoded.

    Means of p(x|z) for z at the standard normal's quantiles from 2.5 % to 97.5 %, z1 rightwards and
    z2 upwards.

    Args:
        vae: A model with two latents whose data are images.
        size: Images from left to right, and from top to bottom.

    Raises:
        ValueError: If `size` is less than two, there are not two latents, or data are not images.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114, Figure 4
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    latents = vae.prior().event_shape
    if tuple(latents) != (2,):
        raise ValueError(f"a manifold needs 2 latents, the model has {latents.numel()}")
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.025, 0.975, size))
    grid = torch.cartesian_prod(z.flip(0), z).flip(-1)
    images = vae.decode(grid.to(next(vae.parameters())))
    if not _is_image(images.shape[1:]):
        raise ValueError(f"a manifold needs images, the data have shape {tuple(images.shape[1:])}")
    title = "Means of p(x|z) over the latent space"
    square = images.unflatten(0, (size, size))
    figure, ax, (across, down) = _picture(square, _limits(images), title, gap=0)
    every = math.ceil(size / 8)
    labels = [_minus(f"{value:.2f}") for value in z[::every].tolist()]
    ax.set_xticks(across[::every], labels)
    ax.set_yticks(down[::-1][::every], labels)
    ax.set(xlabel="z1", ylabel="z2")
    ax.tick_params(length=3)
    return figure


def interpolations(vae: VAE, start: Tensor, end: Tensor, steps: int = 10) -> Figure:
    """Straight paths between two codes, decoded; the data themselves framed at both ends.

    Args:
        vae: A model whose data are images.
        start: Data, shape `(n, C, H, W)`.
        end: Data, shape `(n, C, H, W)`.
        steps: Points of each path, both ends included.

    Raises:
        ValueError: If data are not images, or `start` and `end` differ in shape.
    """
    if not _is_image(start.shape[1:]):
        raise ValueError(f"interpolations need images, got shape {tuple(start.shape[1:])}")
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must have one shape, got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    path = vae.interpolate(start, end, steps)
    grid = torch.cat([start[None], path, end[None]]).transpose(0, 1)
    both = torch.cat([start, end])
    figure, ax, (across, down) = _picture(
        grid, _limits(both), "Paths between two data through the latent space"
    )
    shares = [f"{share:.2f}" for share in torch.linspace(0, 1, steps).tolist()]
    ax.set_xticks(across, ["start", *shares, "end"])
    ax.set_xlabel("share of the end's code")
    for middle in product(across[[0, -1]], down):
        _frame(ax, middle, start.shape[2:])
    _explain_missing(ax, both)
    return figure


def training_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """ELBO, reconstruction and KL after each epoch, in nats per datum.

    Axes are fitted to what follows the first tenth of the epochs. Epochs in which `kl_weight` is
    below one are shaded.

    Args:
        history: One dictionary per epoch, with `epoch` and any of `elbo`, `valid_elbo`,
            `reconstruction`, `kl`, `kl_weight`.

    Raises:
        ValueError: If it is empty or holds none of these curves.
    """
    panels: dict[str, dict[str, str]] = {
        "ELBO": {"elbo": "training", "valid_elbo": "validation"},
        "Reconstruction, E log p(x|z)": {"reconstruction": "training"},
        "KL(q(z|x) || p(z))": {"kl": "training"},
    }
    curves = {title: _curves(history, keys) for title, keys in panels.items()}
    curves = {title: found for title, found in curves.items() if found}
    if not curves:
        raise ValueError("history holds no curve: expected one dictionary per epoch with 'elbo'")
    figure = Figure(figsize=(3.3 * max(len(curves), 1.5), 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, found) in zip(axes, curves.items(), strict=True):
        for (label, points), colour in zip(found.items(), (BLUE, ORANGE), strict=False):
            marker = "o" if len(points) < 20 else None
            ax.plot(*points.T, color=colour, label=label, marker=marker, markersize=3)
        _fit(ax, list(found.values()))
        _shade_warm_up(ax, history)
        ax.set(title=title, xlabel="epoch", ylabel="nats per datum")
        _tidy(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def log_px_histogram(values: Tensor, x: Tensor | None = None, num: int = 8) -> Figure:
    """How log p(x) spreads over the data, and which data are least and most likely.

    Args:
        values: log p(x) of each datum in nats, shape `(n,)`; what is not finite is left out of the
            histogram and its mean, and counted.
        x: The data, shape `(n, *shape)`; images are shown.
        num: Least and most likely images to show.

    Raises:
        ValueError: If no value is finite, or x is not as long as `values`.
    """
    values = values.detach().cpu().double()
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"values must hold a finite log p(x), got none among {len(values)}")
    if x is not None and len(x) != len(values):
        raise ValueError(f"x must be as long as values, {len(values)}, got {len(x)}")
    extremes, heights = {}, [3.5]
    if x is not None and _is_image(x.shape[1:]) and num > 0:
        extremes = _extremes(values, num)
        heights += [min(0.8 * x.shape[2] / x.shape[3], 1.6) + 0.6] * len(extremes)
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    ax, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _histogram_of(ax, finite.numpy(), len(values))
    for row, (title, index) in zip(below, extremes.items(), strict=True):
        assert x is not None
        chosen = x[index.to(x.device)]
        across, _ = _show(row, chosen[None], _limits(x), title)
        row.set_xticks(across, [_minus(f"{value:.1f}") for value in values[index].tolist()])
        row.set_xlabel("log p(x) (nats)")
    return figure


def figures(
    vae: VAE,
    x: Tensor,
    y: Tensor | None = None,
    history: Sequence[dict[str, Any]] | None = None,
    log_px_values: Tensor | None = None,
) -> dict[str, Figure]:
    """Every picture that this model and these data allow, by name.

    Args:
        vae: The model.
        x: Data, shape `(n, *shape)`.
        y: Their labels, shape `(n,)`.
        history: What training returned, one dictionary per epoch.
        log_px_values: log p(x) of each of x in nats, shape `(n,)`.
    """
    made = {
        "reconstructions": reconstructions(vae, x),
        "samples": samples(vae, x=x),
        "latent_space": latent_space(vae, x, y),
    }
    if _is_image(x.shape[1:]):
        if tuple(vae.prior().event_shape) == (2,):
            made["manifold"] = manifold(vae)
        if len(x) > 1:
            start, end = _some(x, 2 * min(6, len(x) // 2)).chunk(2)
            made["interpolations"] = interpolations(vae, start, end)
    if history:
        made["training_curves"] = training_curves(history)
    if log_px_values is not None and log_px_values.isfinite().any():
        made["log_px"] = log_px_histogram(log_px_values, x)
    return made


def _is_image(shape: torch.Size) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3)


def _some(x: Tensor, num: int) -> Tensor:
    """At most `num` rows, spread evenly."""
    if not len(x) or num < 1:
        raise ValueError(f"expected at least one datum to show, got {len(x)} and room for {num}")
    return x[torch.linspace(0, len(x) - 1, min(num, len(x)), dtype=torch.double).round().long()]


def _limits(x: Tensor) -> Limits:
    """What is drawn black and white: 0 and 1, or else the range of the data."""
    seen = x[x.isfinite()]
    low, high = (seen.min().item(), seen.max().item()) if len(seen) else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, (high if high > low else low + 1)


def _picture(
    images: Tensor, limits: Limits, title: str, gap: int | None = None
) -> tuple[Figure, Axes, tuple[np.ndarray, np.ndarray]]:
    """A figure of a grid of images, and where the middles of its columns and rows are."""
    rows, columns, _, height, width = images.shape
    gap = max(1, height // 20) if gap is None else gap
    wide, tall = columns * (width + gap), rows * (height + gap)
    inch = min(8.4 / wide, 8.4 / tall, 0.9 / max(height, width))
    size = max(4.5, wide * inch + 1.5), tall * inch + 0.5
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    ax = figure.subplots()
    return figure, ax, _show(ax, images, limits, title, gap)


def _show(
    ax: Axes, images: Tensor, limits: Limits, title: str, gap: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a grid of images; the middles of its columns and rows in pixels."""
    rows, columns, _, height, width = images.shape
    ax.imshow(_canvas(images, limits, gap))
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    across = np.arange(columns) * (width + gap) + (width - 1) / 2
    down = np.arange(rows) * (height + gap) + (height - 1) / 2
    return across, down


def _canvas(images: Tensor, limits: Limits, gap: int) -> np.ndarray:
    """A grid of images `(rows, columns, C, H, W)` as one RGB picture, NaN in the missing colour."""
    low, high = limits
    scaled = ((images.detach().cpu().double() - low) / (high - low)).clamp(0, 1)
    rgb = scaled.expand(-1, -1, 3, -1, -1).movedim(2, -1)
    missing = torch.tensor(to_rgb(MISSING), dtype=rgb.dtype)
    rgb = torch.where(rgb.isnan().any(-1, keepdim=True), missing, rgb)
    tiles = pad(rgb, (0, 0, 0, gap, 0, gap), value=1.0)
    canvas = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return canvas[: len(canvas) - gap, : canvas.shape[1] - gap].numpy()


def _frame(ax: Axes, middle: tuple[float, float], size: Sequence[int]) -> None:
    height, width = size
    corner = middle[0] - width / 2, middle[1] - height / 2
    ax.add_patch(Rectangle(corner, width, height, fill=False, color=BLUE, lw=1.5, clip_on=False))


def _explain_missing(ax: Axes, x: Tensor) -> None:
    if x.isnan().any():
        patch = Patch(color=MISSING, label="missing")
        ax.legend(handles=[patch], loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _entry_panels(entries: int) -> tuple[Figure, dict[int, Axes]]:
    """A panel for each of up to 12 entries of a datum, spread evenly over them."""
    index = _some(torch.arange(entries), MAX_ENTRIES).tolist()
    columns = min(4, len(index))
    rows = math.ceil(len(index) / columns)
    size = max(4.5, 2.4 * columns), max(3.2, 2.2 * rows + 0.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(index) :]:
        ax.remove()
    return figure, dict(zip(index, axes, strict=False))


def _scatter_entries(x: Tensor, again: Tensor) -> Figure:
    """Reconstructed against observed values of each entry, for x and again `(n, entries)`."""
    figure, panels = _entry_panels(x.shape[1])
    for i, ax in panels.items():
        seen = ~x[:, i].isnan()
        observed, made = _numpy(x[seen, i]), _numpy(again[seen, i])
        ax.scatter(observed, made, s=8, alpha=0.5, color=BLUE, linewidths=0)
        ax.set_aspect("equal", adjustable="datalim")
        ax.axline((0, 0), slope=1, color=GREY, lw=1, ls="--")
        spread = np.square(observed - observed.mean()).sum() if len(observed) else 0.0
        fit = 1 - np.square(observed - made).sum() / spread if spread > 0 else math.nan
        ax.set_title(_minus(f"x[{i}]   $R^2$ = {fit:.2f}") if spread > 0 else f"x[{i}]", size=10)
        _tidy(ax)
    figure.suptitle("Reconstructions of the observed entries")
    figure.supxlabel("observed", size=10)
    figure.supylabel("mean of p(x|z)", size=10)
    return figure


def _histogram_entries(drawn: Tensor, x: Tensor | None) -> Figure:
    """Marginals of samples, and of data, both `(n, entries)`."""
    figure, panels = _entry_panels(drawn.shape[1])
    for i, ax in panels.items():
        made = _numpy(drawn[:, i])
        seen = made[:0] if x is None else _numpy(x[~x[:, i].isnan(), i])
        edges = _edges(made, seen)
        made, seen = (values.clip(edges[0], edges[-1]) for values in (made, seen))
        if len(seen):
            ax.hist(seen, edges, density=True, color=ORANGE, alpha=0.6, label="data")
        ax.hist(made, edges, density=True, color=BLUE, histtype="step", lw=1.5, label="samples")
        ax.set_title(f"x[{i}]", size=10)
        _tidy(ax)
    for ax in [*panels.values()][-4:]:
        ax.set_xlabel("value")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Marginals of samples from the model" + ("" if x is None else " and of data"))
    figure.supylabel("density", size=10)
    return figure


def _edges(drawn: np.ndarray, data: np.ndarray) -> list[float]:
    """Bins over all but the outermost thousandths of both; one per value for a few integers."""
    both = [values for values in (drawn, data) if len(values)]
    low, high = (pick(np.quantile(v, q) for v in both) for pick, q in ((min, 0.001), (max, 0.999)))
    if all((v == np.round(v)).all() for v in both) and high - low <= 40:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1).tolist()
    bins = round(2 * len(both[-1]) ** (1 / 3))
    return np.histogram_bin_edges(both[-1], min(max(bins, 8), 30), (low, high)).tolist()


def _histogram_by_label(ax: Axes, z: np.ndarray, y: Tensor | None) -> None:
    """One latent of shape `(n,)`: bars stacked by label, or points where labels are many."""
    ax.set_xlabel("z1")
    _tidy(ax)
    if y is not None and len(y.unique()) > MAX_CLASSES:
        ax.scatter(z, _numpy(y), s=8, alpha=0.6, color=BLUE, linewidths=0)
        ax.set_ylabel("label y")
        return
    edges = np.histogram_bin_edges(z, 40)
    bottom = np.zeros(40)
    for i, (label, rows) in enumerate(_classes(y, len(z)).items()):
        counts, _ = np.histogram(z[rows], edges)
        hatch = "///" if i > 9 else None
        bars: dict[str, Any] = {
            "bottom": bottom,
            "align": "edge",
            "color": _colour(i, y),
            "hatch": hatch,
        }
        ax.bar(edges[:-1], counts, np.diff(edges), label=label, **bars)
        bottom = bottom + counts
    ax.set_ylabel("number of data")
    _label_legend(ax, y)


def _scatter_by_label(ax: Axes, z: np.ndarray, y: Tensor | None) -> None:
    """Points `(n, 2)`, each label in its colour and written at its median."""
    style: dict[str, Any] = {"s": np.clip(20000 / len(z), 7, 30), "alpha": 0.8, "linewidths": 0}
    if y is not None and len(y.unique()) > MAX_CLASSES:
        points = ax.scatter(z[:, 0], z[:, 1], c=_numpy(y), cmap="viridis", **style)
        bar = ax.figure.colorbar(ScalarMappable(points.norm, points.cmap), ax=ax)
        bar.set_label("label y")
        return
    for i, (label, rows) in enumerate(_classes(y, len(z)).items()):
        marker = "^" if i > 9 else "o"
        ax.scatter(*z[rows].T, color=_colour(i, y), label=label, marker=marker, **style)
        if y is not None:
            across, up = np.median(z[rows], 0)
            name = ax.text(across, up, label, weight="bold", ha="center", va="bottom")
            name.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    _label_legend(ax, y)


def _classes(y: Tensor | None, num: int) -> dict[str, np.ndarray]:
    """Which of `num` rows have each label; all, if there are no labels."""
    if y is None:
        return {"": np.full(num, True)}
    return {str(label.item()): (y == label).numpy() for label in y.unique()}


def _colour(i: int, y: Tensor | None) -> str:
    return BLUE if y is None else TEN[i % len(TEN)]


def _label_legend(ax: Axes, y: Tensor | None) -> None:
    if y is None:
        return
    legend = ax.legend(title="label y", loc="upper left", bbox_to_anchor=(1.01, 1))
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set(sizes=[36], alpha=1)


def _principal_components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of `(n, d)`, and each one's share of the variance."""
    centred = z - z.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, [-1, -2]]
    axes = axes * np.sign(axes.sum(0))  # an eigenvector's sign is arbitrary: always take the same
    shares = variances[[-1, -2]].clip(0) / max(variances.sum(), 1e-300)
    return centred @ axes, shares


def _curves(history: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Points `(epoch, value)` of each curve that history holds, by its name in the legend."""
    found = {}
    for key, name in names.items():
        rows = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        points = np.array(rows, dtype=float).reshape(-1, 2)
        if np.isfinite(points[:, 1]).any():
            found[name] = points[np.isfinite(points[:, 1])]
    return found


def _fit(ax: Axes, curves: list[np.ndarray]) -> None:
    """Limits that hold all but the first tenth of the epochs, at least one."""
    late = np.concatenate([c[max(1, len(c) // 10) if len(c) > 3 else 0 :, 1] for c in curves])
    room = 0.06 * (late.max() - late.min()) or 0.5
    ax.set_ylim(late.min() - room, late.max() + room)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _shade_warm_up(ax: Axes, history: Sequence[dict[str, Any]]) -> None:
    weights = _curves(history, {"kl_weight": "weight"}).get("weight", np.ones((1, 2)))
    warm = weights[weights[:, 1] < 1, 0]
    if len(warm):
        first, last = warm.min() - 0.5, warm.max() + 0.5
        ax.axvspan(first, last, color=GREY, alpha=0.15, lw=0, label="KL weight < 1")


def _extremes(values: Tensor, num: int) -> dict[str, Tensor]:
    """Indices of the least and the most likely data, never the same datum twice."""
    order = values.nan_to_num(nan=-math.inf, neginf=-math.inf).argsort(stable=True)
    num = min(num, max(1, len(order) // 2))
    rows = {"Least likely": order[:num], "Most likely": order.flip(0)[:num]}
    return rows if len(order) > 1 else {"The datum": order}


def _histogram_of(ax: Axes, finite: np.ndarray, total: int) -> None:
    ax.hist(finite, min(60, max(10, math.isqrt(len(finite)))), color=BLUE, alpha=0.75)
    left_out = total - len(finite)
    rest = f"\nwithout {left_out:,} of {total:,} that are not finite" if left_out else ""
    mean = _minus(f"mean {finite.mean():.1f} nats{rest}")
    ax.axvline(finite.mean(), color=MISSING, lw=1.5, label=mean)
    ax.set(title="log p(x) of each datum", xlabel="log p(x) (nats)", ylabel="number of data")
    ax.legend(loc="upper left")
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _minus(text: str) -> str:
    """With a minus sign as on the axes, not a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")
