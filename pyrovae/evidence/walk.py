"""Data in blocks, and a program in the precision that what is said of it is computed in."""

from __future__ import annotations

import copy
import dataclasses
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae import _processes, nets, program
from pyrovae._random import key
from pyrovae.data import as_split
from pyrovae.evidence.keep import Kept
from pyrovae.program import Args, PyroFunction

ROWS = 800
"""Rows of the model run at once: activations of this many stay in the processor's cache."""

MIN_BLOCK = 8
"""Data in a block with many particles."""

T = TypeVar("T")


class Walk:
    """The data, a block at a time, under noise keyed by the seed and the block.

    Args:
        model: p(x, z), a Pyro function of x.
        guide: q(z|x), a Pyro function of x.
        x: Data: a tensor, a tuple of tensors, or a split.
        num_particles: Draws per datum that a block has room for.
        seed: Of the noise; None takes a new one.
        dtype: At least float32; None runs as model and guide are.
        block_size: Data in a block; None chooses by `num_particles`.
        blocks: Numbers of the blocks to walk; None walks all.
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction,
        x: Any,
        num_particles: int,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        block_size: int | None = None,
        blocks: Sequence[int] | None = None,
    ):
        seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        self.num_particles = at_least("num_particles", num_particles, 1)
        self.seed = at_least("seed", seed, 0)
        self.split = as_split(x)
        default = min(max(ROWS // self.num_particles, MIN_BLOCK), ROWS)
        self.size = at_least("block_size", default if block_size is None else block_size, 1)
        total = -(-len(self.split) // self.size)
        self.numbers = list(range(total) if blocks is None else blocks)
        distinct = set(self.numbers)
        if not distinct or not distinct <= set(range(total)) or len(distinct) < len(self.numbers):
            raise ValueError(f"blocks must be among 0 to {total - 1}, each once, got {blocks}")
        self.programs = in_precision(model, guide, dtype)

    def map(
        self,
        function: Callable[[Args, slice], T],
        task: str = "log p(x)",
        progress: bool = False,
        density: bool = True,
        shared: bool = False,
        kept: Kept | None = None,
    ) -> list[T]:
        """What a function makes of each block: of its data, and of where in the data they are.

        Args:
            function: Runs without gradients, in evaluation mode, under the block's noise.
            task: What the bar says.
            progress: Show a bar.
            density: Refuse first what has no density per datum; else what cannot run at all.
            shared: Divide the blocks among the processes of the group; each gets all results.
            kept: Blocks that are done already, and the file for those that are done here.
        """
        found: dict[int, T] = kept.found if kept else {}
        left = [number for number in self.numbers if number not in found]
        if shared:
            self.seed = _processes.gather(self.seed)[0]
            left = left[_processes.rank() :: _processes.size()]
        model, guide = self.programs.model, self.programs.guide
        with torch.no_grad(), self.programs.running():
            with program.undisturbed(model, guide):
                program.check(model, guide, self.args(slice(0, 7)), alone=density)
            bar = tqdm(left, desc=task, disable=not (progress and _processes.leads()))
            try:
                for number in bar:
                    found[number] = self._block(function, number)
                    if kept:
                        kept.save(at_once=False)
            finally:
                if kept:
                    kept.save()
        if shared:
            for theirs in _processes.gather({number: found[number] for number in left}):
                found |= theirs
        return [found[number] for number in self.numbers]

    def has_density(self) -> bool:
        """Whether the guide's latents all have a density; a plain autoencoder's have none."""
        guide = self.programs.guide
        return self.on_few(lambda few: not program.points(program.draw(guide, few)), density=False)

    def on_few(self, function: Callable[[Args], T], density: bool = True) -> T:
        """What a function makes of a few of the data, once the program has passed its checks.

        Args:
            function: Runs as in `map`, without a seed.
            density: Refuse first what has no density per datum; else what cannot run at all.
        """
        model, guide = self.programs.model, self.programs.guide
        with torch.no_grad(), self.programs.running(), program.undisturbed(model, guide):
            few = self.args(slice(0, 7))
            program.check(model, guide, few, alone=density)
            with program.in_mode(False, model, guide), program.validation(False):
                return function(few)

    def args(self, index: slice) -> Args:
        """Some of the data, as model and guide take them."""
        return tuple(self.programs.to(arg) for arg in program.as_args(self.split[index]))

    def where(self, number: int) -> slice:
        """Where in the data a block is."""
        return slice(number * self.size, (number + 1) * self.size)

    def _block(self, function: Callable[[Args, slice], T], number: int) -> T:
        model, guide = self.programs.model, self.programs.guide
        index = self.where(number)
        with program.undisturbed(model, guide), program.in_mode(False, model, guide):
            torch.manual_seed(key(self.seed, number))
            args = self.args(index)
            with program.validation(True):
                self._validate(args, index)
            with program.validation(False):
                return function(args, index)

    def _validate(self, args: Args, index: slice) -> None:
        """One particle under validation: data outside the support get no density, but a reason."""
        try:
            program.log_weights(self.programs.model, self.programs.guide, args, 1)
        except (ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            last = index.start + len(args[0]) - 1
            raise ValueError(
                f"the program fails on data {index.start} to {last}: {reason}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Programs:
    """Model and guide in the precision that the estimate is made in.

    Attributes:
        model: p(x, z).
        guide: q(z|x).
        dtype: What they were brought to; None where they run as they are.
        device: Where they are; None where they do not say.
    """

    model: PyroFunction
    guide: PyroFunction
    dtype: torch.dtype | None
    device: torch.device | None

    def to(self, tensor: Tensor) -> Tensor:
        """Bring data to where the programs are."""
        tensor = tensor.to(self.device) if self.device else tensor
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """In this precision, whatever the caller's; Pyro's store is as it was afterwards."""
        default, store = torch.get_default_dtype(), pyro.get_param_store()
        device_type = self.device.type if self.device else "cpu"
        token = nets.autocast.set(nullcontext)
        try:
            torch.set_default_dtype(self.dtype or default)
            with (
                program.store_kept(),
                torch.autocast(device_type, enabled=False),
                store.scope(_converted(store, self.dtype)) if self.dtype else nullcontext(),
            ):
                yield
        finally:
            torch.set_default_dtype(default)
            nets.autocast.reset(token)


def _converted(store: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The store's state with its parameters in another precision."""
    state = store.get_state()
    floats = {n: p.detach().to(dtype) for n, p in state["params"].items() if p.is_floating_point()}
    return {**state, "params": {**state["params"], **floats}}


def at_least(name: str, value: Any, least: int) -> int:
    """A whole number, Python's or numpy's, as an `int`.

    Raises:
        ValueError: If it is none, or too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def in_precision(model: PyroFunction, guide: PyroFunction, dtype: torch.dtype | None) -> Programs:
    """Model and guide in `dtype`, copied if they are in another."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    owned = [p for m in program.modules(model, guide) for p in m.parameters()]
    stored = list(pyro.get_param_store().get_state()["params"].values())
    now = {p.dtype for p in (*owned, *stored) if p.is_floating_point()}
    low = now & {torch.bfloat16, torch.float16}
    wanted = dtype or (torch.float32 if low else None)
    if wanted and {p.dtype for p in owned if p.is_floating_point()} - {wanted}:
        model, guide = copy.deepcopy((model, guide))
        for module in program.modules(model, guide):
            if module not in program.owners(model, guide):
                raise ValueError(
                    f"{wanted} runs on a copy, and the modules of a plain function cannot be "
                    "copied: make them attributes of an nn.Module, or convert them yourself"
                )
            module.to(wanted)
    return Programs(model, guide, wanted, owned[0].device if owned else None)
