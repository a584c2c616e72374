r"""Does an image keep its style when its class is changed?

Question: an image is encoded, its class changed, and decoded: how often is the picture of the class
          asked for, and how much of the style is left, by a class-conditional VAE, and by adding
          the difference of two classes' mean codes in a VAE that knows no classes?
Command:  python experiments/analogies.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 25 seconds.
Expected: 90 % or more of the class asked for by the conditional VAE, and fewer by arithmetic, as a
          class is more than a place in the plain VAE's codes. Ink and slant of source and picture
          correlate by both methods, and not once sources are shuffled. No published number is
          known; pictures are in Kingma et al. (2014), arXiv:1406.5298, and Larsen et al. (2016).

.. math:: p(x \mid z + \bar z_b - \bar z_a), \; z \sim q(z|x) \qquad \text{or} \qquad
    p(x \mid z, y = b), \; z \sim q(z|x, y = a)

Both models have the same networks and 10 latents; means are decoded. Test images move to each of
the nine other classes; the judge is a support vector machine on grey training images. Ink is the
sum of pixels, slant the shear of a picture, from its second moments. Each is taken less its mean
over images with the same two classes, so that correlations are of an image's own style; those with
its reconstruction say what codes keep at all. Writes experiments/results/analogies.json and .png.

References:
    Autoencoding beyond pixels using a learned similarity metric (Larsen et al., 2016),
    arXiv:1512.09300; Sampling Generative Networks (White, 2016), arXiv:1609.04468
"""

from __future__ import annotations

from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import bernoulli_vae, grey, judge_of, markdown, parser, predicted
from conditional import of_the_class_asked_for
from conditional import train as train_conditional
from interpolation import moves
from torch import Tensor

import pyrovae
from pyrovae.data import DataSet, Split
from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.plotting.images import draw_frame, show_grid
from pyrovae.runs import made_by, write_json

LATENT_DIM = 10
CLASSES = torch.arange(10)


def by_arithmetic(dataset: DataSet, test: Split, epochs: int) -> Tensor:
    """Test images in every class, shape `(N, 10, *shape)`: codes plus differences of means."""
    torch.manual_seed(0)
    vae = bernoulli_vae(dataset.shape, LATENT_DIM)
    pyrovae.fit(vae, dataset.train, valid=dataset.valid, epochs=epochs, progress=False)
    return vae.decode(vae.encode(test[:])[:, None] + moves(vae, dataset.train)[test.y])


def by_label(dataset: DataSet, test: Split, epochs: int) -> Tensor:
    """Test images in every class, shape `(N, 10, *shape)`: the same code, every label."""
    return train_conditional(dataset, LATENT_DIM, epochs).analogies(test[:], test.y)


def ink(images: Tensor) -> Tensor:
    """Sum of pixels, shape `(*)`."""
    return images.double().sum((-3, -2, -1))


def slant(images: Tensor) -> Tensor:
    """By how many columns a picture leans to the right for each row upwards, shape `(*)`."""
    weight = images.double().sum(-3) / ink(images)[..., None, None]
    row, column = (torch.arange(size).double() for size in weight.shape[-2:])
    down = row - (weight.sum(-1) * row).sum(-1, keepdim=True)
    cov = (weight * down[..., None] * column).sum((-2, -1))
    return -cov / (weight.sum(-1) * down.square()).sum(-1)


METHODS = {"arithmetic": by_arithmetic, "conditional": by_label}
STYLES = {"ink": ink, "slant": slant}


def own(values: Tensor, y: Tensor) -> Tensor:
    """Values `(N, targets)` less their mean over images of a class, in standard deviations."""
    away = values - torch.stack([values[y == label].mean(0) for label in CLASSES])[y]
    return away / away.square().mean().sqrt()


def correlation(before: Tensor, after: Tensor, y: Tensor) -> dict[str, float]:
    """Correlation of values `(N, targets)` within pairs of classes; its error over images."""
    a, b = own(before.expand_as(after), y), own(after, y)
    r = (a * b).mean()
    influence = a * b - r / 2 * (a.square() + b.square())
    return {"correlation": float(r), "std_error": error_of_mean(influence.mean(1))}


def style_kept(source: Tensor, made: Tensor, y: Tensor) -> dict[str, Any]:
    """Correlation of each style of sources and of what was made of them, `(N, 10, *shape)`."""
    torch.manual_seed(0)
    order = torch.randperm(len(y))
    shuffled = torch.empty_like(order)  # each image's place taken by one of its class
    shuffled[y.argsort(stable=True)] = order[y[order].argsort(stable=True)]
    targets, found = (y[:, None] + CLASSES) % 10, {}
    for name, style in STYLES.items():
        before, after = style(source)[:, None], style(made).gather(1, targets)
        found[name] = {
            "reconstructed": correlation(before, after[:, :1], y),
            "transferred": correlation(before, after[:, 1:], y),
            "shuffled": correlation(before[shuffled], after[:, 1:], y),
        }
    return found


def picture(made: dict[str, Tensor], source: Tensor, y: Tensor) -> plt.Figure:
    """Images with the least and most of each style for their class, in every class."""
    styles = [own(style(source)[:, None], y)[:, 0] for style in STYLES.values()]
    rows = [int(end) for style in styles for end in (style.argmin(), style.argmax())]
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.2), layout="constrained")
    for axis, (name, images) in zip(axes, made.items(), strict=True):
        grid = torch.cat([source[rows, None], images[rows]], 1)
        across, down = show_grid(axis, grid, (0, 1), f"One style in every class: {name}")
        axis.set_xticks(across, ["source", *map(str, range(10))])
        axis.set_yticks(down, ["light", "heavy", "leans left", "leans right"])
        for middle in down:
            draw_frame(axis, (across[0], middle), source.shape[2:])
    return figure


def report(found: dict[str, Any]) -> str:
    """Each number beside the one expected."""
    expected = {"before": "near 0", "arithmetic": "fewer", "conditional": "90 % or more"}
    shares = [
        [name, f"{row['share']:.1%} ± {row['share_std_error']:.1%}", expected[name]]
        for name, row in found.items()
    ]
    kept = [
        [
            f"{style}, {name}",
            *(f"{r['correlation']:.2f} ± {r['std_error']:.2f}" for r in of.values()),
        ]
        for name in METHODS
        for style, of in found[name]["kept"].items()
    ]
    header = ["correlation with source", "reconstructed", "transferred (> 0)", "shuffled (0)"]
    judged = markdown(["images", "of the class asked for", "expected"], shares)
    return f"{judged}\n\n{markdown(header, kept)}"


def main() -> None:
    """Train both models, transfer, judge, draw."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "analogies.json"
    epochs = 2 if asked.smoke else {"digits": 300, "mnist": 30}[asked.data]
    dataset = pyrovae.data.load(asked.data, asked.data_root)
    test = dataset.test.subset(slice(0, 1000))
    judge, source, y = judge_of(dataset), grey(test), test.y
    made = {name: method(dataset, test, epochs) for name, method in METHODS.items()}
    unchanged = predicted(judge, source)[:, None].expand(-1, 10)
    found = {"before": of_the_class_asked_for(unchanged, y)}
    for name, images in made.items():
        found[name] = of_the_class_asked_for(predicted(judge, images), y)
        found[name]["kept"] = style_kept(source, images, y)
    settings = {
        "data": test.description, "latent_dim": LATENT_DIM, "epochs": epochs, "seed": 0,
        "judge_on_test_images": float((predicted(judge, source) == y).double().mean()),
    }  # fmt: skip
    write_json(file, {"rows": found, "settings": settings, "made_by": made_by()})
    _results.save_figure(picture(made, source, y), file.with_suffix(".png"))
    print(report(found))


if __name__ == "__main__":
    main()
