"""Where the experiments write."""

import argparse
import io
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

RESULTS = Path(__file__).parent / "results"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where results go."""
    parser.add_argument("--results", type=Path, help=f"folder to write to; default: {RESULTS}")
    parser.add_argument("--smoke", action="store_true", help="seconds, offline, to a new folder")


def folder(asked: argparse.Namespace) -> Path:
    """Where results go: a trial of seconds does not mix with what was measured."""
    chosen = asked.results or (Path(tempfile.mkdtemp()) if asked.smoke else RESULTS)
    chosen.mkdir(exist_ok=True)
    return chosen


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG of 150 dpi and 256 colours, which takes half the room of one with all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True)
