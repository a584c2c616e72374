"""Stochastic variational inference: fit a Pyro program to data.

The loop is short and its own; device, precision and processes are Lightning Fabric's. One fused
optimizer steps all parameters. Data stay in memory on the device as they are stored; batches are
gathered by a permutation and binarized inside the step, which is traced to one tensor graph and
compiled where there are steps enough to pay for it.

All randomness of an epoch comes from the seed and the epoch's number, so a run continued from a
checkpoint ends where the uninterrupted one does, bit for bit on the CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from pyrovae import compiled, nets, program
from pyrovae._config import to_config
from pyrovae._random import key
from pyrovae.checkpoint import Checkpoint
from pyrovae.data import Split, as_split
from pyrovae.objectives import ELBO, Objective
from pyrovae.program import Args, PyroFunction

__all__ = ["SCHEDULES", "NonFiniteLoss", "fit"]

_log = logging.getLogger(__name__)

COMPILE_STEPS = 10_000
"""A run of at least this many steps is compiled: compiling costs some ten seconds."""

VALID_ROWS = 1000
"""Validation data scored at once."""

PRECISIONS = ("32-true", "bf16-mixed")

Row = dict[str, Any]
OnEpoch = Callable[[nn.Module, Row], None]


def _one_cycle(t: float) -> float:
    """Up from 1/25 in three tenths of training, then down to almost nothing, along cosines."""
    low, peak, end = 1 / 25, 0.3, 1e-4
    if t < peak:
        return low + (1 - low) * (1 - math.cos(math.pi * t / peak)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (t - peak) / (1 - peak))) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "one-cycle": _one_cycle,
}
"""Learning rate, in multiples of `lr`, at each fraction of training.

One-cycle: Super-Convergence (Smith & Topin, 2018), arXiv:1708.07120.
"""


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a number."""


@dataclass(frozen=True)
class Options:
    """How to train; `fit` takes the same arguments and says what they are.

    Raises:
        ValueError: If one is out of range.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    schedule: str | Callable[[float], float] = "one-cycle"
    kl_warmup: int = 0
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("kl_warmup", 0), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def fabric(self) -> Fabric:
        """Device and precision.

        Raises:
            ValueError: If there is no such device here.
        """
        try:
            return Fabric(accelerator=self.accelerator, devices=1, precision=self.precision)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"accelerator {self.accelerator!r} is not to be had on this machine: take 'cpu' or "
                "'auto'"
            ) from error

    def rate(self, t: float) -> float:
        """Learning rate when a fraction `t` of training is done."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return self.lr * schedule(t)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it, as plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        schedule = self.schedule if isinstance(self.schedule, str) else "own"
        left_out = ("accelerator", "compile")
        return {n: v for n, v in plain.items() if n not in left_out} | {"schedule": schedule}


def fit(
    vae: nn.Module,
    train: Any,
    *,
    valid: Any = None,
    objective: pyro.infer.ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: str | Callable[[float], float] = "one-cycle",
    kl_warmup: int = 0,
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

    An epoch takes the data in a new order; what is left over when they do not fill a last batch
    waits for another epoch. Weights are the best by validation ELBO if there are validation data,
    else the last.

    Args:
        vae: A module with `model` and `guide`, such as `VAE` or `Program`.
        train: Data: a tensor `(N, *shape)`, an array, a tuple of tensors, a torch `Dataset`, or a
            split of a data set.
        valid: Data for the validation ELBO after each epoch.
        objective: What to maximise; `ELBO()` if None. Any Pyro `ELBO` will do.
        epochs: Passes over the data.
        batch_size: Data in a batch; at most all.
        lr: Learning rate of Adam: the highest of the schedule.
        schedule: one-cycle, cosine, constant, or a function from the fraction of training done to
            a multiple of `lr`.
        kl_warmup: Epochs over which the weight of the KL rises to one.
        clip_norm: Bound on the norm of the gradient per datum; None for no bound.
        patience: Stop after so many epochs, counted from the end of the KL warm-up, without a
            better validation ELBO; None never stops.
        seed: Of data order and noise. Initial weights are the caller's.
        accelerator: auto, cpu, cuda, ...: a device as Lightning Fabric names it.
        precision: 32-true, or bf16-mixed, which runs all layers of the networks but the last in
            bfloat16.
        compile: Compile the step; None compiles runs that are long enough for it to pay.
        progress: Show a bar with ELBO, reconstruction and KL in nats per datum.
        on_epoch: Called with the module and the epoch's row after each epoch.
        checkpoint: File to keep the state of training in.
        resume: Continue from that file.

    Returns:
        One row per epoch: epoch, elbo, reconstruction, kl (nats per datum at KL weight 1), the same
        with `valid_` in front, lr, kl_weight and seconds.

    Raises:
        TypeError: If `vae` has no model and guide.
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
    fabric = options.fabric()
    fabric.to_device(vae)
    train = as_split(train).to(fabric.device)
    valid = None if valid is None else as_split(valid).to(fabric.device)
    for split in (train, valid):
        check_data(model, guide, split)
    with program.undisturbed(model, guide, buffers=False), pyro.validation_enabled(False):
        run = _Run(vae, train, valid, objective or ELBO(), options, fabric)
        if resume and checkpoint:
            run.restore(Checkpoint.load(checkpoint, run.identity))
        run.prepare()
        return run.train(progress, on_epoch, checkpoint)


class _Run:
    """One training run: its state, its step, its loop."""

    def __init__(
        self,
        vae: nn.Module,
        train: Split,
        valid: Split | None,
        objective: pyro.infer.ELBO,
        options: Options,
        fabric: Fabric,
    ):
        self.vae, self.data, self.valid = vae, train, valid
        self.model, self.guide = functions(vae)
        self.objective, self.options, self.fabric = objective, options, fabric
        self.batch_size = min(options.batch_size, len(train))
        self.steps = len(train) // self.batch_size
        self._seed(0)
        self.tensors = program.state(self.model, self.guide, program.as_args(train[slice(0, 2)]))
        unique = {id(t): t for t in self.tensors.values() if t.requires_grad}
        self.params = list(unique.values())
        if not self.params:
            raise ValueError("there is nothing to train: model and guide have no parameters")
        self.optimizer = torch.optim.Adam(self.params, lr=options.lr, fused=True)
        self.history: list[Row] = []
        self.best: dict[str, Tensor] = {}
        self.names: list[str] = []
        long = self.steps * options.epochs >= COMPILE_STEPS
        self.compile = long if options.compile is None else options.compile
        self.step: compiled.Step

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run."""
        own = self.objective
        name = to_config(own) if isinstance(own, Objective) else type(own).__name__
        return self.options.identity() | {"objective": name, "data": len(self.data)}

    def prepare(self) -> None:
        """Start new weights at the data, and make the step."""
        initialize: Any = getattr(self.vae, "initialize", None)
        if initialize and not self.history:
            initialize(self.data[_spread(len(self.data), 10_000)])
        self.step = self._make_step()

    def train(
        self, progress: bool, on_epoch: OnEpoch | None, checkpoint: str | Path | None
    ) -> list[Row]:
        """Train to the end; the best weights are left in the module."""
        if checkpoint and not self.history:
            self.checkpoint().save(checkpoint)
        last_saved = time.monotonic()
        epochs = self.options.epochs
        with _bar(epochs * self.steps, len(self.history) * self.steps, progress) as bar:
            try:
                while len(self.history) < epochs and not self._out_of_patience():
                    row = self._epoch(bar)
                    self._keep_best()
                    over = len(self.history) == epochs or self._out_of_patience()
                    if checkpoint and (over or time.monotonic() - last_saved > 2):
                        self.checkpoint().save(checkpoint)
                        last_saved = time.monotonic()
                    if on_epoch:
                        on_epoch(self.vae, row)
            finally:
                if self.best:
                    _copy(self.best, self.tensors)
        return self.history

    def checkpoint(self) -> Checkpoint:
        """The state of training between two epochs."""
        slots = self.optimizer.state_dict()["state"]
        return Checkpoint(
            settings=self.identity,
            history=self.history,
            compiled=self.compile,
            tensors={name: tensor.detach() for name, tensor in self.tensors.items()},
            best=self.best,
            optimizer={f"{i}.{key}": t for i, slot in slots.items() for key, t in slot.items()},
        )

    def restore(self, saved: Checkpoint) -> None:
        """Take up the state of an earlier run."""
        if saved.tensors.keys() != self.tensors.keys():
            raise ValueError("the checkpoint is of another model: its weights have other names")
        for name, tensor in self.tensors.items():
            if saved.tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint is of another model: {name} has shape "
                    f"{tuple(saved.tensors[name].shape)}, here {tuple(tensor.shape)}"
                )
        _copy(saved.tensors, self.tensors)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.optimizer.items():
            i, key = name.split(".")
            slots.setdefault(int(i), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        device = self.params[0].device
        self.best = {name: tensor.to(device) for name, tensor in saved.best.items()}
        self.history, self.compile = list(saved.history), saved.compiled

    def _make_step(self) -> compiled.Step:
        """The step, compiled if that pays: of a KL weight and a batch as stored."""
        data, is_tuple = self.data, isinstance(self.data.data, tuple)

        def loss(kl_weight: Tensor, *stored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            args = program.as_args(data.transform(stored if is_tuple else stored[0]))
            value, terms = self._surrogate(args, kl_weight)
            self.names = list(terms)
            return value / self.batch_size, {n: t / self.batch_size for n, t in terms.items()}

        step = compiled.with_gradients(loss, self.params)
        example = (self._kl_weight(0), *self._stored(torch.arange(self.batch_size)))
        with self._running(), program.undisturbed(self.model, self.guide):
            step(*example)
            if self.compile:
                _log.info("compiling the training step")
                fast = compiled.compile_step(step, example)
                self.compile, step = fast is not None, fast or step
        return step

    def _surrogate(self, args: Args, kl_weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(self.objective, Objective):
            return self.objective.surrogate(self.model, self.guide, args, kl_weight)
        value = self.objective.differentiable_loss(self.model, self.guide, *args)
        return value, {"elbo": -value.detach()}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Training mode, and networks in the precision asked for."""
        token = nets.autocast.set(self.fabric.autocast)
        try:
            with program.in_mode(True, self.model, self.guide):
                yield
        finally:
            nets.autocast.reset(token)

    def _epoch(self, bar: tqdm) -> Row:
        epoch, start = len(self.history), time.perf_counter()
        self._seed(epoch + 1)
        order = torch.randperm(len(self.data)).to(self.fabric.device)
        outputs = []
        with self._running():
            for i in range(self.steps):
                batch = self._stored(order[i * self.batch_size : (i + 1) * self.batch_size])
                outputs.append(self._update(epoch, i, batch))
                bar.update()
        terms = torch.stack(outputs)
        if not terms.isfinite().all():
            i = int((~terms.isfinite()).any(1).nonzero()[0])
            raise self._non_finite(epoch, i, self._stored(order[: self.batch_size]))
        row = {"epoch": epoch + 1, **dict(zip(self.names, terms.mean(0)[1:].tolist(), strict=True))}
        row |= {f"valid_{name}": value for name, value in self._validate().items()}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["kl_weight"] = float(self._kl_weight(epoch * self.steps + self.steps - 1))
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        shown = {name: f"{row[name]:.2f}" for name in (*self.names, "valid_elbo") if name in row}
        bar.set_postfix(epoch=f"{epoch + 1}/{self.options.epochs}", **shown)
        return row

    def _update(self, epoch: int, i: int, batch: Sequence[Tensor]) -> Tensor:
        """One step of the optimizer; the loss and its terms."""
        t = epoch * self.steps + i
        output, grads = self.step(self._kl_weight(t), *batch)
        if output.device.type == "cpu" and not math.isfinite(output[0]):
            raise self._non_finite(epoch, i, batch)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        if self.options.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, self.options.clip_norm)
        self.optimizer.param_groups[0]["lr"] = self.options.rate(
            t / (self.steps * self.options.epochs)
        )
        self.optimizer.step()
        return output

    def _kl_weight(self, t: int) -> Tensor:
        warmup = self.options.kl_warmup * self.steps
        weight = min(1.0, (t + 1) / warmup) if warmup else 1.0
        return torch.tensor(weight, device=self.fabric.device)

    def _stored(self, index: Tensor) -> tuple[Tensor, ...]:
        data = self.data.data
        return tuple(part[index] for part in (data if isinstance(data, tuple) else (data,)))

    def _validate(self) -> dict[str, float]:
        """Terms of the ELBO on the validation data, under the same noise every epoch."""
        split = self.valid
        if split is None:
            return {}
        torch.manual_seed(key(self.options.seed, 0))
        sums: dict[str, float] = {}
        with torch.no_grad(), program.in_mode(False, self.model, self.guide):
            for start in range(0, len(split), VALID_ROWS):
                args = program.as_args(split[slice(start, start + VALID_ROWS)])
                for name, value in ELBO().surrogate(self.model, self.guide, args)[1].items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        return {name: value / len(split) for name, value in sums.items()}

    def _keep_best(self) -> None:
        scores = [row["valid_elbo"] for row in self.history if "valid_elbo" in row]
        if scores and scores[-1] == max(scores):
            self.best = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _out_of_patience(self) -> bool:
        counted = self.history[self.options.kl_warmup :]
        scores = [row["valid_elbo"] for row in counted if "valid_elbo" in row]
        if self.options.patience is None or not scores:
            return False
        return len(scores) - 1 - scores.index(max(scores)) >= self.options.patience

    def _seed(self, epoch: int) -> None:
        torch.manual_seed(key(self.options.seed, epoch))

    def _non_finite(self, epoch: int, i: int, stored: Sequence[Tensor]) -> NonFiniteLoss:
        """The error for a loss that is not finite, with the site that made it so."""
        where = f"the loss is not finite at epoch {epoch + 1}, step {i + 1}"
        bad = [name for name, t in self.tensors.items() if not t.isfinite().all()]
        if bad:
            cause = f"a step left weights that are not finite, such as {bad[0]!r}"
        else:
            cause = self._bad_site(stored)
        remedy = "try a lower lr, clip_norm=10, or data on another scale"
        return NonFiniteLoss(f"{where}: {cause}; {remedy}")

    def _bad_site(self, stored: Sequence[Tensor]) -> str:
        data = tuple(stored) if isinstance(self.data.data, tuple) else stored[0]
        args = program.as_args(self.data.transform(data))
        with torch.no_grad():
            drawn = program.draw(self.guide, args)
            sites = program.score_sites(self.model, args, drawn.values)
        for where, scores in (("guide", drawn.scores), ("model", sites)):
            for name, score in scores.items():
                if not score.log_prob.isfinite().all():
                    return f"site {name!r} of the {where} has log densities that are not finite"
        return "no site alone explains it"


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


def check_data(model: PyroFunction, guide: PyroFunction, split: Split | None) -> None:
    """Refuse a program that cannot be scored, and data outside the likelihood's support.

    Raises:
        ValueError: With the reason.
    """
    if split is None:
        return
    args = program.as_args(split[slice(0, 7)])
    name, support = program.observed_support(model, guide, args)
    with program.undisturbed():
        for start in range(0, len(split) if support is not None else 0, VALID_ROWS):
            x = program.as_args(split[slice(start, start + VALID_ROWS)])[0]
            if not support.check(x).all():
                raise ValueError(
                    f"data lie outside the support of the likelihood ({support}): the values of "
                    f"{name!r} range from {float(x.min()):g} to {float(x.max()):g}. Binarize or "
                    "rescale the data, or take another likelihood"
                )
    program.check(model, guide, args)


def _bar(total: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=total, initial=done, unit="step", disable=not progress, dynamic_ncols=True)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _spread(size: int, at_most: int) -> Tensor:
    """Up to so many indices, evenly spread."""
    return torch.arange(0, size, max(1, math.ceil(size / at_most)))
