"""Peers side by side: interleaved repetitions, medians, ratios."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pyrovae import data
from pyrovae.runs import made_by

sys.path.insert(0, str(Path(__file__).parent.parent))
import _results


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags that all benchmarks take."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--data-root", help="folder with MNIST; random pixels without it")
    made.add_argument("--repetitions", type=int, default=7)
    _results.add_flags(made)
    return made


def results_file(asked: argparse.Namespace, name: str) -> Path:
    """Where a benchmark writes."""
    return _results.folder(asked) / f"{name}.json"


def pixels(data_root: str | None, count: int) -> Tensor:
    """MNIST's training images as uint8 rows, or random ones."""
    if data_root is None:
        return torch.randint(0, 256, (count, 784), dtype=torch.uint8)
    return data.load("mnist", data_root).train.x[:count].reshape(-1, 784)


def interleaved(peers: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each peer over repetitions in which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    names = list(peers)
    for repetition in range(repetitions):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            gc.collect()
            start = time.perf_counter()
            peers[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def built(makers: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    """Each peer made and run once, so that what is compiled is; those not installed are named."""
    peers = {}
    for name, make in makers.items():
        try:
            peers[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        peers[name]()
    return peers


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":")[1].strip() for x in lines if "model name" in x), processor)
    versions = {}
    for name in ("jax", "numpyro", "pythae"):
        try:
            versions[name] = metadata.version(name)
        except ImportError:
            continue
    instructions = torch.backends.cpu.get_cpu_capability()
    machine = {"processor": processor, "instructions": instructions, "cores": os.cpu_count()}
    return made_by() | versions | machine
