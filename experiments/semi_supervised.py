"""How few labels do digits need?

Question: what is the test error of each semi-supervised model, by the number of labels?
Command:  python experiments/semi_supervised.py          (embedded digits)
          python experiments/semi_supervised.py --data mnist --data-root DATA
Hardware: two cores, no GPU; two and a half minutes, on MNIST a night.
Expected: on MNIST with 100 / 600 / 1000 / 3000 labels M1 and a support vector machine 11.8 / 5.7 /
          4.2 / 3.5 %, M2 12.0 / 4.9 / 3.6 / 3.9 %, M1+M2 3.3 / 2.6 / 2.4 / 2.2 % (Kingma et al.,
          2014, arXiv:1406.5298); the skip model 1.3 % with 100 (Maaloe et al., 2016,
          arXiv:1602.05473). M2 comes to that, and with convolutions below; M1+M2 and the skip
          model fall short.

Labels are balanced and drawn anew for each seed. Settings are the same for all numbers of labels,
but for alpha, which goes with data per label in all models but M1+M2. Labelled data weigh a tenth
of the loss; half of it, as the authors of the skip model weigh them, in M2 with and without
convolutions, and on the digits in the skip model, which is theirs with half their latents, one
hidden layer in place of two, and 60 epochs at three times their learning rate in place of a
thousand. M1+M2 reads codes of active units, drawn anew each time, as its authors' does. Some
settings were found by watching the test error of MNIST with one draw of 100 labels, so the errors
are not free of choice: those weights, from when on data without labels move the classifier, ten
latents of style, the number of labels summed, drawn codes, epochs, and the classifier of "M2 conv".

Each (model, labels, seed) is written as soon as it is there, and one that is there already under
the same settings is left out. Writes experiments/results/semi_supervised-DATA.json and .png.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import bernoulli_vae, markdown, parser
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import one_hot

import pyrovae
from pyrovae import (
    AuxiliaryVAE,
    Classifier,
    SemiSupervisedVAE,
    data,
    guides,
    likelihoods,
    nets,
    priors,
)
from pyrovae._config import to_config
from pyrovae.data.split import Labelled
from pyrovae.evidence import Classification
from pyrovae.objectives import SemiSupervised
from pyrovae.runs import made_by, write_json

LABELS = {"digits": (20, 50, 200), "mnist": (100, 600, 1000, 3000)}
DRAWS = {"digits": 1, "mnist": 3}
EPOCHS = {
    "digits": {"M1": 60, "M2": 40, "M2 conv": 40, "M1+M2": 40, "skip": 60},
    "mnist": {"M1": 30, "M2": 20, "M2 conv": 50, "M1+M2": 60, "skip": 60},
}
CODES, STYLE = 50, 10
NET, DEEP = nets.MLP(hidden=(500,)), nets.MLP(hidden=(500, 500))
CONV = nets.Conv(channels=(16, 32), hidden=128, activation="relu")
ACTIVE = 0.01  # variance of the posterior mean over the data (Burda et al., 2016)

Epochs = dict[str, int]
Found = tuple[Tensor, list[float]]
"""Probabilities of the test data's classes, and the test error after each epoch of training."""


def m1(dataset: data.DataSet, few: data.Split, epochs: Epochs) -> Found:
    """A support vector machine on the codes of a VAE that saw no label: classes as one-hot."""
    (codes, test, _), known = active_codes(dataset, epochs["M1"]), few.y >= 0
    machine = SVC(C=10).fit(codes[known].numpy(), few.y[known])
    found = machine.predict(test.numpy())
    return one_hot(torch.as_tensor(found), num_classes(dataset)).float(), []


def m2(
    dataset: data.DataSet,
    few: data.Split,
    epochs: Epochs,
    name: str = "M2",
    net: nets.Net = DEEP,
) -> Found:
    """q(y|x), with this network, of a VAE of x and y."""
    c = num_classes(dataset)
    vae = with_classifier(likelihoods.Bernoulli(dataset.shape, STYLE + c, NET), c, net)
    return trained(vae, few, dataset.test, dataset.test.y, options(name, few, epochs))


def m1_m2(dataset: data.DataSet, few: data.Split, epochs: Epochs) -> Found:
    """The same on codes drawn anew each time from a VAE that saw no label, of its active units."""
    c, (_, test, drawn) = num_classes(dataset), active_codes(dataset, epochs["M1"])
    likelihood = likelihoods.Normal(test.shape[1:], STYLE + c, NET, scale="amortized")
    vae, inner = with_classifier(likelihood, c), few.transform.transform
    codes = replace(few, transform=Labelled(lambda x: drawn(inner(x))))
    return trained(vae, codes, test, dataset.test.y, options("M1+M2", few, epochs))


def skip(dataset: data.DataSet, few: data.Split, epochs: Epochs) -> Found:
    """q(y|x, a) of a skip deep generative model, its objective weighed as by its authors."""
    c, entries = num_classes(dataset), dataset.train.x[0].numel()
    net, deep = nets.MLP((500,), "relu"), nets.MLP((500, 500), "relu")
    vae = AuxiliaryVAE(
        priors.StandardNormal(CODES),
        likelihoods.Normal((CODES,), CODES + c, net, scale="amortized"),
        likelihoods.Bernoulli(dataset.shape, CODES + CODES + c, net),
        guides.Normal((entries + CODES + c,), CODES, net),
        guides.Normal(dataset.shape, CODES, net),
        Classifier((entries + CODES,), c, deep),
    )
    return trained(vae, few, dataset.test, dataset.test.y, options("skip", few, epochs))


MODELS: dict[str, Callable[..., Found]] = {
    "M1 + SVM": m1,
    "M2": m2,
    "M2 conv": partial(m2, name="M2 conv", net=CONV),
    "M1+M2": m1_m2,
    "skip": skip,
}
UNASKED = {"digits": ("M2 conv",), "mnist": ()}  # digits are eight pixels wide


@cache
def active_codes(
    dataset: data.DataSet, epochs: int
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Of a VAE that saw no label, its active units alone.

    Returns:
        Codes of training data and of test data, shape `(N, units)`, and a function from images,
        shape `(batch, *shape)`, to draws from q(z|x), shape `(batch, units)`.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(0)  # the same for every draw of labels
    vae = bernoulli_vae(dataset.shape, CODES, DEEP)
    pyrovae.fit(vae, dataset.train, epochs=epochs, progress=False)
    codes = of_all(vae.encode, dataset.train)
    used = codes.var(0) >= codes.var(0).max().clamp(max=ACTIVE)
    torch.random.set_rng_state(state)

    @torch.no_grad()
    def drawn(x: Tensor) -> Tensor:
        return vae.posterior(x).sample()[:, used]

    return codes[:, used], of_all(vae.encode, dataset.test)[:, used], drawn


def trained(
    vae: SemiSupervisedVAE, train: Any, test: data.Split | Tensor, y: Tensor, how: dict[str, Any]
) -> Found:
    """Fit a new model to data with labels for some, and classify the test data."""
    curve: list[float] = []

    def note(vae: SemiSupervisedVAE, row: dict[str, float]) -> None:
        wrong = of_all(vae.classify, test).argmax(1) != y
        curve.append(float(wrong.double().mean()))

    pyrovae.fit(vae, train, **how, progress=False, on_epoch=note)
    return of_all(vae.classify, test), curve


def options(name: str, few: data.Split, epochs: Epochs) -> dict[str, Any]:
    """How a model is fitted to data with labels for some."""
    how = {"epochs": epochs[name], "lr": 3e-3, "batch_size": 100, "clip_norm": 100.0}
    each = len(few) / int((few.y >= 0).sum())  # data that a label stands for
    authors = {"alpha": 0.05 * each, "share": 0.5}  # those of the skip model
    weights: dict[str, Any] = {"alpha": 0.01 * each, "share": 0.1, "top_k": 2}
    match name:
        case "M2":
            weights = authors
        case "M2 conv":
            how["kl_warmup"] = 5
            weights |= authors
        case "M1+M2":
            how["kl_warmup"] = 5
            weights["alpha"] = 1.0
        case "skip":
            how |= {"lr": 1e-3, "batch_size": 128, "kl_warmup": 0}
            if len(few) < 10_000:  # too few steps for the classifier to learn from so little
                weights = authors
    return how | {"objective": SemiSupervised(**weights)}


def settings(name: str, few: data.Split, epochs: Epochs) -> dict[str, Any]:
    """What a run is known by, beside model, number of labels and seed."""
    first = {"M1": {"epochs": epochs["M1"]}} if name.startswith("M1") else {}
    if name == "M1 + SVM":
        return first
    return first | {n: to_config(value) for n, value in options(name, few, epochs).items()}


def with_classifier(
    likelihood: likelihoods.Likelihood, classes: int, net: nets.Net = DEEP
) -> SemiSupervisedVAE:
    """A new VAE of x and y with this likelihood."""
    shape = likelihood.shape
    return SemiSupervisedVAE(
        priors.StandardNormal(STYLE),
        likelihood,
        guides.Normal((math.prod(shape) + classes,), STYLE, NET),
        Classifier(shape, classes, net),
    )


def num_classes(dataset: data.DataSet) -> int:
    """Classes of the labels."""
    return int(dataset.train.y.max()) + 1


def of_all(function: Callable[[Tensor], Tensor], split: data.Split | Tensor) -> Tensor:
    """A function of all data, a thousand at a time."""
    return torch.cat([function(split[i : i + 1000]) for i in range(0, len(split), 1000)])


def one(
    name: str, dataset: data.DataSet, few: data.Split, seed: int, epochs: Epochs
) -> dict[str, Any]:
    """Train and judge one model with one draw of labels."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    probs, curve = MODELS[name](dataset, few, epochs)
    found = Classification(probs, dataset.test.y, dataset.test.description).summary()
    about = {"settings": settings(name, few, epochs), "seconds": time.perf_counter() - start}
    return found | {"error_by_epoch": curve} | about | {"made_by": made_by()}


def table(found: dict[str, Any]) -> str:
    """Errors in percent with their standard error over draws of labels (number of draws)."""
    counts = sorted({count for rows in found.values() for count in rows}, key=int)
    lines = []
    for name, rows in found.items():
        cells = [_cell(rows.get(count, {})) for count in counts]
        off = [run["calibration_error"] for runs in rows.values() for run in runs.values()]
        shown = "" if name == "M1 + SVM" else f"{statistics.fmean(off):.1%}"
        lines.append([name, *cells, shown])
    header = ["test error, %", *(f"{count} labels" for count in counts), "calibration error"]
    return markdown(header, lines)


def _cell(runs: dict[str, Any]) -> str:
    errors = [100 * run["error"] for run in runs.values()]
    if len(errors) < 2:
        return f"{errors[0]:.2f} (1)" if errors else ""
    spread = statistics.stdev(errors) / len(errors) ** 0.5
    return f"{statistics.fmean(errors):.2f} ± {spread:.2f} ({len(errors)})"


def figure(found: dict[str, Any], of: str) -> plt.Figure:
    """Error by number of labels, and by epoch with the fewest where that was noted."""
    made, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    fewest = min((count for rows in found.values() for count in rows), key=int)
    for index, ((name, rows), marker) in enumerate(zip(found.items(), "osPD^", strict=False)):
        each = [(int(n), [100 * r["error"] for r in runs.values()]) for n, runs in rows.items()]
        means = sorted((n, statistics.fmean(errors)) for n, errors in each)
        left.plot(*zip(*means, strict=True), label=name, marker=marker, color=f"C{index}")
        points = [(n, error) for n, errors in each for error in errors]
        left.scatter(*zip(*points, strict=True), s=8, alpha=0.5, color=f"C{index}")
        for run in rows.get(fewest, {}).values():
            errors = [100 * error for error in run.get("error_by_epoch", [])]
            right.plot(range(1, len(errors) + 1), errors, color=f"C{index}")
    left.set(xscale="log", yscale="log", xlabel="labels", ylabel="test error, %")
    ticks = sorted({int(count) for rows in found.values() for count in rows})
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    low, high = left.get_ylim()
    shown = [tick for tick in (3, 5, 10, 20, 40, 80) if low <= tick <= high]
    left.set_yticks(shown, [str(tick) for tick in shown])
    left.minorticks_off()
    left.set_title(f"{of}: draws of labels, and their means")
    left.legend(frameon=False)
    right.set(xlabel="epoch", title=f"as training goes on, {fewest} labels, a line a draw")
    return made


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _runs(found: dict[str, Any], name: str, count: int) -> dict[str, Any]:
    """Of one model and number of labels, by seed."""
    return found.setdefault(name, {}).setdefault(str(count), {})


def main() -> None:
    """Run what is not there yet, and tabulate."""
    flags = parser(__doc__)
    flags.add_argument(
        "--models", nargs="+", choices=list(MODELS), help="default: all; of digits not M2 conv"
    )
    flags.add_argument("--labels", type=int, nargs="+")
    flags.add_argument("--draws", type=int, help="of labels; default: 1 for digits, 3 for MNIST")
    asked = flags.parse_args()
    models = asked.models or [name for name in MODELS if name not in UNASKED[asked.data]]
    counts = asked.labels or LABELS[asked.data]
    epochs, draws = EPOCHS[asked.data], asked.draws or DRAWS[asked.data]
    if asked.smoke:
        counts, draws, epochs = counts[:1], 1, dict.fromkeys(epochs, 1)
    file: Path = _results.folder(asked) / f"semi_supervised-{asked.data}.json"
    dataset = data.load(asked.data, asked.data_root)
    for name, count, seed in product(models, counts, range(draws)):
        few = data.hide_labels(dataset.train, count, seed)
        there = _runs(_read(file), name, count).get(str(seed), {})
        if there.get("settings") == settings(name, few, epochs):
            continue
        run = one(name, dataset, few, seed, epochs)
        found = _read(file)  # anew: another process may be at another model
        _runs(found, name, count)[str(seed)] = run
        write_json(file, {n: found[n] for n in MODELS if n in found})
        print(name, count, seed, run, flush=True)
    found = _read(file)
    _results.save_figure(figure(found, asked.data), file.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
