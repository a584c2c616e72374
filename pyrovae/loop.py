"""The loop of training, its state, and the step it takes.

One fused optimizer steps all parameters. Data stay in memory on the device as they are stored;
batches are gathered by a permutation and binarized inside the step, which is traced to one tensor
graph and compiled where there are steps enough to pay for it.

All randomness of an epoch comes from the seed and the epoch's number, so the state between two
epochs holds no generator, and a run continued from it ends where the uninterrupted one does.

Several processes (`pyrovae._processes`) take equal shares of each batch and add up their gradients,
in one message a step: weights stay the same in all without being sent.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from pyrovae import _processes, compiled, nets, program
from pyrovae._config import to_config
from pyrovae._random import key
from pyrovae.checkpoint import Checkpoint
from pyrovae.data import Split
from pyrovae.evidence.latents import count_active
from pyrovae.objectives import Objective, report
from pyrovae.options import Options
from pyrovae.program import Args, PyroFunction

_log = logging.getLogger(__name__)

COMPILE_STEPS = 5_000
"""A run of at least this many steps is compiled, so that it pays with an empty cache."""

SAVE_SECONDS = 2
"""Least time between two checkpoints."""

VALID_ROWS = 1000
"""Validation data scored at once."""

ACTIVITY_ROWS = 500
"""Validation data, at most, by which active latents are counted."""

Row = dict[str, Any]
OnEpoch = Callable[[nn.Module, Row], None]


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a number."""


class Loop:
    """One training run: its state, its step, its loop.

    Attributes:
        tensors: Parameters and buffers by name, live.
        best: Their values to leave behind: where validation was best, or else after the last whole
            epoch.
        history: A row for each epoch done. With `tensors`, `best` and the optimizer's slots it is
            the whole state between two epochs: all noise comes from the seed and the epoch.
    """

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
        model: Any = vae.model
        guide: Any = vae.guide
        self.model, self.guide = model, guide
        self.objective, self.options, self.fabric = objective, options, fabric
        self.order = train.order(options.batch_size)
        self.batch_size, self.steps = self.order.batch_size, self.order.steps
        self.share = slice(_processes.rank(), None, _processes.size())
        sizes = {"batch": self.batch_size} | ({} if valid is None else {"valid": len(valid)})
        if self.order.labelled is not None:
            sizes["labelled data of a batch"] = self.order.given
            sizes["other data of a batch"] = self.batch_size - self.order.given
        for name, size in sizes.items():
            if size < _processes.size():
                raise ValueError(f"{name}: {size} data for {_processes.size()} processes to share")
        few = program.as_args(train.parts[0][slice(0, 2)])
        self.tensors = program.state(self.model, self.guide, few)
        unique = {id(t): t for t in self.tensors.values() if t.requires_grad}
        self.params = list(unique.values())
        if not self.params:
            raise ValueError("there is nothing to train: model and guide have no parameters")
        _warn_of_left_out(self.model, self.guide, self.params)
        self.captures = compiled.captures(fabric.device) and _processes.size() == 1
        self.optimizer = torch.optim.Adam(
            self.params, lr=self._rate(0), fused=True, capturable=self.captures
        )
        self.history: list[Row] = []
        self.best: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.kl_warmup = _kl_warmup(options, objective)
        long = self.steps * options.epochs >= COMPILE_STEPS
        self.compile = long if options.compile is None else options.compile
        self.step: compiled.Step
        self.update: Callable[..., Tensor]

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run."""
        sizes = {
            "data": len(self.data),
            "valid": self.valid and len(self.valid),
            "trained": len(self.params),
        }
        if self.order.labelled is not None:
            sizes["labelled"] = len(self.order.labelled)
        return self.options.identity() | {"objective": _in_words(self.objective)} | sizes

    @property
    def over(self) -> bool:
        """Whether all epochs are done, or patience has run out."""
        if len(self.history) == self.options.epochs:
            return True
        counted = self.history[self.kl_warmup :]
        if self.options.patience is None or not counted:
            return False
        return len(counted) - 1 - _best(counted) >= self.options.patience

    def prepare(self, saved: Checkpoint | None) -> None:
        """Take up an earlier run's state, or start new weights at the data; make the step."""
        if saved:
            self._restore(saved)
        else:
            self._seed(0)
            for module in program.owners(self.model, self.guide):
                if initialize := getattr(module, "initialize", None):
                    initialize(*program.as_args(self.data[_spread(len(self.data), 10_000)]))
            self.best = self._snapshot()
        _processes.agree([*self.tensors.values(), *self.best.values()])
        if not self.over:
            self.step = self._make_step()
            self.update = self._make_update()

    def train(
        self, progress: bool, on_epoch: OnEpoch | None, checkpoint: str | Path | None
    ) -> list[Row]:
        """Train to the end; the best weights are left in the module, whatever ends it."""
        leads = _processes.leads()
        checkpoint = checkpoint if leads else None
        last_saved = -math.inf if not self.history else time.monotonic()
        epochs = self.options.epochs
        with _bar(epochs * self.steps, len(self.history) * self.steps, progress and leads) as bar:
            try:
                while not self.over:
                    if checkpoint and time.monotonic() - last_saved > SAVE_SECONDS:
                        self.checkpoint().save(checkpoint)
                        last_saved = time.monotonic()
                    row = self._epoch(bar)
                    if on_epoch and leads:  # before saving: a resumed run leaves none out
                        on_epoch(self.vae, row)
                if checkpoint:
                    self.checkpoint().save(checkpoint)
            finally:
                _copy(self.best, self.tensors)
        return self.history

    def checkpoint(self) -> Checkpoint:
        """The state of training between two epochs."""
        return Checkpoint(
            settings=self.identity,
            history=self.history,
            compiled=self.compile,
            tensors={name: tensor.detach() for name, tensor in self.tensors.items()},
            best=self.best,
            optimizer=self._slots(),
        )

    def _slots(self) -> dict[str, Tensor]:
        """What the optimizer remembers, live, as `parameter.slot`."""
        slots = self.optimizer.state_dict()["state"]
        return {f"{i}.{key}": t for i, slot in slots.items() for key, t in slot.items()}

    def _restore(self, saved: Checkpoint) -> None:
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
        self.best = {name: tensor.to(self.fabric.device) for name, tensor in saved.best.items()}
        self.history, self.compile = list(saved.history), saved.compiled

    def _make_step(self) -> compiled.Step:
        """The step, compiled if that pays: of a KL weight and a batch as stored."""

        def loss(kl_weight: Tensor, *stored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, terms = self._surrogate(self._seen(stored), kl_weight)
            self.names = list(terms)
            return value / self.batch_size, {n: t / self.batch_size for n, t in terms.items()}

        clip_norm = self.options.clip_norm if _processes.size() == 1 else None
        step = compiled.with_gradients(loss, self.params, clip_norm)
        kept = partial(program.undisturbed, self.model, self.guide)
        with kept():
            order = torch.cat([self.order.epoch(), self.order.epoch()]).to(self.fabric.device)
        example = (self._kl_weight(0), *self._stored(order[0][self.share]))
        with self._running(), kept():
            where = f"the first step fails on a batch of {self.batch_size}"
            program.attempt(where, lambda: step(*example))
            if self.compile:
                _log.info("compiling the training step")
                trial = (self._kl_weight(0) / 2, *self._stored(order[-1][self.share]))
                fast = compiled.compile_function(step, example, trial, kept, "training")
                self.compile, step = fast is not None, fast or step
        return step

    def _make_update(self) -> Callable[..., Tensor]:
        """A whole step, as one CUDA graph where there is one and the step is compiled."""
        if not (self.captures and self.compile):
            return self._update
        with program.undisturbed():
            rows = self.order.epoch()[0].to(self.fabric.device)
        example = (self._kl_weight(0), torch.as_tensor(self._rate(0)), rows)
        tensors = self._snapshot()
        slots = {name: slot.clone() for name, slot in self._slots().items()}
        with self._running():
            captured = compiled.capture(self._update, example)
        _copy(tensors, self.tensors)  # capturing took steps; an epoch seeds its own noise
        for name, slot in self._slots().items():
            slot.copy_(slots[name]) if name in slots else slot.zero_()
        return captured or self._update

    def _surrogate(self, args: Args, kl_weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(self.objective, Objective):
            return self.objective.surrogate(self.model, self.guide, args, kl_weight)
        model, guide = _on_own_tensors(self.model), _on_own_tensors(self.guide)
        value = self.objective.differentiable_loss(model, guide, *args)
        return value, {"elbo": -value}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Training mode, networks in the precision asked for, an objective that knows the order."""
        token = nets.autocast.set(self.fabric.autocast)
        if self.order.labelled is not None:
            given = len(range(self.order.given)[self.share])
            self.objective.arrange(given, self.order.share)
        try:
            with program.in_mode(True, self.model, self.guide):
                yield
        finally:
            nets.autocast.reset(token)
            if self.order.labelled is not None:
                self.objective.arrange(None, 0.0)

    def _epoch(self, bar: tqdm) -> Row:
        """One pass over the data, then validation: the row, added to the history."""
        epoch, start = len(self.history), time.perf_counter()
        self._seed(epoch + 1)
        order = self.order.epoch()
        self._part_noise(epoch + 1)
        batches = [batch[self.share] for batch in order.to(self.fabric.device)]
        outputs = []
        with self._running():
            for i, index in enumerate(batches):
                t = epoch * self.steps + i
                output = self.update(self._kl_weight(t), self._rate(t), index)
                if _known_not_finite(output):
                    raise self._non_finite(epoch, i, self._stored(index))
                outputs.append(output)
                bar.update()
        terms = torch.stack(outputs)
        self._agree_on_buffers()
        self._check_finite(epoch, terms, batches)
        row = {"epoch": epoch + 1, **dict(zip(self.names, terms.mean(0)[1:].tolist(), strict=True))}
        row |= {f"valid_{name}": value for name, value in self._validate().items()}
        row["lr"] = float(self._rate(t))
        row["kl_weight"] = float(self._kl_weight(t))
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        if self.valid is None or _best(self.history) == epoch:
            self.best = self._snapshot()
        shown = {name: f"{row[name]:.2f}" for name in (*self.names, "valid_elbo") if name in row}
        bar.set_postfix(epoch=f"{epoch + 1}/{self.options.epochs}", **shown)
        return row

    def _update(self, kl_weight: Tensor, rate: float | Tensor, index: Tensor) -> Tensor:
        """The loss and its terms, and a step of the optimizer; none from a loss not finite."""
        output, grads = self._summed(*self.step(kl_weight, *self._stored(index)))
        if not _known_not_finite(output):
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        return output

    def _summed(self, output: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Output and gradients of the whole batch, of which each process had its share."""
        if _processes.size() == 1:
            return output, grads
        output, *grads = _processes.total([output, *grads])
        return output, compiled.finished(grads, self.params, self.options.clip_norm)

    def _agree_on_buffers(self) -> None:
        """Give the running statistics, which each process has of its shares, their mean."""
        if _processes.size() > 1:
            own = [
                t for t in self.tensors.values() if t.is_floating_point() and not t.requires_grad
            ]
            means = [t / _processes.size() for t in _processes.total(own)] if own else []
            for tensor, mean in zip(own, means, strict=True):
                tensor.copy_(mean)

    def _kl_weight(self, t: int) -> Tensor:
        """Weight of the KL at step `t` of all, as a tensor: a number would be frozen in a graph."""
        warmup = self.kl_warmup * self.steps
        weight = min(1.0, (t + 1) / warmup) if warmup else 1.0
        return torch.full((), weight, device=self.fabric.device)

    def _rate(self, t: int) -> float | Tensor:
        """Learning rate at step `t` of all; a tensor where it must not be frozen in a graph."""
        rate = self.options.rate(t / (self.steps * self.options.epochs))
        return torch.full((), rate, device=self.fabric.device) if self.captures else rate

    def _stored(self, index: Tensor) -> Args:
        """Rows as they are stored."""
        data = self.data.data
        parts = data if isinstance(data, tuple) else (data,)
        return tuple(part.index_select(0, index) for part in parts)

    def _seen(self, stored: Args) -> Args:
        """What the model sees of rows as stored."""
        is_tuple = isinstance(self.data.data, tuple)
        return program.as_args(self.data.transform(stored if is_tuple else stored[0]))

    def _validate(self) -> dict[str, float]:
        """Terms of the ELBO on the validation data, under the same noise every epoch."""
        split = self.valid
        if split is None:
            return {}
        self._seed(0)
        self._part_noise(0)
        sums: dict[str, float] = {}
        with torch.no_grad(), program.in_mode(False, self.model, self.guide):
            for start in range(0, len(split), VALID_ROWS):
                index = torch.arange(start, min(start + VALID_ROWS, len(split)))[self.share]
                if not len(index):
                    continue
                args = program.as_args(split[index])
                for name, value in report(self.model, self.guide, args).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            spread = split[_spread(len(split), ACTIVITY_ROWS)]
            active = count_active(self.guide, program.as_args(spread))
        (sum_of_all,) = _processes.total([torch.tensor(list(sums.values()), dtype=torch.float64)])
        means = (sum_of_all / len(split)).tolist()
        return dict(zip(sums, means, strict=True)) | (
            {} if active is None else {"active_units": active}
        )

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _seed(self, epoch: int) -> None:
        """Start the noise of an epoch, from 1; 0 is of validation and first weights."""
        torch.manual_seed(key(self.options.seed, epoch))

    def _part_noise(self, epoch: int) -> None:
        """Give all processes but the first noise of their own; what they draw first is the same."""
        if not _processes.leads():
            torch.manual_seed(key(key(self.options.seed, epoch), _processes.rank()))

    def _check_finite(self, epoch: int, terms: Tensor, batches: Sequence[Tensor]) -> None:
        """Refuse an epoch with a loss, or that ended in weights, that are not finite."""
        finite = terms.isfinite().all(1)
        if not finite.all():
            i = int((~finite).nonzero()[0])
            raise self._non_finite(epoch, i, self._stored(batches[i]))
        if not all(param.isfinite().all() for param in self.params):
            raise self._non_finite(epoch, len(batches) - 1, self._stored(batches[-1]))

    def _non_finite(self, epoch: int, i: int, stored: Args) -> NonFiniteLoss:
        """The error for a loss that is not finite, with what made it so."""
        trained = [(name, t) for name, t in self.tensors.items() if t.requires_grad]
        bad = [name for name, t in trained if not t.isfinite().all()]
        cause = f"a step left {bad[0]!r} not finite" if bad else self._bad_site(stored)
        return NonFiniteLoss(
            f"the loss is not finite at epoch {epoch + 1}, step {i + 1}: {cause}; "
            "try a lower learning rate, clipped gradients (clip_norm, such as 100), or data on "
            "another scale"
        )

    def _bad_site(self, stored: Args) -> str:
        """The first site whose log density is not finite, under ten draws."""
        with torch.no_grad(), self._running():
            args = self._seen(stored)
            if self.order.given:  # model and guide take labels of all or of none
                args = args[:-1]
            drawn = program.draw(self.guide, args, 10)
            sites = program.score_sites(self.model, program.repeat(args, 10), drawn.values)
        for where, scores in (("guide", drawn.scores), ("model", sites)):
            for name, score in scores.items():
                if not score.log_prob.isfinite().all():
                    return f"site {name!r} of the {where} has log densities that are not finite"
        return "no site alone explains it"


def _warn_of_left_out(model: PyroFunction, guide: PyroFunction, params: Sequence[Tensor]) -> None:
    """Say which modules model and guide use that nobody registered: they do not learn."""
    trained = {id(param) for param in params}
    for module in program.modules(model, guide):
        if any(p.requires_grad and id(p) not in trained for p in module.parameters()):
            warnings.warn(
                f"a {type(module).__name__} that model or guide uses is not trained: register it "
                "by pyro.module in a plain function, or as a submodule of its owner",
                stacklevel=4,
            )


def _known_not_finite(output: Tensor) -> bool:
    """Whether a loss is not finite, where asking does not wait for a device."""
    return output.device.type == "cpu" and not math.isfinite(output[0])


def _on_own_tensors(fn: PyroFunction) -> PyroFunction:
    """A function that modules own, run on their tensors and not on the store's."""
    if not program.owners(fn):
        return fn

    def scoped(*args: Tensor) -> Any:
        with pyro.get_param_store().scope():
            return fn(*args)

    return scoped


def _kl_warmup(options: Options, objective: pyro.infer.ELBO) -> int:
    """Epochs that warm the KL up, a quarter where nothing else was asked for."""
    if options.kl_warmup is None:
        return options.epochs // 4 if isinstance(objective, Objective) else 0
    return options.kl_warmup


def _in_words(objective: pyro.infer.ELBO) -> Any:
    """An objective as plain values."""
    try:
        return to_config(objective)
    except TypeError:
        return f"{type(objective).__name__}({objective.num_particles})"


def _best(rows: Sequence[Row]) -> int:
    """The first of the rows with the highest validation ELBO; what is no number is lowest."""
    scores = [-math.inf if math.isnan(row["valid_elbo"]) else row["valid_elbo"] for row in rows]
    return scores.index(max(scores))


def _bar(total: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=total, initial=done, unit="step", disable=not progress, dynamic_ncols=True)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _spread(size: int, at_most: int) -> Tensor:
    """Up to so many indices, evenly spread."""
    return torch.arange(0, size, max(1, math.ceil(size / at_most)))
