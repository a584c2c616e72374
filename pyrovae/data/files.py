"""Readers of the user's own files: arrays, tables, folders of images.

No reader runs code from a file: NumPy's are read without pickles, torch's with weights only.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.arrays import Arrays, to_labels, to_tensor

__all__ = ["read"]

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SPLITS = ("train", "valid", "test")
_LABELS = ("label", "y")


def read(path: Path) -> Arrays:
    """The data in a file, or in a folder of images.

    * `.npy`: an array.
    * `.npz`: `x` and maybe `y`; or `train`, `valid`, `test` and maybe `y_train`, `y_valid`,
      `y_test`; or one array under any name.
    * `.pt`: a tensor, or a dictionary with the names of an `.npz`.
    * `.csv`: numbers between commas, a header or not, empty cells missing, labels in a column
      named `label` or `y`.
    * A folder: images of one size and mode in order of their names; class folders give labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return Arrays(path.name, to_tensor(_read_image(path)[None], path.name))
    if suffix not in _READERS:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(_READERS)}, an image, or a folder of "
            f"images, got {suffix or 'no ending'!r}; convert it, or pass a tensor"
        )
    return _READERS[suffix](path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: expected a whole, readable file, got {type(error).__name__} "
            f"({reason[:120]}); write it again or fetch a fresh copy"
        ) from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` by name."""
    with reading(path), open(path, "rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        return {name: loaded[name] for name in loaded.files}


def _read_npy(path: Path) -> Arrays:
    with reading(path), open(path, "rb") as file:
        array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected one array, got several; rename it to .npz")
    return Arrays(path.name, to_tensor(array, str(path)))


def _read_pt(path: Path) -> Arrays:
    with reading(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        return Arrays(path.name, to_tensor(loaded, str(path)))
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: expected a tensor or a dictionary of tensors, got {type(loaded).__name__}; "
            "save it with torch.save(x, path)"
        )
    return from_names(path, loaded)


def from_names(path: Path, arrays: Mapping[str, Any]) -> Arrays:
    """The data among named arrays: one array, `x` and `y`, or one array for each split."""
    if set(_SPLITS) <= set(arrays):
        return _from_splits(path, arrays)
    name = "x" if "x" in arrays else next(iter(arrays), None)
    if name is None or ("x" not in arrays and len(arrays) != 1):
        raise ValueError(
            f"{path}: expected arrays named x (and y), or train, valid and test, "
            f"got {', '.join(map(str, arrays)) or 'none'}; rename them"
        )
    x = to_tensor(arrays[name], f"{path} [{name}]")
    y = to_labels(arrays["y"], len(x), f"{path} [y]") if "y" in arrays and name != "y" else None
    return Arrays(path.name, x, y)


def _from_splits(path: Path, arrays: Mapping[str, Any]) -> Arrays:
    parts = {name: to_tensor(arrays[name], f"{path} [{name}]") for name in _SPLITS}
    shapes = {name: tuple(part.shape[1:]) for name, part in parts.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"{path}: expected splits of one shape, got {shapes}; reshape them")
    labels = [
        to_labels(arrays[f"y_{name}"], len(part), f"{path} [y_{name}]")
        for name, part in parts.items()
        if f"y_{name}" in arrays
    ]
    if labels and len(labels) < len(parts):
        raise ValueError(f"{path}: expected y_train, y_valid and y_test or none; add the missing")
    rows = in_order({name: len(part) for name, part in parts.items()})
    x = torch.cat(list(parts.values()))
    return Arrays(path.name, x, torch.cat(labels) if labels else None, rows)


def in_order(sizes: dict[str, int]) -> dict[str, Tensor]:
    """Rows of splits that lie one after the other."""
    rows = torch.arange(sum(sizes.values())).split(list(sizes.values()))
    return dict(zip(sizes, rows, strict=True))


def _read_csv(path: Path) -> Arrays:
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        lines = [cells for cells in csv.reader(file) if any(cell.strip() for cell in cells)]
    has_header = bool(lines) and not all(_is_number(cell) for cell in lines[0])
    header = [cell.strip().lower() for cell in lines.pop(0)] if has_header else []
    if not lines:
        raise ValueError(f"{path}: expected rows of numbers, got none; check how it was written")
    width = len(header or lines[0])
    table = np.array([_numbers(path, i, row, width) for i, row in enumerate(lines, 1)])
    where = next((header.index(name) for name in _LABELS if name in header), None)
    x = table if where is None else np.delete(table, where, axis=1)
    whole = not any("." in cell or "e" in cell.lower() for row in lines for cell in row)
    if whole and bool(np.isfinite(x).all()):
        x = x.astype(np.int64)
    y = None if where is None else to_labels(table[:, where], len(table), f"{path} [label]")
    return Arrays(path.name, to_tensor(x, str(path)), y)


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return not cell.strip()
    return True


def _numbers(path: Path, number: int, row: list[str], width: int) -> list[float]:
    if len(row) != width:
        raise ValueError(
            f"{path}: expected {width} cells in each row, got {len(row)} in data row {number}; "
            "separate cells by commas and leave missing ones empty"
        )
    bad = next((cell for cell in row if not _is_number(cell)), None)
    if bad is not None:
        raise ValueError(
            f"{path}: expected numbers, got {bad!r} in data row {number}; "
            "encode words as numbers, and separate cells by commas"
        )
    return [float(cell) if cell.strip() else float("nan") for cell in row]


def _read_folder(path: Path) -> Arrays:
    images = _images_in(path)
    classes = {folder.name: _images_in(folder) for folder in sorted(path.iterdir())}
    classes = {name: found for name, found in classes.items() if found}
    if bool(images) == bool(classes):
        raise ValueError(
            f"{path}: expected images ({', '.join(_IMAGES)}) either in the folder or in class "
            f"folders inside, got {'both' if images else 'none'}; move or convert them"
        )
    files = images or [file for found in classes.values() for file in found]
    x = to_tensor(_stack(files), str(path))
    if not classes:
        return Arrays(path.name, x)
    y = [label for label, found in enumerate(classes.values()) for _ in found]
    return Arrays(path.name, x, torch.tensor(y))


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (file for file in folder.iterdir() if file.suffix.lower() in _IMAGES)
    return sorted(file for file in found if not file.name.startswith("."))


def _stack(files: list[Path]) -> np.ndarray:
    first = _read_image(files[0])
    stack = np.empty((len(files), *first.shape), first.dtype)
    for i, file in enumerate(files):
        image = _read_image(file)
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{files[0].parent}: expected images of one size and mode, got "
                f"{files[0].name} {_size(first)} and {file.name} {_size(image)}; resize or convert"
            )
        stack[i] = image
    return stack


def _size(image: np.ndarray) -> str:
    return f"({' x '.join(map(str, image.shape))} {image.dtype})"


def _read_image(path: Path) -> np.ndarray:
    """Grey as `(1, H, W)` and colours as `(3, H, W)`; palettes become RGB, transparency goes."""
    from PIL import Image

    with reading(path), Image.open(path) as image:
        if image.mode == "LA":
            pixels = np.array(image.convert("L"))
        elif image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
            pixels = np.array(image)
        else:
            pixels = np.array(image.convert("RGBA").convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


_READERS = {
    ".npy": _read_npy,
    ".npz": lambda path: from_names(path, read_npz(path)),
    ".pt": _read_pt,
    ".csv": _read_csv,
}
