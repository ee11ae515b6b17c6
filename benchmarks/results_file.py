"""A benchmark's results: a JSON file that is whole after every measurement, and what the numbers depend on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import graphprune as gp

Record = dict[str, Any]


class Results:
    """A file of results, written after every one."""

    def __init__(self, file: Path, *, fresh: bool) -> None:
        self.file = file
        self.data: Record = {} if fresh or not file.exists() else json.loads(file.read_text())

    def write(self) -> None:
        """In one step, so that a stop leaves the file whole."""
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.file)


def environment(args: argparse.Namespace, packages: Sequence[str]) -> Record:
    """What the numbers depend on, without naming the machine."""
    versions = {"python": platform.python_version(), "graphprune": gp.__version__}
    return {
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": "cpu",
        "threads": args.threads,
    }


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--fresh", action="store_true", help="forget the results there are")
    found.add_argument("--table", action="store_true", help="run nothing, write the tables from the results")
    found.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return found


def started(given: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, once threads are set and the folder is there."""
    args = given.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    return args
