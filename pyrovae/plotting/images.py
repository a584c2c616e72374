"""Grids of images, drawn as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.nn.functional import pad

from pyrovae.plotting.panels import BLUE, MISSING

Limits = tuple[float, float]


def is_image(shape: torch.Size) -> bool:
    """Whether data of this shape are images, grey or in colour."""
    return len(shape) == 3 and shape[0] in (1, 3)


def grey_limits(x: Tensor) -> Limits:
    """What is drawn black and white: 0 and 1, or else the range of the data."""
    seen = x[x.isfinite()]
    low, high = (seen.min().item(), seen.max().item()) if len(seen) else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, (high if high > low else low + 1)


def grid_figure(
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
    return figure, ax, show_grid(ax, images, limits, title, gap)


def show_grid(
    ax: Axes, images: Tensor, limits: Limits, title: str, gap: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a grid of images; the middles of its columns and rows in pixels."""
    rows, columns, _, height, width = images.shape
    ax.imshow(as_canvas(images, limits, gap))
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    across = np.arange(columns) * (width + gap) + (width - 1) / 2
    down = np.arange(rows) * (height + gap) + (height - 1) / 2
    return across, down


def as_canvas(images: Tensor, limits: Limits, gap: int) -> np.ndarray:
    """A grid of images `(rows, columns, C, H, W)` as one RGB picture, NaN in the missing colour."""
    low, high = limits
    scaled = ((images.detach().cpu().double() - low) / (high - low)).clamp(0, 1)
    rgb = scaled.expand(-1, -1, 3, -1, -1).movedim(2, -1)
    missing = torch.tensor(to_rgb(MISSING), dtype=rgb.dtype)
    rgb = torch.where(rgb.isnan().any(-1, keepdim=True), missing, rgb)
    tiles = pad(rgb, (0, 0, 0, gap, 0, gap), value=1.0)
    canvas = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return canvas[: len(canvas) - gap, : canvas.shape[1] - gap].numpy()


def draw_frame(ax: Axes, middle: tuple[float, float], size: Sequence[int]) -> None:
    """A frame around the image of this middle, `size` its height and width."""
    height, width = size
    corner = middle[0] - width / 2, middle[1] - height / 2
    ax.add_patch(Rectangle(corner, width, height, fill=False, color=BLUE, lw=1.5, clip_on=False))


def explain_missing(ax: Axes, x: Tensor) -> None:
    """A legend of the missing colour, where x has missing entries."""
    if x.isnan().any():
        patch = Patch(color=MISSING, label="missing")
        ax.legend(handles=[patch], loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
