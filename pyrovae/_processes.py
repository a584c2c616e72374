"""Processes that train or estimate together, one on each device, and what they tell each other.

Whoever launched them (`--devices`, `torchrun`, SLURM), they are torch's default process group; a
process of its own is a group of one. Data and randomness are divided by rank, so each process runs
the same program.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of the group ended before its work was done."""


def launched() -> tuple[int, int]:
    """Nodes, and processes on each, that were launched for this program: 1, 1 if it is alone."""
    env = os.environ
    if TorchElasticEnvironment.detect():
        local = int(env["LOCAL_WORLD_SIZE"])
        return int(env["WORLD_SIZE"]) // local, local
    if SLURMEnvironment.detect():
        nodes = int(env.get("SLURM_NNODES", 1))
        return nodes, int(env["SLURM_NTASKS"]) // nodes
    if "LOCAL_RANK" in env:  # by Fabric, for --devices
        return 1, int(env.get("WORLD_SIZE", 1))
    return 1, 1


def rank() -> int:
    """Number of this process; 0 leads: it writes and speaks."""
    return dist.get_rank() if _grouped() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _grouped() else 1


def leads() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of each tensor, in one message."""
    if size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    _told(functools.partial(dist.all_reduce, flat))
    parts = flat.to(tensors[0].device).split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def agree(tensors: Sequence[Tensor]) -> None:
    """Give tensors the values that they have in the first process."""
    if size() > 1:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            _told(functools.partial(dist.broadcast, sent, 0))
            tensor.data.copy_(sent)


def gather(mine: T) -> list[T]:
    """What each process has, by rank."""
    if size() == 1:
        return [mine]
    everyones: list[Any] = [None] * size()
    _told(functools.partial(dist.all_gather_object, everyones, mine))
    return everyones


def leave() -> None:
    """Leave the group."""
    if _grouped():
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _told(message: Callable[[], Any]) -> None:
    try:
        message()
    except RuntimeError as error:
        raise ProcessLost(
            f"process {rank()} of {size()} lost another one, whose own message says why"
        ) from error
