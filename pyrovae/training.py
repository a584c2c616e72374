"""Stochastic variational inference: fit a Pyro program to data.

`fit` checks what it is given, once and before anything is changed; the loop is in `pyrovae.loop`.
Device and precision are Lightning Fabric's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import JitTrace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae import program
from pyrovae._random import key
from pyrovae.checkpoint import Checkpoint
from pyrovae.data import PartlyLabelled, Split, as_split, known_or_not
from pyrovae.loop import VALID_ROWS, Loop, NonFiniteLoss, OnEpoch, Row
from pyrovae.objectives import DEFAULT, Objective
from pyrovae.options import SCHEDULES, Options
from pyrovae.program import PyroFunction

__all__ = [
    "SCHEDULES",
    "NonFiniteLoss",
    "Options",
    "check_data",
    "check_labels",
    "fit",
    "functions",
]


def fit(
    vae: nn.Module,
    train: Any,
    *,
    valid: Any = None,
    objective: pyro.infer.ELBO | None = None,
    epochs: int = 200,
    batch_size: int = 128,
    lr: float = 4e-3,
    schedule: str | Callable[[float], float] = "one-cycle",
    kl_warmup: int | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    compile: bool | None = None,
    progress: bool = True,
    on_epoch: OnEpoch | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> list[Row]:
    """Train a program, and leave the best weights in it.

    A module with a method `initialize(x)`, as `VAE` has, starts new weights at the data by it. An
    epoch takes the data in a new order; what is left over when they do not fill a last batch
    waits for another epoch. The weights left behind are the best by validation ELBO if there are
    validation data, else those of the last whole epoch: also after Ctrl-C or an error.

    In a program that `torchrun` or SLURM launched several times, each process calls `fit` with the
    same arguments, and they train one model together: a batch is shared among them, gradients are
    added up, and all end with the same weights. Only the first shows the bar, calls `on_epoch` and
    writes.

    Args:
        vae: A module with `model` and `guide`, such as `VAE` or `Program`.
        train: Data: a tensor `(N, *shape)`, an array, a tuple of tensors, a torch `Dataset`, or a
            split of a data set. In `(x, y)` a label of -1 is one that is not given, for objectives
            that take labels for some.
        valid: Data for the validation ELBO after each epoch.
        objective: What to maximise; `ELBO()` if None, or what the module names as its
            `default_objective`. Pyro's `Trace_ELBO`, `TraceMeanField_ELBO` and `TraceEnum_ELBO`
            will do too.
        epochs: Passes over the data.
        batch_size: Data in a batch; at most all.
        lr: Learning rate of Adam: the highest of the schedule.
        schedule: one-cycle, cosine, constant, or a function from the fraction of training done to
            a multiple of `lr`.
        kl_warmup: Epochs over which the weight of the KL rises to one, for objectives of
            `pyrovae.objectives`; None is a quarter of all for those, none for Pyro's.
        clip_norm: Bound on the norm of the gradient per datum, against steps that throw training
            back; None for no bound.
        patience: Stop after so many epochs, counted from the end of the KL warm-up, without a
            better validation ELBO; None never stops.
        seed: Of data order and noise. Initial weights are the caller's.
        accelerator: auto, cpu, cuda, ...: a device as Lightning Fabric names it.
        precision: 32-true, or bf16-mixed, which runs all layers of the networks but the last in
            bfloat16.
        compile: Compile the step; None compiles runs that are long enough for it to pay.
        progress: Show a bar with ELBO, reconstruction and KL in nats per datum.
        on_epoch: Called with the module and the epoch's row after each epoch.
        checkpoint: File to keep the state of training in, written between epochs.
        resume: Continue from that file.

    Returns:
        One row per epoch: epoch; elbo, reconstruction and kl, with several latents also kl_SITE of
        each, in nats per datum at KL weight 1, and what else the objective reports; with validation
        data the terms of the ELBO with `valid_` in front, and valid_active_units, the number of
        active latents on up to 500 of them; lr, kl_weight and seconds.

    Raises:
        TypeError: If `vae` has no model and guide, or the objective is no Pyro `ELBO`.
        ValueError: If an argument is out of range, the data do not suit the program, or the
            checkpoint is of other settings.
        NonFiniteLoss: If the loss is not finite.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114
    """
    options = Options(
        epochs, batch_size, lr, schedule, kl_warmup, clip_norm, patience, seed, accelerator,
        precision, compile,
    )  # fmt: skip
    model, guide = functions(vae)
    objective = objective or getattr(vae, "default_objective", DEFAULT)()
    _check_together(options, valid, objective, checkpoint, resume)
    fabric = options.fabric()
    for module in (vae, *program.modules(model, guide)):
        fabric.to_device(module)
    train = check_labels(vae, as_split(train), objective).to(fabric.device)
    valid = None if valid is None else as_split(valid).to(fabric.device)
    if valid is not None and (check := getattr(vae, "check_labels", None)):
        check(_labels(valid), training=False)
    with program.undisturbed(model, guide, buffers=False), _frozen_unremarked():
        torch.manual_seed(key(seed, 0))  # for parameters that Pyro functions make as they run
        for split in (train, valid):
            check_data(model, guide, split, objective)
        with program.validation(False):
            run = Loop(vae, train, valid, objective, options, fabric)
            run.prepare(
                Checkpoint.load(checkpoint, run.identity) if checkpoint and resume else None
            )
            return run.train(progress, on_epoch, checkpoint)


def functions(vae: Any) -> tuple[PyroFunction, PyroFunction]:
    """The model and the guide of what `fit` trains.

    Raises:
        TypeError: If it is no module that has both.
    """
    if not (isinstance(vae, nn.Module) and hasattr(vae, "model") and hasattr(vae, "guide")):
        raise TypeError(
            f"fit takes a module with .model and .guide, got {type(vae).__name__}; "
            "pyrovae.Program(model, guide) makes one of two Pyro functions"
        )
    model: Any = vae.model
    guide: Any = vae.guide
    return model, guide


def check_data(
    model: PyroFunction,
    guide: PyroFunction,
    split: Split | None,
    objective: pyro.infer.ELBO | None = None,
) -> None:
    """Refuse a program that cannot be scored, and data outside the likelihood's support.

    What one of our own objectives needs of a program is asked for too.

    Raises:
        ValueError: With the reason.
    """
    if split is None:
        return
    if getattr(objective, "labels", False) and isinstance(split.data, tuple):
        without = program.as_args(split[slice(0, 1)])[:-1]
        if found := program.misfit(without, model=model, guide=guide):
            raise ValueError(
                f"{type(objective).__name__} leaves out a label that is not given, and {found}"
            )
    if isinstance(split, PartlyLabelled):
        for part in split.parts:
            check_data(model, guide, part, objective)
        return
    program.refuse_autoguides(guide)
    args = program.as_args(split[slice(0, 7)])
    name, support = program.observed_support(model, guide, args)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    for start in range(0, len(split), VALID_ROWS):
        with program.undisturbed():
            args = program.as_args(split[slice(start, start + VALID_ROWS)])
        if support is None:
            where = f"the program fails on data {start} to {start + len(args[0]) - 1}"
            program.validate(where, model, guide, args)
        else:
            _check_support(name, support, args[0])
    needs = {}
    if isinstance(objective, Objective):
        needs = {"scaled": objective.scaled, "density": objective.density}
    program.check(model, guide, program.as_args(split[slice(0, 7)]), **needs)


def check_labels(vae: nn.Module, train: Split, objective: pyro.infer.ELBO) -> Split:
    """Data whose labels module and objective can do with, where they know any: -1 is none.

    Raises:
        ValueError: With the reason.
    """
    check, partly = getattr(vae, "check_labels", None), getattr(objective, "labels", False)
    if check or partly:
        train = known_or_not(train)
    if isinstance(train, PartlyLabelled) and not partly:
        raise ValueError(
            f"{type(objective).__name__} takes data that all have labels, or none: with labels "
            "for some take objectives.SemiSupervised"
        )
    if check:
        check(_labels(train))
    return train


def _labels(split: Split) -> Tensor | None:
    return split.data[1] if isinstance(split.data, tuple) else None


def _check_support(name: str, support: constraints.Constraint, x: Tensor) -> None:
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError(
            f"the values of {name!r} are not all finite: with VAE(..., missing=True) NaN marks a "
            "missing entry, otherwise leave those data out"
        )
    if not support.check(x).all():
        raise ValueError(
            f"data lie outside the support of the likelihood ({support}): the values of {name!r} "
            f"range from {float(x.min()):g} to {float(x.max()):g}. Binarize or rescale the data, "
            "or take another likelihood"
        )


def _check_together(
    options: Options,
    valid: Any,
    objective: pyro.infer.ELBO,
    checkpoint: str | Path | None,
    resume: bool,
) -> None:
    """Refuse arguments that are right one by one and make no sense together."""
    if not isinstance(objective, pyro.infer.ELBO):
        raise TypeError(f"objective must be a Pyro ELBO, got {type(objective).__name__}")
    if not hasattr(objective, "differentiable_loss") or isinstance(objective, JitTrace_ELBO):
        raise TypeError(
            f"{type(objective).__name__} has no differentiable loss: take one of "
            "pyrovae.objectives, or Pyro's Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO"
        )
    if options.patience is not None and valid is None:
        raise ValueError("patience needs validation data: pass valid")
    if options.kl_warmup and not isinstance(objective, Objective):
        raise ValueError(
            f"kl_warmup needs an objective of pyrovae.objectives, got {type(objective).__name__}"
        )
    if resume and checkpoint is None:
        raise ValueError("resume needs the checkpoint to go on from: pass checkpoint")
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"checkpoint: there is no folder {Path(checkpoint).parent}")


@contextmanager
def _frozen_unremarked() -> Iterator[None]:
    """Parameters without gradients are not in Pyro's store; it need not say so at each step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        yield
