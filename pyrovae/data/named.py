"""The data sets with a name, and where their files are looked for.

A file is looked for under the root folder, then in the cache folder. The root is only ever read.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.arrays import Arrays, to_tensor
from pyrovae.data.files import in_order, read_npz, reading

__all__ = ["NAMES"]

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_OMNIGLOT_VALID = 1345
_FREY_SIZES = {"train": 1565, "valid": 200, "test": 200}
_DIGITS_SIZES = {"train": 1197, "valid": 300, "test": 300}


def read_named(name: str, root: Path | None, seed: int) -> Arrays:
    """A data set of `NAMES`; the seed is for the splits that nobody fixed."""
    return _SETS[name](root, seed)


def shuffled(sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Rows of splits drawn without replacement."""
    count = sum(sizes.values())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return {name: order[rows] for name, rows in in_order(sizes).items()}


def _digits(root: Path | None, seed: int) -> Arrays:
    """Handwritten digits, 8x8 with 17 levels, inside scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = found.images.astype(np.uint8), found.target
    rows = shuffled(_DIGITS_SIZES, seed)
    return Arrays(
        "digits", to_tensor(x, "digits"), torch.from_numpy(y), rows, "grey", 16, "dynamic"
    )


def _mnist_like(name: str, class_name: str) -> Callable[[Path | None, int], Arrays]:
    """MNIST or Fashion-MNIST; the last sixth of the training file is for validation."""

    def read(root: Path | None, seed: int) -> Arrays:
        files = [_find(f"{class_name}/raw/{stem}", root) for stem in _IDX]
        if None in files:
            _download(name, class_name)
            files = [_find(f"{class_name}/raw/{stem}", None) for stem in _IDX]
        train, y_train, test, y_test = (_read_idx(_found(file, name)) for file in files)
        for images, labels in ((train, y_train), (test, y_test)):
            if len(images) != len(labels):
                raise ValueError(
                    f"{name}: expected one label per image, got {len(images)} images and "
                    f"{len(labels)} labels; fetch fresh copies of the files"
                )
        valid = len(train) // 6
        rows = in_order({"train": len(train) - valid, "valid": valid, "test": len(test)})
        y = torch.cat([y_train, y_test]).to(torch.int64)
        return Arrays(name, torch.cat([train, test]), y, rows, "grey", 255, "dynamic")

    return read


def _binarized_mnist(root: Path | None, seed: int) -> Arrays:
    """MNIST binarized once (Larochelle & Murray, 2011), packed eight pixels to a byte."""
    packed = _arrays("BinarizedMNIST/binarized_mnist.npz", root, ("train", "valid", "test"))
    parts = {name: np.unpackbits(packed[name], axis=-1) for name in ("train", "valid", "test")}
    x = torch.from_numpy(np.concatenate(list(parts.values()))).reshape(-1, 1, 28, 28)
    rows = in_order({name: len(part) for name, part in parts.items()})
    return Arrays("binarized-mnist", x, None, rows, "binary", 1)


def _omniglot(root: Path | None, seed: int) -> Arrays:
    """OMNIGLOT at 28x28: drawers 16 to 20 are the test split, labels are alphabets.

    Not the 28x28 file of Burda et al. (2016): log-likelihoods on the two are not comparable.
    """
    arrays = _arrays("OMNIGLOT/omniglot_28x28.npz", root, ("images", "alphabet", "drawer"))
    is_test = torch.from_numpy(arrays["drawer"] > 15)
    rest = (~is_test).nonzero().flatten()
    sizes = {"valid": _OMNIGLOT_VALID, "train": len(rest) - _OMNIGLOT_VALID}
    rows = {name: rest[order] for name, order in shuffled(sizes, seed).items()}
    y = torch.from_numpy(arrays["alphabet"].astype(np.int64))
    rows["test"] = is_test.nonzero().flatten()
    return Arrays(
        "omniglot", to_tensor(arrays["images"], "omniglot"), y, rows, "grey", 255, "dynamic"
    )


def _frey_faces(root: Path | None, seed: int) -> Arrays:
    """Frames of a film of one face, 28x20, shuffled: neighbours are alike, so the splits leak."""
    images = _arrays("FreyFace/frey_faces.npz", root, ("images",))["images"]
    rows = shuffled(_FREY_SIZES, seed)
    return Arrays("frey-faces", to_tensor(images, "frey-faces"), None, rows, "grey", 255)


_SETS: dict[str, Callable[[Path | None, int], Arrays]] = {
    "digits": _digits,
    "mnist": _mnist_like("mnist", "MNIST"),
    "fashion-mnist": _mnist_like("fashion-mnist", "FashionMNIST"),
    "binarized-mnist": _binarized_mnist,
    "omniglot": _omniglot,
    "frey-faces": _frey_faces,
}
NAMES: tuple[str, ...] = tuple(_SETS)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyrovae"


def _find(file: str, root: Path | None) -> Path | None:
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"root: expected a folder with data, got {root}; check the path")
    folders = [_cache()] if root is None else [root, _cache()]
    candidates = (folder / (file + end) for folder in folders for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _found(path: Path | None, name: str) -> Path:
    assert path is not None, f"the download of {name} left a file out"
    return path


def _arrays(file: str, root: Path | None, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    path = _find(file, root)
    if path is None:
        raise FileNotFoundError(
            f"{file}: no such file under {root or 'a data folder, as none was given'}; put it in a "
            "folder and name that folder by root (--data-root) or $PYROVAE_DATA"
        )
    arrays = read_npz(path)
    if not set(keys) <= set(arrays):
        raise ValueError(
            f"{path}: expected arrays named {', '.join(keys)}, got {', '.join(arrays)}; "
            "fetch a fresh copy"
        )
    return arrays


def _read_idx(path: Path) -> Tensor:
    """The array in an idx file, zipped or not: magic number, big-endian sizes, then bytes."""
    with reading(path):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if len(raw) < 4 or raw[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        start = 4 + 4 * raw[3]
        shape = np.frombuffer(raw[4:start], ">u4").astype(np.int64)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def _download(name: str, class_name: str) -> None:
    """Fetch the idx files into the cache folder with torchvision."""
    by_hand = (
        f"put {', '.join(f'{stem}.gz' for stem in _IDX)} in {class_name}/raw/ under a folder named "
        "by root (--data-root) or $PYROVAE_DATA"
    )
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(
            f"{name}: torchvision cannot be imported ({_first_line(error)}); torch and torchvision "
            f"from different builds do that: pip install --upgrade torch torchvision; or {by_hand}"
        ) from error
    try:
        getattr(datasets, class_name)(str(_cache()), download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: files not found and not downloaded ({_first_line(error)}); connect to the "
            f"network, or {by_hand}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
