r"""What lies between two images, and what does adding a difference of class means do?

Question: along straight and spherical paths between codes, what become of the norm, of the density
          under the prior and of a classifier's confidence? And does the code of a digit plus the
          difference of two classes' mean codes decode to the other class?
Command:  python experiments/interpolation.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 11 seconds.
Expected: halfway between two draws of the prior in D dimensions a straight path has 0.71 of their
          norm, sqrt(D), and a spherical one all of it (White, 2016); log p(z) is then higher by D/4
          nats on the straight path, where almost no draw lies. With the difference of means added,
          more than half of the decoded digits are of the class asked for; before, almost none.

A VAE of the digits is trained as `pyrovae train` does it. The judge is logistic regression on the
grey training images. Paths and moves start from test images; mean codes are of training images.

Writes experiments/results/interpolation.json and .png.

References:
    Sampling Generative Networks (White, 2016), arXiv:1609.04468;
    differences of means as attributes: Autoencoding beyond pixels using a learned similarity metric
    (Larsen et al., 2016), arXiv:1512.09300
"""

from __future__ import annotations

import math
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import grey, markdown, parser, predicted
from _training import fitted
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import pyrovae
from pyrovae.data import Split
from pyrovae.plotting.images import show_grid
from pyrovae.runs import made_by, write_json

PATHS = ("straight", "spherical")
MOVES = ((1, 7), (5, 6), (4, 9))
STEPS, PAIRS = 11, 1000
ALL = slice(None)


def pixels(split: Split) -> tuple[Any, Any]:
    """Real grey images, a row each, and their labels."""
    return grey(split).flatten(1).numpy(), split.y.numpy()


def confidence(classifier: Any, images: Tensor) -> Tensor:
    """Probability of the most probable class, shape `(*)`, for images `(*, 1, height, width)`."""
    probs = classifier.predict_proba(images.flatten(0, -4).flatten(1).numpy())
    return torch.from_numpy(probs).amax(-1).reshape(images.shape[:-3])


def along(vae: pyrovae.VAE, classifier: Any, ends: tuple[Tensor, Tensor], path: Any) -> dict:
    """Norm, log density under the prior and confidence at each step, means over the pairs."""
    z = vae.interpolate_latent(*ends, STEPS, path)
    with torch.no_grad():
        log_pz = vae.prior().log_prob(z)
    sure = confidence(classifier, vae.decode(z))
    found = {"norm": z.norm(dim=-1), "log_pz": log_pz, "confidence": sure}
    return {name: value.mean(1).tolist() for name, value in found.items()} | {
        f"{name}_std_error": (value.std(1) / math.sqrt(value.shape[1])).tolist()
        for name, value in found.items()
    }


def moves(vae: pyrovae.VAE, train: Split) -> Tensor:
    """What is added to the code of class a for class b, shape `(10, 10, latent_dim)`."""
    codes = vae.encode(train[ALL])
    means = torch.stack([codes[train.y == label].mean(0) for label in range(10)])
    return means - means[:, None]


def taken_for(vae: pyrovae.VAE, test: Split, classifier: Any, moves: Tensor) -> Tensor:
    """Share of digits of class a, with the move from a to b, that are taken for b: `(10, 10)`."""
    z, shares = vae.encode(test[ALL]), torch.zeros(10, 10)
    for label, each in enumerate(moves):
        decoded = vae.decode(z[test.y == label] + each[:, None])
        found = predicted(classifier, decoded)
        shares[label] = (found == torch.arange(10)[:, None]).float().mean(1)
    return shares


def ends_of(vae: pyrovae.VAE, test: Split) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of codes: of test images of two classes, and of draws of the prior."""
    one, other = torch.randint(0, len(test), (2, 2 * PAIRS))
    apart = test.y[one] != test.y[other]
    z = vae.encode(test[ALL])
    images = z[one[apart][:PAIRS]], z[other[apart][:PAIRS]]
    return {"images": images, "draws": (vae.sample_latent(PAIRS), vae.sample_latent(PAIRS))}


def curves(axes: Any, paths: dict[str, Any]) -> None:
    """Log density and confidence along both kinds of path, a panel each."""
    t = torch.linspace(0, 1, STEPS)
    labels = {"log_pz": "log p(z), nats", "confidence": "confidence of the classifier"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for color, ends in (("C0", "images"), ("C1", "draws")):
            for style, path in (("o-", "straight"), ("s--", "spherical")):
                row = paths[ends][path]
                axis.errorbar(
                    t, row[name], row[f"{name}_std_error"], fmt=style, ms=3, color=color,
                    label=f"{ends}, {path}",
                )  # fmt: skip
        axis.set(xlabel="share of the path", ylabel=label)


def examples(axes: Any, vae: pyrovae.VAE, test: Split, moves: Tensor) -> None:
    """Paths between test images, and digits before and after a move."""
    of = {label: test[ALL][test.y == label][:STEPS] for label in range(10)}
    start, end = (torch.stack([of[pair[side]][0] for pair in MOVES]) for side in (0, 1))
    paths = torch.stack([vae.interpolate(start, end, STEPS, path) for path in PATHS], 1)
    grid = paths.transpose(0, 2).flatten(0, 1)
    _, down = show_grid(axes[0], grid, (0, 1), "Paths between two test images")
    axes[0].set_yticks(down, list(PATHS) * len(MOVES), fontsize=7)
    codes = [vae.encode(of[a]) for a, _ in MOVES]
    rows = [z + added for z, (a, b) in zip(codes, MOVES, strict=True) for added in (0, moves[a, b])]
    _, down = show_grid(axes[1], vae.decode(torch.stack(rows)), (0, 1), "Moves between classes")
    axes[1].set_yticks(down, [text for a, b in MOVES for text in (f"{a}", f"to {b}")], fontsize=7)


def picture(vae: pyrovae.VAE, test: Split, moves: Tensor, found: dict[str, Any]) -> plt.Figure:
    """Paths and moves as images, and what lies along the paths."""
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 5.6), layout="constrained")
    examples(axes[0], vae, test, moves)
    curves(axes[1], found["paths"])
    lines, names = axes[1, 1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def measure(vae: pyrovae.VAE, dataset: Any, moves: Tensor) -> dict[str, Any]:
    """All numbers."""
    train, test = dataset.train, dataset.test
    classifier = LogisticRegression(max_iter=1000).fit(*pixels(train))
    before, after = (
        taken_for(vae, test, classifier, added) for added in (torch.zeros_like(moves), moves)
    )
    off = ~torch.eye(10, dtype=torch.bool)
    paths = {
        ends: {path: along(vae, classifier, z, path) for path in PATHS}
        for ends, z in ends_of(vae, test).items()
    }
    return {
        "paths": paths,
        "classes": {"before": before.tolist(), "after": after.tolist()},
        "mean": {"before": float(before[off].mean()), "after": float(after[off].mean())},
        "num_test": test.y.bincount().tolist(),
        "accuracy": {
            "images": float(classifier.score(*pixels(test))),
            "reconstructions": float(before.diagonal().mean()),
        },
    }


def table(found: dict[str, Any], latent_dim: int) -> str:
    """What was promised beside what was expected."""
    middle, halfway, moved = STEPS // 2, [], []
    for ends, rows in found["paths"].items():
        for path, row in rows.items():
            norm = 2 * row["norm"][middle] / (row["norm"][0] + row["norm"][-1])
            values = norm, row["log_pz"][middle], row["confidence"][middle]
            halfway.append([ends, path, *(f"{value:.2f}" for value in values)])
    draws = found["paths"]["draws"]
    higher = draws["straight"]["log_pz"][middle] - draws["spherical"]["log_pz"][middle]
    for a, b in MOVES:
        before, after = (found["classes"][name][a][b] for name in ("before", "after"))
        error = math.sqrt(after * (1 - after) / found["num_test"][a])
        moved.append([f"{a}", f"{b}", f"{before:.2f}", f"{after:.2f} ± {error:.2f}"])
    moved.append(["all 90 pairs", "", *(f"{found['mean'][k]:.2f}" for k in ("before", "after"))])
    sure = found["accuracy"]
    header = ["halfway between", "path", "norm, of the ends'", "log p(z), nats", "confidence"]
    return "\n\n".join([
        markdown(header, halfway),
        f"straight above spherical: {higher:.2f} nats; expected {latent_dim / 4:.2f}",
        markdown(["from", "to", "share before", "share after; expected above 0.5"], moved),
        f"the judge is right on {sure['images']:.2f} of the test images, and on "
        f"{sure['reconstructions']:.2f} of their reconstructions",
    ])  # fmt: skip


def main() -> None:
    """Train, measure, draw, tabulate."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "interpolation.json"
    epochs = 2 if asked.smoke else {"digits": 200, "mnist": 20}[asked.data]
    settings = {"data": asked.data, "latent_dim": 16, "epochs": epochs, "seed": 0, "pairs": PAIRS}
    flags = f"--data {asked.data} --latent-dim 16 --epochs {epochs}"
    vae, dataset, _ = fitted(flags, asked.data_root)
    torch.manual_seed(0)
    added = moves(vae, dataset.train)
    found = measure(vae, dataset, added)
    write_json(file, found | {"settings": settings, "made_by": made_by()})
    _results.save_figure(picture(vae, dataset.test, added, found), file.with_suffix(".png"))
    print(table(found, settings["latent_dim"]))


if __name__ == "__main__":
    main()
