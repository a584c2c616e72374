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

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.conditional import ConditionalVAE
from pyrovae.plotting.images import (
    draw_frame,
    explain_missing,
    grey_limits,
    grid_figure,
    is_image,
    show_grid,
)
from pyrovae.plotting.labels import analogies, label_name, styles
from pyrovae.plotting.panels import (
    BLUE,
    ORANGE,
    as_numpy,
    curve_points,
    fit_limits,
    histogram,
    histogram_by_label,
    histogram_entries,
    least_and_most,
    principal_components,
    scatter_by_label,
    scatter_entries,
    shade_warm_up,
    some_rows,
    tidy_axes,
    with_minus,
)
from pyrovae.plotting.posterior import posterior
from pyrovae.program import undisturbed
from pyrovae.vae import VAE, Base

__all__ = [
    "analogies",
    "figures",
    "interpolations",
    "latent_space",
    "log_px_histogram",
    "manifold",
    "posterior",
    "reconstructions",
    "samples",
    "styles",
    "training_curves",
]


def reconstructions(vae: Base, x: Tensor, num: int = 10, y: Tensor | None = None) -> Figure:
    """Data beside the mean of p(x|z) at the mean of q(z|x).

    Images in two rows, missing entries in orange. Other data entry by entry, each a scatter of
    reconstructed against observed values with its R^2, for up to 1,000 data and 12 entries.

    Args:
        vae: The model.
        x: Data, shape `(n, *shape)`, NaN where missing.
        num: Images to show, spread evenly over x.
        y: Their labels, for a model that takes them.
    """
    shown = num if is_image(x.shape[1:]) else 1000
    labels = _given_labels(vae, y, shown)
    x = some_rows(x, shown)
    again = vae.reconstruct(x, *labels)
    if not is_image(x.shape[1:]):
        return scatter_entries(x.flatten(1), again.flatten(1))
    figure, ax, (_, down) = grid_figure(
        torch.stack([x, again]), grey_limits(x), "Data and reconstructions"
    )
    ax.set_yticks(down, ["data", "reconstruction"])
    explain_missing(ax, x)
    return figure


def samples(
    vae: Base, rows: int = 8, columns: int = 8, x: Tensor | None = None, seed: int = 0
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
        if not is_image(drawn.shape[1:]):
            drawn = vae.sample(2000)
            return histogram_entries(drawn.flatten(1), None if x is None else x.flatten(1))
    title = "Samples: means of p(x|z), z from the prior"
    grid = drawn.unflatten(0, (rows, columns))
    return grid_figure(grid, grey_limits(drawn if x is None else x), title)[0]


def latent_space(vae: Base, x: Tensor, y: Tensor | None = None, max_points: int = 5000) -> Figure:
    """Where the data lie in the latent space: the mean of q(z|x) of each.

    One latent is drawn as a histogram, two as they are, more as their first two principal
    components.

    Args:
        vae: The model.
        x: Data, shape `(n, *shape)`.
        y: A label of each, shape `(n,)`: up to 20 values get a colour each, more a colour bar. Of a
            vector its first entry.
        max_points: Data to show, spread evenly over x.

    Raises:
        ValueError: If y is not as long as x.
    """
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must be as long as x, {len(x)}, got {len(y)}")
    shown, labels = some_rows(x, max_points), _given_labels(vae, y, max_points)
    y = None if y is None else some_rows(y, max_points).detach().cpu()
    y = y[:, 0] if y is not None and y.dim() > 1 else y
    batches = zip(*(t.split(500) for t in (shown, *labels)), strict=True)
    z = as_numpy(torch.cat([vae.encode(*batch) for batch in batches]))
    figure = Figure(figsize=(6.5, 5.5), dpi=150, layout="constrained")
    ax = figure.subplots()
    of = f" of {len(x):,}" if len(shown) < len(x) else ""
    ax.set_title(f"Posterior means (n = {len(shown):,}{of})")
    if z.shape[1] == 1:
        histogram_by_label(ax, z[:, 0], y)
        return figure
    names = ["z1", "z2"]
    if z.shape[1] > 2:
        z, shares = principal_components(z)
        names = [f"PC {i} ({share:.0%} of variance)" for i, share in enumerate(shares, 1)]
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.set_aspect("equal", adjustable="datalim")
    scatter_by_label(ax, z, y)
    figure.draw_without_rendering()  # equal aspects move the limits: tick labels need new room
    return figure


def manifold(
    vae: Base, size: int = 15, bound: float | None = None, y: Tensor | None = None
) -> Figure:
    """The plane of a two-dimensional latent space, decoded.

    Means of p(x|z) for z on a square grid, z1 rightwards and z2 upwards.

    Args:
        vae: A model with two latents whose data are images.
        size: Images from left to right, and from top to bottom.
        bound: z from -bound to bound, evenly; None takes the standard normal's quantiles from
            2.5 % to 97.5 %, so that each image stands for as many samples.
        y: The label of all, for a model that takes one: a class, or a vector.

    Raises:
        ValueError: If `size` is less than two, `bound` is not positive, there are not two latents,
            or data are not images.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114, Figure 4
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    if vae.latent_dims != (2,):
        found = " + ".join(map(str, vae.latent_dims))
        raise ValueError(f"a manifold needs 2 latents, the model has {found}")
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}")
    if bound is None:
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.025, 0.975, size))
    else:
        z = torch.linspace(-bound, bound, size)
    grid = torch.cartesian_prod(z.flip(0), z).flip(-1)
    grid = grid.to(next(vae.parameters()))
    labels = () if y is None else (y.to(grid.device).expand(len(grid), *y.shape),)
    images = vae.decode(grid, *labels)
    if not is_image(images.shape[1:]):
        raise ValueError(f"a manifold needs images, the data have shape {tuple(images.shape[1:])}")
    title = "Means of p(x|z) over the latent space"
    title += "" if y is None else f", y = {label_name(y)}"
    square = images.unflatten(0, (size, size))
    figure, ax, (across, down) = grid_figure(square, grey_limits(images), title, gap=0)
    every = math.ceil(size / 8)
    ticks = [with_minus(f"{value:.2f}") for value in z[::every].tolist()]
    ax.set_xticks(across[::every], ticks)
    ax.set_yticks(down[::-1][::every], ticks)
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
    if not is_image(start.shape[1:]):
        raise ValueError(f"interpolations need images, got shape {tuple(start.shape[1:])}")
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must have one shape, got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    path = vae.interpolate(start, end, steps)
    grid = torch.cat([start[None], path, end[None]]).transpose(0, 1)
    both = torch.cat([start, end])
    figure, ax, (across, down) = grid_figure(
        grid, grey_limits(both), "Paths between two data through the latent space"
    )
    shares = [f"{share:.2f}" for share in torch.linspace(0, 1, steps).tolist()]
    ax.set_xticks(across, ["start", *shares, "end"])
    ax.set_xlabel("share of the end's code")
    for middle in product(across[[0, -1]], down):
        draw_frame(ax, middle, start.shape[2:])
    explain_missing(ax, both)
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
    curves = {title: curve_points(history, keys) for title, keys in panels.items()}
    curves = {title: found for title, found in curves.items() if found}
    if not curves:
        raise ValueError("history holds no curve: expected one dictionary per epoch with 'elbo'")
    figure = Figure(figsize=(3.3 * max(len(curves), 1.5), 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, found) in zip(axes, curves.items(), strict=True):
        for (label, points), colour in zip(found.items(), (BLUE, ORANGE), strict=False):
            marker = "o" if len(points) < 20 else None
            ax.plot(*points.T, color=colour, label=label, marker=marker, markersize=3)
        fit_limits(ax, list(found.values()))
        shade_warm_up(ax, history)
        ax.set(title=title, xlabel="epoch", ylabel="nats per datum")
        tidy_axes(ax)
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
    if x is not None and is_image(x.shape[1:]) and num > 0:
        extremes = least_and_most(values, num)
        heights += [min(0.8 * x.shape[2] / x.shape[3], 1.6) + 0.6] * len(extremes)
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    ax, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    histogram(ax, finite.numpy(), len(values))
    for row, (title, index) in zip(below, extremes.items(), strict=True):
        assert x is not None
        chosen = x[index.to(x.device)]
        across, _ = show_grid(row, chosen[None], grey_limits(x), title)
        row.set_xticks(across, [with_minus(f"{value:.1f}") for value in values[index].tolist()])
        row.set_xlabel("log p(x) (nats)")
    return figure


def figures(
    vae: Base,
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
        "reconstructions": reconstructions(vae, x, y=y),
        "latent_space": latent_space(vae, x, y),
    }
    if isinstance(vae, ConditionalVAE):
        if is_image(x.shape[1:]):
            made["analogies"] = analogies(vae, x, y)
            if vae.num_classes:
                made["samples"] = styles(vae)
                if vae.latent_dims == (2,):
                    made["manifold"] = manifold(vae, y=torch.tensor(0))
    else:
        made["samples"] = samples(vae, x=x)
    if is_image(x.shape[1:]) and isinstance(vae, VAE):
        if vae.latent_dims == (2,):
            made["manifold"] = manifold(vae)
        if len(x) > 1:
            start, end = some_rows(x, 2 * min(6, len(x) // 2)).chunk(2)
            made["interpolations"] = interpolations(vae, start, end)
    if history:
        made["training_curves"] = training_curves(history)
    if log_px_values is not None and log_px_values.isfinite().any():
        made["log_px"] = log_px_histogram(log_px_values, x)
    return made


def _given_labels(vae: Base, y: Tensor | None, num: int) -> tuple[Tensor, ...]:
    """Labels of the data shown, for a model that takes them."""
    if y is None or not isinstance(vae, ConditionalVAE):
        return ()
    return (some_rows(y, num),)
