r"""What does a plane of latents look like, and how tight is its ELBO?

Question: where do digits lie in the two latents of a small convolutional VAE, what does each place
          decode to, and how far is the ELBO below log p(x), which quadrature knows?
Command:  python experiments/latent_2d.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; 35 seconds.
Expected: the ELBO below log p(x) by KL(q(z|x) || p(z|x)) > 0 for the mean; importance sampling with
          K = 1,000 below it too, by less than 0.1 nats, as two latents are few.

The model of many introductions, Keras' among them: convolutions of 8 and 16 channels with stride
two, batch normalisation, 20 units, two latents, the decoder mirrored, Adam at 1e-3, batches of 128,
a fifth of the training data for validation (300 of 1,497; a sixth on MNIST), no KL warm-up. Three
things differ: batch normalisation is that of the convolutions alone, before the activation; that is
SiLU, as quadrature of a decoder with ReLU's kinks takes minutes; and pixels are binarized, as the
cross-entropy of grey ones is no log likelihood. Weights are the best by validation ELBO; log p(x)
is integrated over a grid that follows the mass (`method="exact"`), of up to 300 data of each split.

Writes experiments/results/latent_2d.json; latent_2d.png, the plane from -4 to 4 decoded; and
latent_2d-codes.png, test images in the plane by class.
"""

from __future__ import annotations

import _results
import torch
from _gallery import bernoulli_vae, elbo, markdown, parser

import pyrovae
from pyrovae import evidence, nets
from pyrovae.data import DataSet, Split
from pyrovae.evidence.diagnostics import error_of_mean
from pyrovae.runs import made_by, write_json

TOLERANCE, ELBO_PARTICLES = 1e-3, 1000


def train(dataset: DataSet, epochs: int) -> pyrovae.VAE:
    """The convolutional VAE with the best weights by validation ELBO."""
    torch.manual_seed(0)
    net = nets.Conv(channels=(8, 16), hidden=20, batch_norm=True)
    vae = bernoulli_vae(dataset.shape, 2, net)
    pyrovae.fit(
        vae, dataset.train, valid=dataset.valid, epochs=epochs, batch_size=128, lr=1e-3,
        schedule="constant", kl_warmup=0, progress=False,
    )  # fmt: skip
    return vae


def measure(vae: pyrovae.VAE, split: Split, num_particles: int) -> dict[str, float]:
    """ELBO, log p(x) by quadrature and by importance sampling, with errors: nats per datum."""
    exact = evidence.exact(vae.model, vae.guide, split, tolerance=TOLERANCE)
    sampled = pyrovae.log_px(vae.model, vae.guide, split, num_particles, seed=0)
    bound, bound_error = elbo(vae.model, vae.guide, split, ELBO_PARTICLES // 2)
    return {
        "log_px": exact.mean,
        "log_px_worst_error": float(exact.std_error.max()),
        "log_px_data_std_error": exact.test_std_error,
        "importance": sampled.mean,
        "importance_std_error": sampled.mean_std_error,
        "elbo": float(bound.mean()),
        "elbo_std_error": bound_error,
        "gap": float((exact.values - bound).mean()),
        "gap_data_std_error": error_of_mean(exact.values - bound),
        "num_data": len(split),
    }


def table(rows: dict[str, dict[str, float]], num_particles: int) -> str:
    """The rows as README shows them."""
    header = ["split", "ELBO", f"log p(x), K = {num_particles:,}", "log p(x), quadrature"]
    lines = [
        [
            name,
            f"{row['elbo']:.3f} ({row['elbo_std_error']:.3f})",
            f"{row['importance']:.3f} ({row['importance_std_error']:.3f})",
            f"{row['log_px']:.3f}",
            f"{row['gap']:.3f} ({row['gap_data_std_error']:.3f})",
        ]
        for name, row in rows.items()
    ]
    return markdown([*header, "KL(q ‖ p(z given x)), nats"], lines)


def main() -> None:
    """Train, measure, draw."""
    asked = parser(__doc__).parse_args()
    file = _results.folder(asked) / "latent_2d.json"
    epochs = 3 if asked.smoke else {"digits": 400, "mnist": 30}[asked.data]
    num_data, num_particles = (10, 50) if asked.smoke else (300, 1000)
    dataset = pyrovae.data.load(asked.data, asked.data_root)
    vae = train(dataset, epochs)
    splits = {s.name: s.subset(slice(0, num_data)) for s in (dataset.valid, dataset.test)}
    rows = {name: measure(vae, split, num_particles) for name, split in splits.items()}
    settings = {
        "data": splits["test"].description, "epochs": epochs, "seed": 0, "tolerance": TOLERANCE,
        "num_particles": num_particles, "elbo_particles": ELBO_PARTICLES,
    }  # fmt: skip
    write_json(file, {"rows": rows, "settings": settings, "made_by": made_by()})
    x, y = dataset.test[slice(0, 2000)], dataset.test.y
    codes = file.with_name("latent_2d-codes.png")
    _results.save_figure(pyrovae.plotting.manifold(vae, 15, bound=4), file.with_suffix(".png"))
    _results.save_figure(pyrovae.plotting.latent_space(vae, x, y[: len(x)]), codes)
    print(table(rows, num_particles))
    test = rows["test"]
    short = test["log_px"] - test["importance"]
    print(
        f"test: expected the ELBO below log p(x), found it {test['gap']:.3f} nats below; expected "
        f"K = {num_particles:,} less than 0.1 nats below, found {short:.3f}"
    )


if __name__ == "__main__":
    main()
