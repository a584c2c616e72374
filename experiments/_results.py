"""Where the experiments write."""

import argparse
import tempfile
from pathlib import Path

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
