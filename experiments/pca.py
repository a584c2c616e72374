r"""Is a linear autoencoder PCA, and a linear VAE probabilistic PCA?

Question: does a linear autoencoder trained by squared error span the principal subspace? Does a
          VAE with a linear decoder and one learned noise scale come to the likelihood of
          probabilistic PCA, to its noise variance, and to its principal axes?
Command:  python experiments/pca.py [--data mnist --data-root DATA]
Hardware: two cores, no GPU; a minute and a half.
Expected: all principal angles below 1 degree, and a squared error that is the sum of the discarded
          eigenvalues (Baldi & Hornik, 1989). Test log p(x) within 0.02 nats of probabilistic PCA's
          at its maximum likelihood, and a noise variance within 0.5 % of the mean of the discarded
          eigenvalues (Tipping & Bishop, 1999): the ELBO adds no bad optima where the guide can be
          the posterior (Lucas et al., 2019, arXiv:1911.02469). A diagonal guide can be that at the
          principal axes alone, so it turns to them, soonest where eigenvalues are far apart, and a
          full covariance need not (Rolinek et al., 2019, arXiv:1812.06775). Found on the digits:
          within 15 degrees of four axes after 8,000 steps, of nine after 32,000.

Grey pixels scaled to [0, 1], without noise added, as real values; ten latents. Maximum likelihood
and its log p(x) come from an eigendecomposition, the VAE's log p(x) from `evidence.exact`. Writes
experiments/results/pca.json and .png.
"""

from __future__ import annotations

import time
from typing import Any

import _results
import matplotlib.pyplot as plt
import torch
from _gallery import markdown, parser
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae import evidence, guides, likelihoods, nets, priors
from pyrovae.objectives import ELBO
from pyrovae.plotting.images import grey_limits, show_grid
from pyrovae.runs import made_by, write_json

LATENTS, BATCH, RATE = 10, 1200, 2e-2
STEPS = {"Delta": 4000, "FullRankNormal": 8000, "Normal": 32_000}
"""By guide: the axes are found long after the likelihood is reached."""
LINEAR = nets.MLP(hidden=())
NEAR = 15.0
"""Degrees within which a column of the decoder counts as a principal axis."""


def train(guide: str, x: Tensor, steps: int) -> pyrovae.VAE:
    """A linear VAE with this guide; with a point for a guide, a linear autoencoder."""
    torch.manual_seed(0)
    shape, point = tuple(x.shape[1:]), guide == "Delta"
    vae = pyrovae.VAE(
        priors.StandardNormal(LATENTS),
        likelihoods.Normal(shape, LATENTS, net=LINEAR, scale=0.1 if point else "learned"),
        getattr(guides, guide)(shape, LATENTS, net=LINEAR),
    )
    objective = ELBO(beta=0) if point else ELBO(analytic_kl=True)
    size = min(BATCH, len(x))
    pyrovae.fit(
        vae, x, objective=objective, epochs=max(1, steps * size // len(x)), batch_size=size,
        lr=RATE, progress=False,
    )  # fmt: skip
    return vae


def ppca(x: Tensor) -> tuple[MultivariateNormal, Tensor, Tensor]:
    """Probabilistic PCA at its maximum likelihood, the eigenvalues of the data, and the axes."""
    rows = x.flatten(1).double()
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    noise = eigenvalues[LATENTS:].mean()
    kept = vectors[:, :LATENTS]
    cov = (kept * (eigenvalues[:LATENTS] - noise)) @ kept.T + noise * torch.eye(len(vectors))
    return MultivariateNormal(rows.mean(0), cov), eigenvalues, kept


def columns(vae: pyrovae.VAE) -> Tensor:
    """The decoder's matrix W, shape `(entries, latents)`."""
    return vae.likelihood.net.head.weight.detach().double()


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between the spans of two matrices' columns, degrees, largest first."""
    a, b = torch.linalg.qr(a)[0], torch.linalg.qr(b)[0]
    return torch.linalg.svdvals(a - b @ (b.T @ a)).clamp(max=1).asin().rad2deg()


def judged(vae: pyrovae.VAE, train: Tensor, test: Tensor, axes: Tensor) -> dict[str, Any]:
    """What the VAE found: log p(x), ELBO, noise, subspace, axes, spectrum."""
    w, noise = columns(vae), vae.likelihood.scale.item() ** 2
    cosines = ((w / w.norm(dim=0)).T @ axes).abs().amax(0).clamp(max=1)
    off = cosines.acos().rad2deg()
    exact = evidence.exact(vae.model, vae.guide, test)
    bound = pyrovae.elbo(vae.model, vae.guide, test, num_particles=1000, seed=0)
    return {
        "test_log_px": exact.mean,
        "train_log_px": evidence.exact(vae.model, vae.guide, train[:1000]).mean,
        "test_elbo": float(bound.mean()),
        "noise_variance": noise,
        "largest_angle": float(angles(w, axes)[0]),
        "axes_off_by": off.tolist(),
        "axes_found": int((off < NEAR).sum()),
        "spectrum": (torch.linalg.svdvals(w).square() + noise).tolist(),
    }


def compared(
    vaes: dict[str, pyrovae.VAE], components: PCA, x: Tensor, test: Tensor
) -> dict[str, Any]:
    """The autoencoder beside PCA, the VAEs beside probabilistic PCA."""
    best, eigenvalues, axes = ppca(x)
    again = vaes["Delta"].reconstruct(x)
    subspace = torch.from_numpy(components.components_.T)
    return {
        "autoencoder": {
            "angles": angles(columns(vaes["Delta"]), subspace).tolist(),
            "squared_error": float((again - x).double().square().flatten(1).sum(1).mean()),
        },
        "pca": {"squared_error": float(eigenvalues[LATENTS:].sum())},
        "ppca": {
            "test_log_px": float(best.log_prob(test.flatten(1).double()).mean()),
            "train_log_px": float(best.log_prob(x[:1000].flatten(1).double()).mean()),
            "noise_variance": float(eigenvalues[LATENTS:].mean()),
        },
        "vae": {n: judged(vae, x, test, axes) for n, vae in vaes.items() if n != "Delta"},
        "eigenvalues": eigenvalues.tolist(),
    }


def figure(found: dict[str, Any], images: dict[str, Tensor]) -> plt.Figure:
    """The spectra, and reconstructions of a few test images."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    shown = [v for v in found["eigenvalues"][:30] if v > 1e-4]
    left.plot(range(1, len(shown) + 1), shown, "ko", ms=3.5, label="eigenvalues of the data")
    rest = [found["vae"]["FullRankNormal"]["noise_variance"]] * (len(shown) - LATENTS)
    for style, (name, row) in zip(("C0s-", "C1x-"), found["vae"].items(), strict=True):
        left.plot(
            range(1, len(shown) + 1), row["spectrum"] + rest, style, ms=8, lw=0.8, mfc="none",
            label=f"linear VAE, {name} guide",
        )  # fmt: skip
    left.set(yscale="log", xlabel="number of the eigenvalue", ylabel="variance")
    left.set_title("Covariance of the data and of the model")
    left.legend(fontsize=8, frameon=False)
    grid = torch.stack(list(images.values()))
    _, down = show_grid(right, grid, grey_limits(images["data"]), "Reconstructions of test images")
    right.set_yticks(down, list(images))
    return drawn


def report(found: dict[str, Any]) -> str:
    """Each number beside the one expected."""
    plain, ml = found["autoencoder"], found["ppca"]
    lines = [["pPCA", f"{ml['test_log_px']:.4f}", "", f"{ml['noise_variance']:.6f}", "", ""]]
    lines += [
        [
            f"VAE, {name}", f"{row['test_log_px']:.4f}", f"{row['test_elbo']:.4f}",
            f"{row['noise_variance']:.6f}", f"{row['largest_angle']:.2f}",
            f"{row['axes_found']} of {LATENTS}",
        ]
        for name, row in found["vae"].items()
    ]  # fmt: skip
    header = ["", "test log p(x)", "ELBO", "noise variance", "largest angle", "axes found"]
    return (
        f"linear autoencoder, largest principal angle: {plain['angles'][0]:.4f} degrees (0)\n"
        f"its squared error per image: {plain['squared_error']:.5f}"
        f" (discarded eigenvalues: {found['pca']['squared_error']:.5f})\n\n"
        f"{markdown(header, lines)}"
    )


def main() -> None:
    """Train an autoencoder and two VAEs, compare with the closed forms, draw."""
    asked = parser(__doc__, data=None).parse_args()
    file = _results.folder(asked) / "pca.json"
    steps, start = dict.fromkeys(STEPS, 50) if asked.smoke else STEPS, time.perf_counter()
    data = pyrovae.data.load(asked.data, asked.data_root, binarize="none", dequantize=False)
    x, test = data.train[:], data.test[:]
    components = PCA(LATENTS).fit(x.flatten(1).double().numpy())
    vaes = {name: train(name, x, count) for name, count in steps.items()}
    found = compared(vaes, components, x, test) | {
        "latent_dim": LATENTS, "steps": steps, "batch_size": min(BATCH, len(x)), "lr": RATE,
        "seed": 0, "data": data.test.description, "seconds": time.perf_counter() - start,
        "made_by": made_by(),
    }  # fmt: skip
    write_json(file, found)
    few = test[:8]
    again = components.inverse_transform(components.transform(few.flatten(1).double().numpy()))
    images = {
        "data": few,
        "PCA": torch.from_numpy(again).reshape(few.shape),
        "linear\nautoencoder": vaes["Delta"].reconstruct(few),
        "linear\nVAE": vaes["Normal"].reconstruct(few),
    }
    _results.save_figure(figure(found, images), file.with_suffix(".png"))
    print(report(found))


if __name__ == "__main__":
    main()
