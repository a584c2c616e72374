"""Pictures of what a label is to a model, and what is left to z."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.conditional import ConditionalVAE
from pyrovae.plotting.images import draw_frame, explain_missing, grey_limits, grid_figure
from pyrovae.plotting.panels import some_rows, with_minus
from pyrovae.program import undisturbed


def analogies(
    vae: ConditionalVAE,
    x: Tensor,
    y: Tensor | None = None,
    labels: Tensor | None = None,
    num: int = 8,
) -> Figure:
    """The style of each image under every label; the image itself in front, framed.

    Args:
        vae: A model with a label whose data are images.
        x: Data, shape `(n, C, H, W)`.
        y: Their labels; None lets a model that learns them take the most probable.
        labels: Those to decode under; all classes if None, or of a vector those of `num` data.
        num: Images to show, spread evenly over x.

    References:
        Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014),
        arXiv:1406.5298, Figure 1
    """
    shown = some_rows(x, num)
    given = None if y is None else some_rows(y, num)
    if labels is None and vae.num_classes is None:
        labels = given
    made = vae.analogies(shown, given, labels)  # type: ignore[arg-type]
    grid = torch.cat([shown[:, None], made], 1)
    figure, ax, (across, down) = grid_figure(grid, grey_limits(shown), "One style in every class")
    ax.set_xticks(across, ["data", *label_names(labels, made.shape[1])])
    for middle in down:
        draw_frame(ax, (across[0], middle), shown.shape[2:])
    explain_missing(ax, shown)
    return figure


def styles(vae: ConditionalVAE, rows: int = 8, seed: int = 0) -> Figure:
    """One draw of z a row, decoded under every class: means of p(x|y, z).

    Args:
        vae: A model of classes whose data are images.
        rows: Draws of z from the prior, that of the first class where it depends on y.
        seed: Of the draws.

    Raises:
        ValueError: If y is a vector.
    """
    classes = _classes(vae)
    with undisturbed(vae), torch.no_grad():
        torch.manual_seed(seed)
        prior = vae.latent(vae.numbers(classes[:1]))
        z = prior.sample((rows,)).reshape(rows, 1, -1)
        images = vae.decode(z, classes.expand(rows, -1))
    title = "One draw of z a row, every class"
    figure, ax, (across, _) = grid_figure(images, grey_limits(images), title)
    ax.set_xticks(across, label_names(None, len(classes)))
    return figure


def label_names(labels: Tensor | None, count: int) -> list[str]:
    """What labels are called in a picture."""
    return [str(i) for i in range(count)] if labels is None else [label_name(y) for y in labels]


def label_name(y: Tensor) -> str:
    """What one label is called."""
    if y.dim() == 0:
        return f"{y.item():g}"
    return "\n".join(with_minus(f"{value:.1f}") for value in y[:3].tolist())


def _classes(vae: ConditionalVAE) -> Any:
    if vae.num_classes is None:
        raise ValueError("y is a vector: see analogies, under labels of your own")
    return torch.arange(vae.num_classes, device=next(vae.parameters()).device)
