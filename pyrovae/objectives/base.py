"""Base of objectives."""

from __future__ import annotations

from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae._config import Configurable
from pyrovae.program import Args, PyroFunction


class Objective(Configurable, pyro.infer.ELBO):
    """Base of objectives: a subclass writes `surrogate`."""

    def surrogate(
        self, model: PyroFunction, guide: PyroFunction, args: Args, kl_weight: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to report of it.

        Args:
            model: p(x, z), a Pyro function of `args`.
            guide: q(z|x), a Pyro function of `args`.
            args: One batch.
            kl_weight: Weight of the KL, on top of the objective's own: training warms it up.

        Returns:
            The loss to differentiate, and by name detached terms to report, with "elbo" among them
            at KL weight 1. All are scalars in nats, summed over the batch.
        """
        raise NotImplementedError

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's objectives are made of joint traces, ours of densities per datum."""
        raise NotImplementedError

    def differentiable_loss(
        self, model: PyroFunction, guide: PyroFunction, *args: Tensor
    ) -> Tensor:
        """The loss of a batch, in nats summed over it; parameters are those of Pyro's store."""
        return self.surrogate(_in_store(model), _in_store(guide), args)[0]

    @torch.no_grad()
    def loss(self, model: PyroFunction, guide: PyroFunction, *args: Tensor) -> float:
        """Value of the loss."""
        return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: PyroFunction, guide: PyroFunction, *args: Tensor) -> float:
        """Value of the loss; its gradients are left with the parameters."""
        loss = self.differentiable_loss(model, guide, *args)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


def _in_store(fn: PyroFunction) -> PyroFunction:
    """The function as one that no module owns, so that it runs in Pyro's store, where SVI looks."""
    return lambda *args: fn(*args)
