"""Do unlabelled data help a classifier that sees few labels?

Question: how accurate is a simple classifier on the means of q(z|x) of a VAE that was trained
          without labels, beside the same classifier on pixels and on as many principal components,
          as labels grow from one per class to all?
Command:  python experiments/features.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 25 seconds.
Expected: a gain over pixels that is largest for few labels, as in Kingma et al. (2014), where a
          transductive SVM on a VAE's latents (M1) errs on 11.82 % of MNIST's test images with 100
          labels. Found on the digits: a gain where they are binarized, none where they are grey, as
          distances between 64 grey pixels are hard to improve on.

All features are of the same values, those that the VAE sees: binarized digits, or grey ones. Labels
are drawn with as many of each class, 20 times; a standard error is that of the mean over draws.

Writes experiments/results/features.json and .png.

References:
    M1: Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298
"""

from __future__ import annotations

import argparse
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import markdown, parser
from _training import fitted
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.runs import made_by, write_json

VIEWS = {"binarized": "", "grey": "--likelihood Normal --dequantize false"}
CLASSIFIERS = {
    "logistic regression": lambda: LogisticRegression(max_iter=1000),
    "nearest neighbour": lambda: KNeighborsClassifier(1),
}
LATENTS = 16


def features(vae: Any, train: Tensor, test: Tensor) -> dict[str, tuple[Any, Any]]:
    """Training and test rows of each kind of feature."""
    pixels = train.flatten(1).numpy(), test.flatten(1).numpy()
    components = PCA(LATENTS, random_state=0).fit(pixels[0])
    encoded = vae.encode(train).numpy(), vae.encode(test).numpy()
    projected = tuple(components.transform(rows) for rows in pixels)
    return {"VAE means": encoded, "principal components": projected, "pixels": pixels}


def balanced(y: Tensor, num_labels: int, draw: int) -> Tensor:
    """Rows of so many data, as many of each class; all rows if they are asked for."""
    if num_labels == len(y):
        return torch.arange(len(y))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(draw))
    each = [order[y[order] == label][: num_labels // 10] for label in range(10)]
    return torch.cat(each)


def accuracies(x: tuple[Any, Any], y: tuple[Tensor, Tensor], make: Any, draws: dict) -> dict:
    """Mean accuracy on the test data and its standard error, by the number of labels."""
    found = {}
    for num_labels, count in draws.items():
        scores = []
        for draw in range(count):
            rows = balanced(y[0], num_labels, draw).numpy()
            scores.append(make().fit(x[0][rows], y[0][rows]).score(x[1], y[1]))
        each = torch.tensor(scores)
        found[num_labels] = {
            "accuracy": float(each.mean()), "std_error": error_of_mean(each), "draws": count
        }  # fmt: skip
    return found


def measure(view: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of every classifier on every feature of one view."""
    epochs = 2 if asked.smoke else {"digits": 200, "mnist": 20}[asked.data]
    flags = f"--data {asked.data} --latent-dim {LATENTS} --epochs {epochs} {VIEWS[view]}"
    vae, dataset, _ = fitted(flags, asked.data_root)
    torch.manual_seed(0)
    train, test = (split[slice(None)] for split in (dataset.train, dataset.test))
    y = dataset.train.y, dataset.test.y
    draws = dict.fromkeys((10, 20, 50, 100, 200, 500), 2 if asked.smoke else 20) | {len(y[0]): 1}
    each = features(vae, train, test)
    rows = {
        name: {feature: accuracies(x, y, make, draws) for feature, x in each.items()}
        for name, make in CLASSIFIERS.items()
    }
    return {"flags": flags, "rows": rows}


def picture(found: dict[str, Any]) -> plt.Figure:
    """Accuracy by the number of labels: a column for each view, a row for each classifier."""
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.2), layout="constrained", sharex=True)
    for column, (view, measured) in zip(axes.T, found.items(), strict=True):
        for axis, (name, rows) in zip(column, measured["rows"].items(), strict=True):
            for style, (feature, row) in zip(("o-", "^:", "s--"), rows.items(), strict=True):
                values = [[one[key] for one in row.values()] for key in ("accuracy", "std_error")]
                axis.errorbar(list(row), *values, fmt=style, ms=4, label=feature)
            axis.set(xscale="log", title=f"{view}, {name}", ylabel="accuracy on test images")
        column[-1].set_xlabel("labels")
    axes[0, 0].legend(frameon=False)
    return figure


def table(found: dict[str, Any]) -> str:
    """Accuracy by the number of labels, a row for each feature."""
    lines = []
    for view, measured in found.items():
        for name, rows in measured["rows"].items():
            for feature, row in rows.items():
                cells = [f"{one['accuracy']:.3f} ± {one['std_error']:.3f}" for one in row.values()]
                cells = [cell.removesuffix(" ± nan") for cell in cells]
                lines.append([view, name, feature, *cells])
    return markdown(["view", "classifier", "features", *map(str, row)], lines)


def verdict(found: dict[str, Any]) -> str:
    """Gain of VAE means over pixels at 10 labels and at all, beside the expected."""
    lines = []
    for view, measured in found.items():
        for name, rows in measured["rows"].items():
            means, pixels = (list(rows[of].values()) for of in ("VAE means", "pixels"))
            few, every = (means[i]["accuracy"] - pixels[i]["accuracy"] for i in (0, -1))
            met = "as expected" if few > max(0, every) else "NOT as expected"
            lines.append(
                f"{view}, {name}: VAE means above pixels by {few:+.3f} at 10 labels, by "
                f"{every:+.3f} at all: {met} (above zero, and falling)"
            )
    return "\n".join(lines)


def main() -> None:
    """Train on both views, classify, draw, tabulate."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "features.json"
    found = {view: measure(view, asked) for view in VIEWS}
    write_json(file, found | {"seed": 0, "made_by": made_by()})
    _results.save_figure(picture(found), file.with_suffix(".png"))
    print(table(found), verdict(found), sep="\n\n")


if __name__ == "__main__":
    main()
