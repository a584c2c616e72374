"""Programs whose log p(x) is known."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class PPCA(nn.Module):
    """Probabilistic PCA: z ~ N(0, I), x ~ N(W z + b, sigma^2 I), with its exact posterior as guide.

    Args:
        width: Multiplies the guide's scale: 1 is the posterior.
        shift: Is added to the guide's mean.
    """

    def __init__(self, data_dim=5, latent_dim=2, noise=0.7, width=1.0, shift=0.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(data_dim, latent_dim, generator=generator)
        bias = torch.randn(data_dim, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.noise, self.width, self.shift = noise, width, shift

    @property
    def latent_dim(self):
        return self.weight.shape[1]

    def sample(self, count, seed=1):
        """Data from the model."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, self.latent_dim, generator=generator)
        noise = torch.randn(count, len(self.bias), generator=generator)
        return z @ self.weight.detach().float().T + self.bias.detach().float() + self.noise * noise

    def marginal(self):
        """p(x), in float64."""
        w, b = self.weight.detach().double(), self.bias.detach().double()
        cov = w @ w.T + self.noise**2 * torch.eye(len(b), dtype=torch.float64)
        return dist.MultivariateNormal(b, cov)

    def log_px(self, x):
        """log p(x) in closed form."""
        return self.marginal().log_prob(x.double())

    def posterior(self, x):
        """p(z|x), its scale multiplied by `width` and its mean shifted."""
        w = self.weight
        precision = w.T @ w / self.noise**2 + torch.eye(self.latent_dim, dtype=w.dtype)
        cov = torch.linalg.inv(precision)
        loc = (x - self.bias) @ w @ cov / self.noise**2 + self.shift
        return dist.MultivariateNormal(loc, scale_tril=self.width * torch.linalg.cholesky(cov))

    def kl(self, x):
        """KL of the guide from the posterior, which is the same for every x unless shifted."""
        true = PPCA.posterior(_unchanged(self), x)
        return torch.distributions.kl_divergence(self.posterior(x), true)

    def prior(self):
        return dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1)

    def model(self, x):
        pyro.module("ppca", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.module("ppca", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def _unchanged(ppca):
    same = PPCA(*ppca.weight.shape, noise=ppca.noise).to(ppca.weight.dtype)
    same.load_state_dict(ppca.state_dict())
    return same


def by_quadrature(log_joint, low=-12.0, high=12.0, points=20001):
    """log of the integral of exp(log_joint(z)) over a one-dimensional z, for each datum.

    Args:
        log_joint: A function of a float64 grid `(points,)` to `(points, N)`.
    """
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    return log_joint(grid).logsumexp(0) + math.log((high - low) / (points - 1))
