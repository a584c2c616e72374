"""The posterior of one datum beside the guide's: what shape q misses."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.evidence import Posterior
from pyrovae.plotting.images import Limits, as_canvas, grey_limits, is_image
from pyrovae.plotting.panels import BLUE, ORANGE, as_numpy, some_rows, tidy_axes, with_minus
from pyrovae.vae import VAE

MASSES = (0.9, 0.5)
"""Of a distribution, inside its contours."""

GRID = 80
"""Places along an axis at which a density is estimated."""

SHOWN = 1500
"""Draws shown as points."""

DECODED = 500
"""Draws whose reconstructions are averaged."""


def posterior(
    found: Posterior, index: int = 0, num: int = 4, vae: VAE | None = None, x: Tensor | None = None
) -> Figure:
    """Marginals and pairs of the latents in which guide and posterior differ most.

    Points are draws from the posterior, contours hold half and nine tenths of either distribution.
    A latent differs by how far its sorted draws are from the guide's, in posterior standard
    deviations, and by correlations that only one of the two has.

    Args:
        found: Draws from posterior and guide.
        index: Which of its data.
        num: Latents to show, at most.
        vae: The model, for reconstructions by both; None leaves them out.
        x: The data that were drawn for, shape `(N, *shape)`; images are shown.

    Raises:
        ValueError: If there is no such datum, or `num` is less than one.
    """
    count = len(found.acceptance)
    if not 0 <= index < count:
        raise ValueError(f"index must be from 0 to {count - 1}, got {index}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    drawn, guided = (as_numpy(v) for v in found.vectors(index))
    chosen = most_different(drawn, guided, num)
    images = {} if x is None or not is_image(x.shape[1:]) else _images(found, index, vae, x)
    rows, columns = len(chosen), max(len(chosen), 1 + len(images))
    size = max(4.5, 2.1 * columns), 2.0 * rows + 1.2
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = dict(np.ndenumerate(figure.subplots(rows, columns, squeeze=False)))
    for (i, j), ax in axes.items():
        if j < i:
            _pair(ax, *(of[:, [chosen[j], chosen[i]]] for of in (drawn, guided)))
        elif j == i:
            _marginal(ax, drawn[:, chosen[i]], guided[:, chosen[i]])
        elif i or j > len(images):
            ax.remove()
    for j, (title, image) in enumerate(images.items(), 1):
        _image(axes[0, j], image, title, grey_limits(images["datum"]))
    _label(axes, [found.names[d] for d in chosen])
    _legend(figure)
    figure.suptitle(_title(found, index, len(chosen)))
    return figure


def most_different(drawn: np.ndarray, guided: np.ndarray, num: int) -> list[int]:
    """Latents in which two samples `(draws, D)` differ most, beginning with the first two.

    The distance of two latents' marginals is Wasserstein's, in standard deviations of the first
    sample; that of a pair is how far apart its correlations are.
    """
    spread = np.maximum(drawn.std(0), 1e-12)
    alone = np.abs(np.sort(drawn, 0) - np.sort(guided, 0)).mean(0) / spread
    pairs = np.abs(_correlations(drawn) - _correlations(guided))
    score = alone + pairs.max(0)
    chosen = [int(score.argmax())]
    while len(chosen) < min(num, len(score)):
        score = alone + pairs[chosen].max(0)
        score[chosen] = -np.inf
        chosen.append(int(score.argmax()))
    return chosen


def _correlations(draws: np.ndarray) -> np.ndarray:
    """Between latents, zero on the diagonal and where one never changes."""
    centred = draws - draws.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    found = unit.T @ unit
    np.fill_diagonal(found, 0.0)
    return found


def _images(found: Posterior, index: int, vae: VAE | None, x: Tensor) -> dict[str, Tensor]:
    """The datum, and the mean of p(x|z) over draws from the guide and from the posterior."""
    images = {"datum": x[index]}
    site = next((name for name in ("z", "z1") if name in found.samples), None)
    if vae is None or site is None:
        return images
    like = next(vae.parameters())
    for source, sites in {"q(z|x)": found.guide, "p(z|x)": found.samples}.items():
        z = some_rows(sites[site][:, :, index].flatten(0, 1), DECODED)
        images[f"mean of p(x|z)\nunder {source}"] = vae.decode(z.to(like)).mean(0)
    return images


def _image(ax: Axes, image: Tensor, title: str, limits: Limits) -> None:
    ax.imshow(as_canvas(image[None, None], limits, 0))
    ax.set_title(title, size=10)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _marginal(ax: Axes, drawn: np.ndarray, guided: np.ndarray) -> None:
    edges = np.histogram_bin_edges(drawn, 30, _limits(drawn, guided)).tolist()
    ax.hist(drawn, edges, density=True, color=BLUE, alpha=0.5)
    ax.hist(guided, edges, density=True, color=ORANGE, histtype="step", lw=1.5)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_yticks([])
    tidy_axes(ax)


def _pair(ax: Axes, drawn: np.ndarray, guided: np.ndarray) -> None:
    """Two latents `(draws, 2)`: points of the posterior, contours of both."""
    limits = [_limits(drawn[:, i], guided[:, i]) for i in range(2)]
    points = drawn[np.linspace(0, len(drawn) - 1, min(SHOWN, len(drawn))).astype(int)]
    ax.scatter(points[:, 0], points[:, 1], s=3, alpha=0.25, color=BLUE, linewidths=0)
    across, up = (np.linspace(*limit, GRID) for limit in limits)
    for draws, colour in ((drawn, BLUE), (guided, ORANGE)):
        density = _density(draws, across, up)
        levels = _levels(density)
        if levels[0] < levels[-1]:
            ax.contour(across, up, density, levels, colors=colour, linewidths=[1, 1.8])
    ax.set(xlim=limits[0], ylim=limits[1])
    tidy_axes(ax)


def _density(draws: np.ndarray, across: np.ndarray, up: np.ndarray) -> np.ndarray:
    """A kernel estimate on a grid, shape `(up, across)`."""
    quartiles = np.quantile(draws, [0.25, 0.75], axis=0)
    spread = np.minimum(draws.std(0), (quartiles[1] - quartiles[0]) / 1.35)
    width = 1.2 * np.maximum(spread, 1e-12) * len(draws) ** (-1 / 6)
    kernels = [
        np.exp(-0.5 * ((draws[:, i, None] - places) / width[i]) ** 2)
        for i, places in enumerate((across, up))
    ]
    return kernels[1].T @ kernels[0]


def _levels(density: np.ndarray) -> list[float]:
    """The heights above which are 90 and 50 % of the mass."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = ordered.cumsum() / max(ordered.sum(), 1e-300)
    return [float(ordered[mass <= inside].min(initial=ordered[0])) for inside in MASSES]


def _limits(drawn: np.ndarray, guided: np.ndarray) -> Limits:
    """What holds all but the outermost thousandths of both, with a little room."""
    low = min(np.quantile(v, 0.001) for v in (drawn, guided))
    high = max(np.quantile(v, 0.999) for v in (drawn, guided))
    room = 0.05 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _label(axes: dict[tuple[int, ...], Axes], names: list[str]) -> None:
    """Names and numbers at the left and at the bottom."""
    last = len(names) - 1
    for j, i in combinations_with_replacement(range(len(names)), 2):
        axes[i, j].xaxis.set_major_locator(MaxNLocator(3))
        axes[i, j].tick_params(labelbottom=i == last, labelleft=j == 0)
        axes[i, j].set_xlabel(names[j] if i == last else "")
        axes[i, j].set_ylabel(names[i] if j == 0 else "")
    axes[0, 0].set_ylabel("density")


def _legend(figure: Figure) -> None:
    figure.legend(
        handles=[
            Patch(color=BLUE, alpha=0.5, label="posterior p(z|x), by HMC"),
            Line2D([], [], color=ORANGE, lw=1.8, label="guide q(z|x)"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )


def _title(found: Posterior, index: int, shown: int) -> str:
    total = len(found.names)
    which = f", in the {shown} of {total} latents that differ most" if shown < total else ""
    verdict = "converged" if found.converged[index] else "not converged"
    return with_minus(
        f"Posterior and guide of one datum{which}\n"
        f"R\N{NON-BREAKING HYPHEN}hat at most {float(found.max_rhat[index]):.3f}, effective "
        f"sample size at least {float(found.min_ess[index]):,.0f}: {verdict}"
    )
