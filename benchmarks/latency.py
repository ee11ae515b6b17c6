"""Latency: predicted against measured, a latency target against one of MACs, and what multiples of 8, 16, 32 are worth.

    taskset -c 0 python benchmarks/latency.py              # everything, to benchmarks/results/latency.{json,md}
    python benchmarks/latency.py --sections plans --models mobilenet_v2 --plans 5
    python benchmarks/latency.py --resume                  # goes on with what is not there yet

Three sections on one thread of a CPU, at one image of 224 x 224 and random weights. `plans` prunes each model by random
plans and compares the predicted time with the measured one. `target` prunes ResNet-50 to a latency, and searches the
MAC target that takes the same measured time: which of them loses less importance? `multiples` prunes ResNet-50 to half
of its MACs in multiples of 1, 8, 16 and 32. Times are wall clock, as ratios to the original, which runs in turn with
what is compared, in the same loop: the median of the ratios of `--rounds` rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import shim
import torch
from torch import nn

import graphprune as gp
from graphprune.cost import macs, widths
from graphprune.errors import TargetError
from graphprune.importance import ordered
from graphprune.latency.clock import settle
from graphprune.latency.store import identity
from graphprune.pruning import emit_verified

shim.install()

Record = dict[str, Any]
MODELS = ("resnet50", "mobilenet_v2", "vit_small_patch16_224")
PACKAGES = ("torch", "torchvision", "timm", "numpy")
MULTIPLES = (1, 8, 16, 32)
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
CPU = torch.device("cpu")
SAME = 0.005
"""Two ratios that differ by no more count as the same time."""


class Subject:
    """A network, and how long it takes at any widths.

    Args:
        name: of a torchvision model, or of timm's.
        args: of the command line.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args = args
        self.model = build(name).eval()
        self.x = torch.randn(1, 3, args.size, args.size)
        self.coupling = gp.couple(gp.trace(self.model, self.x))
        self.macs = macs(self.coupling)
        start = time.perf_counter()
        latency = gp.Latency(seconds=args.seconds, cache=args.cache or False, measure=args.measure)
        self.latency = latency(self.model, self.x, self.coupling)
        self.seconds = time.perf_counter() - start
        found = gp.importance.Magnitude(normalize="mean")(self.model, self.coupling)
        self.scores = {name: score.double().square() for name, score in found.items()}

    def pruned(self, plan: gp.Plan) -> nn.Module:
        """What carries out a plan, the same class where that works."""
        return emit_verified(self.model, gp.Inputs.of(self.x), self.coupling, plan, verify=False)[0].model

    def about(self, plan: gp.Plan) -> Record:
        """What a plan keeps of the MACs and of the predicted time, and the share of all importance that it loses."""
        kept = widths(plan)
        lost = sum(float(ordered(score).lost[kept[name]]) for name, score in self.scores.items())
        return {
            "macs": self.macs.at(kept) / self.macs.at({}),
            "predicted": self.latency.at(kept) / self.latency.at({}),
            "lost": lost / sum(float(score.sum()) for score in self.scores.values()),
        }

    def allocated(self, target: gp.Target, method: str = "knapsack") -> gp.Plan:
        """The plan of a target."""
        return gp.allocate(self.scores, target, self.coupling, method=method, latency=self.latency)

    def measured(self, plans: Sequence[gp.Plan]) -> list[float]:
        """Measured times of what the plans leave, each relative to the original."""
        return ratios(self.model, [self.pruned(plan) for plan in plans], self.x, self.args)


def build(name: str) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(0)
    if name.startswith("vit_small"):
        import timm

        return timm.create_model(name, pretrained=False)
    import torchvision  # only now, since it needs the shim

    return torchvision.models.get_model(name, weights=None)


def ratios(model: nn.Module, others: Sequence[nn.Module], x: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Per model, its time over that of the original, as the median over rounds in which each runs once."""
    settle(CPU)
    clock = CLOCKS[args.clock]
    found: list[list[float]] = [[] for _ in others]
    with torch.no_grad():
        for k in range(args.rounds + 2):
            times = []
            for each in (model, *others):
                start = clock()
                each(x)
                times.append(clock() - start)
            if k > 1:
                for row, seconds in zip(found, times[1:], strict=True):
                    row.append(seconds / times[0])
    return [statistics.median(row) for row in found]


# -- sections ----------------------------------------------------------------------------------------------------


def plans(subject: Subject, count: int, done: Sequence[Record]) -> Iterator[Record]:
    """Random plans: each keeps at least a random fraction of every group, and of each group more at random."""
    for seed in range(count):
        if any(row["seed"] == seed for row in done):
            continue
        rng = np.random.default_rng(seed)
        least = rng.uniform(0.1, 0.9)
        keep = {}
        for group in subject.coupling.groups:
            width = int(np.ceil(group.size * rng.uniform(least, 1)))
            keep[group.name] = np.sort(rng.choice(group.size, width, replace=False)).tolist()
        plan = gp.Plan.of(subject.coupling, keep)
        yield {"seed": seed, **subject.about(plan), "measured": subject.measured([plan])[0]}


def target(subject: Subject, aim: float) -> Record:
    """A latency target, and the MAC target whose result takes as long."""
    plan = subject.allocated(gp.Target(latency=aim))
    found = {"target": aim, "latency": subject.about(plan) | {"measured": subject.measured([plan])[0]}}
    low, high = 0.0, 1.0
    guess = found["latency"]["macs"]
    for _ in range(8):
        try:
            other = subject.allocated(gp.Target(macs=guess))
        except TargetError:  # below what can be reached
            low, guess = guess, (guess + high) / 2
            continue
        first, second = subject.measured([plan, other])
        found["macs"] = subject.about(other) | {"target": guess, "measured": second, "latency_measured": first}
        if abs(second - first) <= SAME:
            break
        low, high = (guess, high) if second < first else (low, guess)
        guess = (low + high) / 2
    return found


def multiples(subject: Subject, share: float, method: str) -> list[Record]:
    """Half of the MACs in multiples of several numbers, all measured in the same rounds."""
    every = [subject.allocated(gp.Target(macs=share, multiple_of=m), method) for m in MULTIPLES]
    measured = subject.measured(every)
    rows = []
    for m, plan, ratio in zip(MULTIPLES, every, measured, strict=True):
        about = subject.about(plan)
        saved = (1 - ratio) / (1 - about["macs"])
        rows.append({"multiple_of": m, "method": method, **about, "measured": ratio, "time_saved_per_mac_saved": saved})
    return rows


# -- results -----------------------------------------------------------------------------------------------------


def agreement(rows: Sequence[Record]) -> Record:
    """How well predictions and measurements agree."""
    predicted, measured = (np.array([row[key] for row in rows]) for key in ("predicted", "measured"))
    error = np.abs(predicted / measured - 1)
    ranks = [values.argsort().argsort() for values in (predicted, measured)]
    correlation = float(np.corrcoef(*ranks)[0, 1]) if len(rows) > 1 else float("nan")
    return {
        "median_error": float(np.median(error)),
        "largest_error": float(error.max()),
        "rank_correlation": correlation,
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    about = results["environment"]
    lines = [
        "# Latency: predicted and measured",
        "",
        f"By `benchmarks/latency.py`, {about['date']}: torch {about['versions']['torch']}, {about['device']}, "
        f"{about['threads']} thread, {about['clock']} clock, "
        f"one image of {about['size']} x {about['size']}, random weights. Times are "
        f"relative to the original, which ran in the same rounds; medians of {about['rounds']} rounds.",
    ]
    if found := results.get("plans"):
        lines += [
            "",
            "## Random plans",
            "",
            "| model | plans | measured | median error | largest error | rank correlation | tables measured in |",
            "|---|---:|---|---:|---:|---:|---:|",
        ]
        for name, held in found.items():
            a, ratio = agreement(held["rows"]), [row["measured"] for row in held["rows"]]
            lines.append(
                f"| {name} | {len(ratio)} | {min(ratio):.2f} to {max(ratio):.2f} | {a['median_error']:.1%} | "
                f"{a['largest_error']:.1%} | {a['rank_correlation']:.3f} | {held['seconds']:.0f} s |"
            )
    if found := results.get("target"):
        lines += [
            "",
            f"## ResNet-50 to {found['target']:g} of its latency, and the MAC target that takes as long",
            "",
            "Knapsack, squared L2 norms that compare between groups; importance lost is the share of all. The search",
            "for the MAC target ends where both take the same time in the same rounds.",
            "",
            "| target | MACs kept | predicted | measured | importance lost |",
            "|---|---:|---:|---:|---:|",
        ]
        for kind in ("latency", "macs"):
            row = found[kind]
            asked = found["target"] if kind == "latency" else row["target"]
            lines.append(
                f"| {kind} {asked:.3f} | {row['macs']:.3f} | {row['predicted']:.3f} | {row['measured']:.3f} | "
                f"{row['lost']:.4f} |"
            )
        lines += ["", f"In the rounds of the MAC target the other took {found['macs']['latency_measured']:.3f}."]
    if found := results.get("multiples"):
        lines += [
            "",
            "## ResNet-50 to half of its MACs, in multiples",
            "",
            "| allocation | multiple of | MACs kept | predicted | measured | time per MAC saved | importance lost |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['method']} | {row['multiple_of']} | {row['macs']:.3f} | {row['predicted']:.3f} | "
            f"{row['measured']:.3f} | {row['time_saved_per_mac_saved']:.3f} | {row['lost']:.4f} |"
            for row in found
        ]
    return "\n".join(lines) + "\n"


def environment(args: argparse.Namespace) -> Record:
    """What the figures hold for."""
    asked = {name: getattr(args, name) for name in ("clock", "size", "rounds", "seconds")}
    return results_file.environment(args, PACKAGES) | {"device": identity(CPU)["device"]} | asked


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["plans", "target", "multiples"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of the section `plans`")
    parser.add_argument("--subject", default="resnet50", help="of the other sections")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="for measuring the tables of a model")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="`thread` where the machine is busy")
    parser.add_argument("--cache", help="folder of tables; without, they are measured anew in every run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", action="store_true", help="keep what is there, and add what is not")
    parser.set_defaults(measure=None, threads=1)
    return parser.parse_args()


def main() -> None:
    """Run what is asked for; results are written after every row."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "latency.json"
    file = results_file.Results(path, fresh=not args.resume)
    results = file.data
    results["environment"] = environment(args)

    def write() -> None:
        file.write()
        path.with_suffix(".md").write_text(table(results))

    held: dict[str, Subject] = {}
    for name in args.models if "plans" in args.sections else ():
        record = results.setdefault("plans", {}).setdefault(name, {"seconds": 0.0, "rows": []})
        if len(record["rows"]) >= args.plans:
            continue
        subject = Subject(name, args)
        record["seconds"] = subject.seconds
        for row in plans(subject, args.plans, record["rows"]):
            record["rows"].append(row)
            print(f"{name} {row['seed']}: predicted {row['predicted']:.3f}, measured {row['measured']:.3f}", flush=True)
            write()
        if name == args.subject:
            held[name] = subject
    wanted = [section for section in args.sections if section != "plans" and section not in results]
    if wanted:
        subject = held.get(args.subject) or Subject(args.subject, args)
        if "target" in wanted:
            results["target"] = target(subject, 0.6)
            write()
        if "multiples" in wanted:
            results["multiples"] = [row for m in ("uniform", "knapsack") for row in multiples(subject, 0.5, m)]
            write()
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
