"""The state of training on disk: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUPS = ("tensors", "best", "optimizer")


@dataclass
class Checkpoint:
    """Everything from which training goes on.

    Attributes:
        settings: Of the run; a checkpoint continues no other.
        history: Rows of the epochs done.
        compiled: Whether steps are compiled: other noise, so decided once.
        tensors: Parameters and buffers.
        best: The same where validation was best.
        optimizer: Slots of the optimizer, `parameter.slot`.
    """

    settings: dict[str, Any]
    history: list[dict[str, Any]]
    compiled: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        plain = {"settings": self.settings, "history": self.history, "compiled": self.compiled}
        tensors = {f"{g}/{name}": t for g in GROUPS for name, t in getattr(self, g).items()}
        write_tensors(path, tensors, {"training": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path, settings: dict[str, Any]) -> Checkpoint:
        """Read the file of a run with these settings.

        Raises:
            ValueError: If it is missing or cut short, or its settings are others.
        """
        tensors, metadata = read_tensors(path)
        try:
            plain = json.loads(metadata["training"])
            there = plain["settings"]
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a checkpoint of training") from error
        differing = [n for n in {**settings, **there} if settings.get(n) != there.get(n)]
        if differing:
            listed = ", ".join(f"{n} {there.get(n)} (now {settings.get(n)})" for n in differing)
            raise ValueError(f"{path} is of a run with other settings: {listed}")
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = tensor
        return cls(there, plain["history"], plain["compiled"], **groups)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file that is there whole or not at all."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: If it is missing, cut short or not of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error


class replacing:
    """A temporary name beside `path`, renamed to it if all goes well."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
