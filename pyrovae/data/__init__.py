"""Data sets and the user's own files, as the model sees them.

`load` reads a data set by name, file, folder or tensor, decides how its values are read, splits it,
and says what is done to it::

    dataset = data.load("digits")
    dataset.shape                  # (1, 8, 8)
    dataset.train[torch.arange(4)] # binarized afresh, float32, (4, 1, 8, 8)
    dataset.test.description       # "digits test split, 300 images, binarized once with seed 777"

Noise is drawn afresh in training and once, by seed, in validation and test: an estimate of
log p(x) then has one datum to speak of, the same on every device and in every run.
"""

from __future__ import annotations

import difflib
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.data import arrays, files, named
from pyrovae.data.arrays import Arrays
from pyrovae.data.labels import PartlyLabelled, hide_labels, known_or_not
from pyrovae.data.named import NAMES
from pyrovae.data.preprocess import Preprocess
from pyrovae.data.split import Split, as_split, dynamic_split, fixed_split

__all__ = [
    "NAMES",
    "DataSet",
    "PartlyLabelled",
    "Preprocess",
    "Split",
    "as_split",
    "file_split",
    "hide_labels",
    "known_or_not",
    "load",
]

Source = str | os.PathLike | Tensor | np.ndarray | torch.utils.data.Dataset


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three splits and what is done to their values.

    Attributes:
        name: Of the set, or of the file.
        train: What the model learns from.
        valid: What chooses between models.
        test: What is reported.
        preprocess: Stored values to what the model sees.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    preprocess: Preprocess

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one datum: `(C, H, W)` for images, `(D,)` for vectors."""
        return self.preprocess.shape

    @property
    def fingerprint(self) -> dict[str, int]:
        """A checksum of each split's stored values."""
        stored = {split.name: split.x for split in (self.train, self.valid, self.test)}
        tensors = {name: x for name, x in stored.items() if isinstance(x, Tensor)}
        return {name: zlib.crc32(x.cpu().numpy().tobytes()) for name, x in tensors.items()}

    @property
    def kind(self) -> str:
        """What the model sees: "binary", "grey" and "levels" (in [0, 1]), "real" or "counts"."""
        return self.preprocess.kind


def load(
    source: Source,
    root: str | os.PathLike | None = None,
    *,
    kind: str | None = None,
    binarize: str | None = None,
    dequantize: bool | None = None,
    standardize: bool | None = None,
    missing: bool = False,
    seed: int = 777,
) -> DataSet:
    """A data set by name, or the user's own data.

    Own data without splits are split 80/10/10 by a permutation. Only zeros and ones are read as
    binary; uint8, and floats in [0, 1] with two or more dimensions per datum, as grey; other
    integers from zero on as counts; everything else as real. Images `(N, H, W)` become
    `(N, 1, H, W)`, and binary or grey images with channels last get them first.

    Args:
        source: One of `NAMES`; a path (see `files.read`); a tensor or array with shape
            `(N, ...)`; or a torch data set, whose items are stacked once.
        root: Folder with the files of named sets; default `$PYROVAE_DATA`.
        kind: "binary", "grey", "levels" (whole grey levels, to which the likelihood gives
            probabilities), "real" or "counts": how stored values are read. None: detected.
        binarize: "dynamic" (afresh at each access in training, once by seed in validation and
            test), "fixed" (once by seed everywhere) or "none". None: the data set's default.
        dequantize: Add uniform noise to grey levels. None: unless they are binarized.
        standardize: Subtract the training mean and divide by the training standard deviation of
            each entry. None: where the data are real.
        missing: NaN marks a missing entry; otherwise NaN is an error.
        seed: Of splits, and of noise that is drawn once.

    Raises:
        FileNotFoundError: If a file is not there and cannot be downloaded.
        ValueError: If a file cannot be read, or the values are not what the arguments say.

    Example:
        >>> dataset = load(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
        >>> dataset.kind, dataset.shape, len(dataset.train)
        ('binary', (2,), 1)
    """
    found = _checked(_read(source, root, seed), kind, missing)
    rows = found.rows or named.shuffled(_own_sizes(len(found.x), found.name), seed)
    _check_splits(rows, found.name)
    preprocess = _preprocess(found, rows["train"], binarize, dequantize, standardize, missing, seed)
    splits = {name: _split(found, name, rows[name], preprocess) for name in rows}
    return DataSet(found.name, **splits, preprocess=preprocess)


def file_split(
    source: Source, preprocess: Preprocess, root: str | os.PathLike | None = None
) -> Split:
    """Data seen through an earlier run's preprocessing, drawn once: one datum is enough.

    Data that come with splits give their test split. Where the model sees binary data, binary data
    are taken as they are.

    Args:
        source: As in `load`.
        preprocess: Of the earlier run.
        root: As in `load`.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If shape or values are not those of the earlier run.
    """
    found = _read(source, root, preprocess.seed)
    if found.rows is not None:
        found = replace(found.take(found.rows["test"]), name=f"{found.name} test split")
    x = arrays.to_layout(found.x, preprocess.stored_kind)
    if tuple(x.shape[1:]) != preprocess.shape:
        raise ValueError(
            f"{found.name}: expected data of shape (N, {', '.join(map(str, preprocess.shape))}), "
            f"got {tuple(found.x.shape)}; reshape it to what the model was trained on"
        )
    preprocess = _for_values(x, preprocess, found.name)
    return fixed_split(x, found.y, found.name, preprocess, found.name, stream="test")


def _read(source: Source, root: str | os.PathLike | None, seed: int) -> Arrays:
    if isinstance(source, Tensor):
        return Arrays("tensor", arrays.to_tensor(source, "source").cpu())
    if isinstance(source, np.ndarray):
        return Arrays("array", arrays.to_tensor(source, "source"))
    if isinstance(source, torch.utils.data.Dataset):
        return Arrays(type(source).__name__, *arrays.from_torch_dataset(source))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "source: expected a name, a path, a tensor, an array or a torch Dataset, got "
            f"{type(source).__name__}"
        )
    if source in NAMES:
        root = root or os.environ.get("PYROVAE_DATA")
        return named.read_named(str(source), Path(root) if root else None, seed)
    return files.read(_path(source))


def _path(source: str | os.PathLike) -> Path:
    path = Path(source).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    close = difflib.get_close_matches(str(source).lower(), NAMES, 1)
    hint = f"did you mean {close[0]}?" if close else "check the name or the path"
    raise ValueError(
        f"data: expected one of {', '.join(NAMES)}, or a file or folder, "
        f"got {str(source)!r}; {hint}"
    )


def _checked(found: Arrays, kind: str | None, missing: bool) -> Arrays:
    """The arrays with their kind settled, their values checked and their layout ours."""
    arrays.check_finite(found.x, missing, found.name)
    kind = kind or found.kind or arrays.detect_kind(found.x)
    same = kind == found.kind or (kind, found.kind) == ("levels", "grey")
    known = found.max_value if same else None
    max_value = known or arrays.detect_max_value(found.x, kind)
    arrays.check_values(found.x, kind, max_value, found.name)
    x = arrays.to_layout(found.x, kind)
    return replace(found, x=x, kind=kind, max_value=float(max_value))


def _own_sizes(count: int, name: str) -> dict[str, int]:
    if count < 3:
        raise ValueError(
            f"{name}: expected at least three data, one for each of train, valid and test, "
            f"got {count}; give more data"
        )
    held_out = max(1, count // 10)
    return {"train": count - 2 * held_out, "valid": held_out, "test": held_out}


def _check_splits(rows: dict[str, Tensor], name: str) -> None:
    empty = [split for split, index in rows.items() if len(index) == 0]
    if empty:
        raise ValueError(f"{name}: expected data in each split, got none in {', '.join(empty)}")


def _preprocess(
    found: Arrays,
    train: Tensor,
    binarize: str | None,
    dequantize: bool | None,
    standardize: bool | None,
    missing: bool,
    seed: int,
) -> Preprocess:
    assert found.kind is not None, "settled by _checked"
    assert found.max_value is not None, "settled by _checked"
    if found.kind == "binary" and binarize in ("dynamic", "fixed"):
        binarize = "none"
    if binarize is None:
        binarize = found.binarize if found.kind == "grey" else "none"
    levels = found.kind == "grey" and binarize == "none" and found.max_value > 1
    loc = scale = None
    if found.kind == "real" if standardize is None else standardize:
        loc, scale = _moments(found.x[train])
    return Preprocess(
        stored_kind=found.kind,
        shape=tuple(found.x.shape[1:]),
        max_value=found.max_value,
        binarize=binarize,
        dequantize=levels if dequantize is None else dequantize,
        missing=missing,
        loc=loc,
        scale=scale,
        seed=seed,
    )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each observed entry; 0 and 1 where nothing is to be learnt."""
    x = x.to(torch.float64)
    loc = x.nanmean(0)
    scale = (x - loc).square().nanmean(0).sqrt()
    nan = x.isnan()
    low, high = x.masked_fill(nan, torch.inf).amin(0), x.masked_fill(nan, -torch.inf).amax(0)
    return loc.nan_to_num(), torch.where((low < high) & (scale > 0), scale, 1.0)


def _split(found: Arrays, name: str, rows: Tensor, preprocess: Preprocess) -> Split:
    part = found.take(rows)
    source = f"{found.name} {name} split"
    if name == "train" and preprocess.binarize != "fixed":
        return dynamic_split(part.x, part.y, name, preprocess, source)
    return fixed_split(part.x, part.y, name, preprocess, source, stream=name)


def _for_values(x: Tensor, preprocess: Preprocess, name: str) -> Preprocess:
    """The preprocessing that suits these values, once they are known to fit the earlier run."""
    arrays.check_finite(x, preprocess.missing, name)
    has_levels = preprocess.stored_kind in ("grey", "levels") and preprocess.max_value > 1
    is_binary = arrays.detect_kind(x) == "binary" and bool((x == 1).any())
    if has_levels and is_binary and preprocess.kind == "binary":
        return replace(preprocess, stored_kind="binary", max_value=1.0, binarize="none")
    if has_levels and is_binary:
        raise ValueError(
            f"{name}: expected grey levels from 0 to {preprocess.max_value:g}, got only 0 and 1; "
            "give grey data, or a run trained on binary data"
        )
    arrays.check_values(x, preprocess.stored_kind, preprocess.max_value, name)
    return preprocess
