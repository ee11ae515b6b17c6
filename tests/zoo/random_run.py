"""Prunes many random networks, and writes what came of them to `benchmarks/results/random_networks.{json,md}`.

    python -m tests.zoo.random_run --count 2000 --seed 0

Network k of a seed is always the same; a failure is tried again by `--only k`. Results are written as they come, so a
run that was interrupted goes on where it stopped; versions other than those it began with start it anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import graphprune as gp
from tests import shim
from tests.zoo.blocks import BLOCKS
from tests.zoo.random_networks import Outcome, Step, check, drawn

CONSOLE = Console()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVERY = 20
"""Networks between two writes."""
Record = dict[str, Any]


def versions() -> Record:
    found = {"python": platform.python_version(), "torch": torch.__version__, "graphprune": gp.__version__}
    return {**found, "machine": f"{platform.machine()}, one thread of {os.cpu_count()}"}


def fresh(seed: int) -> Record:
    """A run that has done nothing yet."""
    return {
        "seed": seed,
        "versions": versions(),
        "done": 0,
        "blocks": dict.fromkeys(BLOCKS, 0),
        "blocks_with_a_group_of_their_own": dict.fromkeys(BLOCKS, 0),
        "asked": {},
        "emitted": {},
        "groups": 0,
        "channels": 0,
        "removed": 0,
        "with_groups": 0,
        "moved": 0,
        "front_ends_alike": 0,
        "unknown_ops": {},
        "largest_error": 0.0,
        "largest_error_at": None,
        "seconds": 0.0,
        "slowest": 0.0,
        "slowest_at": None,
        "failures": [],
    }


def add(run: Record, number: int, steps: Sequence[Step], emit: str, outcome: Outcome) -> None:
    """Take the outcome of one network into the sums of a run."""
    for name, found in (("asked", [emit]), ("emitted", [outcome.emitter]), ("unknown_ops", outcome.unknown)):
        run[name] = dict(Counter(run[name]) + Counter(found))
    for kind in outcome.own:
        run["blocks_with_a_group_of_their_own"][kind] += 1
    run["groups"] += len(outcome.sizes)
    run["channels"] += sum(outcome.sizes.values())
    run["removed"] += outcome.removed
    run["with_groups"] += bool(outcome.sizes)
    run["moved"] += outcome.effect > 1e-3
    run["front_ends_alike"] += bool(outcome.alike)
    for name, value in (("largest_error", outcome.error), ("slowest", outcome.seconds)):
        if value > run[name]:
            run |= {name: value, f"{name}_at": number}
    run["seconds"] += outcome.seconds


def one(run: Record, number: int) -> None:
    """Draw a network, prune it, and note what came of it, failures too."""
    steps, seed, emit = drawn(run["seed"], number)
    kinds = [s.kind for s in steps]
    for kind in set(kinds):
        run["blocks"][kind] += 1
    try:
        outcome = check(steps, seed, emit, fronts=True)
        add(run, number, steps, emit, outcome)
        if not outcome.alike:
            raise AssertionError("recording and export give other groups")
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        run["failures"].append({"network": number, "blocks": kinds, "error": f"{type(error).__name__}: {line}"})
        CONSOLE.print(f"network {number} of seed {run['seed']}: {run['failures'][-1]}")
    run["done"] = number + 1


def write(run: Mapping[str, Any], path: Path) -> None:
    """The JSON file and the table beside it, each in one go."""
    for file, text in ((path, json.dumps(run, indent=1) + "\n"), (path.with_suffix(".md"), table(run))):
        beside = file.with_suffix(".part")
        beside.write_text(text)
        os.replace(beside, file)


def table(run: Mapping[str, Any]) -> str:
    """The run in words and one table."""
    counts = ", ".join(f"{name} {n}" for name, n in sorted(run["emitted"].items()))
    rows = [f"| {k} | {n} | {run['blocks_with_a_group_of_their_own'][k]} |" for k, n in run["blocks"].items()]
    failures = [f"* network {f['network']} ({', '.join(f['blocks'])}): {f['error']}" for f in run["failures"]]
    lines = [
        "# Random networks",
        "",
        f"By `python -m tests.zoo.random_run --count {run['done']} --seed {run['seed']}`; "
        f"graphprune {run['versions']['graphprune']}, torch {run['versions']['torch']}, "
        f"python {run['versions']['python']}, {run['versions']['machine']}; ended {run['date']}.",
        "",
        "Each is a random directed graph of one to six blocks between two inputs and two outputs. A random plan removes",
        "two channels of five, and the result must equal the zeroed original (1e-9, float64); then both run once more with",
        "another batch size (1e-4, float32). Recording and export must give the same groups.",
        "",
        f"* {run['done']} networks, {run['with_groups']} of them with groups; {len(run['failures'])} failures",
        f"* emitters: {counts} (asked for: {', '.join(f'{k} {n}' for k, n in sorted(run['asked'].items()))}); *none*",
        "  where there was no group, *refused* where a plan gave one width to what an op tells apart by size",
        f"* {run['groups']} groups of {run['channels']} channels, of which {run['removed']} were removed",
        f"* largest relative error {run['largest_error']:.1e} (network {run['largest_error_at']}); zeroing moved the "
        f"outputs by more than 1e-3 in {run['moved']} networks",
        f"* recording and export gave the same groups for {run['front_ends_alike']} networks",
        f"* ops without a rule: {', '.join(run['unknown_ops']) or 'none'}",
        f"* {run['seconds']:.0f} s in all, {run['slowest']:.1f} s the slowest (network {run['slowest_at']})",
        "",
        *(["Failures", "", *failures, ""] if failures else []),
        "| block | networks | with a group of its own |",
        "|---|---:|---:|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="networks in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="prune this network alone, write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "random_networks.json")
    args = parser.parse_args()
    shim.install()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="LSTM with projections")
    if args.only is not None:
        steps, seed, emit = drawn(args.seed, args.only)
        CONSOLE.print(*steps, emit, check(steps, seed, emit, fronts=True), sep="\n")
        return
    run = json.loads(args.out.read_text()) if args.out.exists() else fresh(args.seed)
    if (run["seed"], run["versions"]) != (args.seed, versions()):
        run = fresh(args.seed)
    try:
        for number in track(range(run["done"], args.count), description="random networks", console=CONSOLE):
            one(run, number)
            if run["done"] % EVERY == 0:
                run["date"] = f"{datetime.date.today()}"
                write(run, args.out)
    except KeyboardInterrupt:
        CONSOLE.print(f"stopped after {run['done']} networks; the same command goes on")
    run["date"] = f"{datetime.date.today()}"
    write(run, args.out)


if __name__ == "__main__":
    main()
