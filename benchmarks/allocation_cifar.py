"""What methods of allocation are worth: accuracy of ResNet-56 on CIFAR-10 at equal MACs, without any training.

    python benchmarks/allocation_cifar.py --data DIR --weights resnet56-*.th
    python benchmarks/allocation_cifar.py --data DIR --weights resnet56-*.th --seeds 0 --groups all --targets 0.7
    python benchmarks/allocation_cifar.py --table               # write the table anew from the JSON

The network, the images and what is measured are those of `importance.py`. Results go to
`results/allocation_cifar.json` as they come and the table to `results/allocation_cifar.md`. A run goes on from what the
results hold; with `--fresh` it starts anew.

Fisher scores are changes of the loss, and compared as they are. Reconstruction errors are divided by the error of
losing the whole group, as outputs of layers have no common scale. Every group keeps at least a tenth of its channels,
which torch-pruning is told too. It is run local (the same fraction of every layer) and global (one threshold), its
networks are the largest within the same MACs by the same count, and they are not repaired.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from importance_accuracy import SETTINGS, Subject
from importance_data import Test, calibration, cifar, training
from importance_peer import Peer
from importance_table import over_seeds, percent, table
from results_file import Results, environment, parser, started

import graphprune as gp
from graphprune.allocate import METHODS
from graphprune.importance import Removal, ordered

Record = dict[str, Any]
FLOOR = 0.1
STATISTICS = ("gradients", "moments")
REPAIRS = ("none", "least_squares")
TARGETS = (0.7, 0.5)
PEERS = tuple(f"torch-pruning {name}" for name in ("magnitude", "Taylor", "Hessian"))
SCOPES: Mapping[str, Mapping[str, Any]] = {"local": {}, "global": {"global_pruning": True}}


def relative(subject: Subject) -> dict[str, Removal]:
    """Reconstruction errors, as fractions of that of losing the whole group."""
    orders = gp.importance.Reconstruction(subject.statistics)(subject.network, subject.coupling)
    found = {name: ordered(order) for name, order in orders.items()}
    return {name: Removal(o.order, o.costs / o.costs.sum()) for name, o in found.items() if isinstance(o, Removal)}


CRITERIA: Mapping[str, Callable[[Subject], Any]] = {
    "Fisher": lambda subject: gp.importance.Fisher(subject.statistics)(subject.network, subject.coupling),
    "reconstruction": relative,
}


def cells(args: argparse.Namespace) -> list[Record]:
    """What is to be measured, the cheapest questions first."""
    found = []
    for seed, groups, target in itertools.product(args.seeds, args.groups, args.targets):
        about = {"seed": seed, "groups": groups, "target": target}
        ours, peers = itertools.product(CRITERIA, METHODS), itertools.product(PEERS, SCOPES)
        found += [about | {"criterion": name, "allocation": how} for name, how in (*ours, *peers)]
    return found


def measured(cell: Record, subject: Subject, test: Test) -> Record:
    """The cell with what one method does with one criterion, and what repair makes of it."""
    if cell["criterion"] in PEERS:
        peer = Peer(subject, {**SCOPES[cell["allocation"]], "max_pruning_ratio": 1 - FLOOR})
        return peer.measured(cell | {"accuracy": {}}, test)
    scores = CRITERIA[cell["criterion"]](subject)
    target = gp.Target(macs=cell["target"], floor=FLOOR)
    plan = gp.allocate(scores, target, subject.coupling, method=cell["allocation"])
    small, verification = subject.pruned(plan)
    cell |= {"kept": subject.kept(plan), "error": verification.error, "accuracy": {}}
    for how in REPAIRS:
        network, _ = subject.repaired(small, plan, how)
        cell["accuracy"][how] = asdict(test.accuracy(network))
    return cell


def run(args: argparse.Namespace, results: Results) -> None:
    """Every cell asked for that the results lack."""
    test, images = Test(*cifar.load_test(args.data, args.limit)), training(args.data)
    network = cifar.load_network(args.weights)
    results.data |= {"environment": environment(args, ("torch", "torch-pruning", "numpy"))}
    results.data |= {"calibration_images": args.images, "floor": FLOOR}
    if "base" not in results.data:
        results.data["base"] = asdict(test.accuracy(network, screen=False))
    done: list[Record] = results.data.setdefault("cells", [])
    known = {key(cell) for cell in done}
    start, now, subject = time.perf_counter(), None, None
    for cell in cells(args):
        if key(cell) in known:
            continue
        if subject is None or now != (cell["seed"], cell["groups"]):
            now = cell["seed"], cell["groups"]
            chosen = calibration(*images, cell["seed"], args.images)
            subject = Subject(network, SETTINGS[cell["groups"]], chosen, STATISTICS)
        done.append(measured(cell, subject, test))
        results.write()
        print(f"{(time.perf_counter() - start) / 60:5.1f} min  {line(done[-1])}", flush=True)


def key(cell: Record) -> tuple[Any, ...]:
    """What tells cells apart."""
    return tuple(cell[name] for name in ("seed", "groups", "target", "criterion", "allocation"))


def line(cell: Record) -> str:
    """One cell on one line."""
    found = " ".join(f"{how} {percent(a)}" for how, a in cell["accuracy"].items())
    return f"{' '.join(map(str, key(cell)))}: {found} (MACs {cell['kept']['macs']:.4f})"


def text(data: Record) -> str:
    """A table per set of groups."""
    versions = ", ".join(f"{name} {version}" for name, version in data["environment"]["versions"].items())
    lines = [
        "# Allocation on CIFAR-10",
        "",
        f"{versions}; {data['environment']['threads']} thread, {data['environment']['date']}.",
        f"ResNet-56, {percent(data['base'])} before; {data['calibration_images']} training images to calibrate.",
        "Percent of the 10 000 test images without any training; with a tilde, of the first 2000, where fewer than",
        "60 % of those were right. A cell shows: no repair / least squares. Where several seeds were run: mean ±",
        "standard deviation (seeds). Reconstruction errors are relative to that of losing the whole group.",
        f"Every group keeps at least {data['floor']:.0%} of its channels; torch-pruning is not repaired.",
        "",
    ]
    for groups in dict.fromkeys(cell["groups"] for cell in data["cells"]):
        held = [cell for cell in data["cells"] if cell["groups"] == groups]
        targets = sorted({cell["target"] for cell in held}, reverse=True)
        rows = []
        for name, how in dict.fromkeys((cell["criterion"], cell["allocation"]) for cell in held):
            row = [f"{name}, {how}"]
            for target in targets:
                found = [c for c in held if (c["criterion"], c["allocation"], c["target"]) == (name, how, target)]
                repairs = REPAIRS if name not in PEERS else REPAIRS[:1]
                kept = min((c["kept"]["macs"] for c in found), default=0.0)
                row += [" / ".join(over_seeds(found, repair) for repair in repairs), f"{kept:.4f}"]
            rows.append(row)
        header = ["criterion, allocation"]
        for target in targets:
            header += [f"MACs {target}", "kept, at least"]
        what = "All groups" if groups == "all" else "Inner groups; the residual stream is kept"
        lines += [f"## {what}", "", *table(header, rows), ""]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write the table."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="directory of CIFAR-10")
    options.add_argument("--weights", type=Path, help="resnet56-*.th")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which calibration images")
    options.add_argument("--groups", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="fractions of MACs to keep")
    options.add_argument("--images", type=int, default=1000, help="calibration images")
    options.add_argument("--limit", type=int, help="use only the first test images")
    args = started(options)
    results = Results(args.out / "allocation_cifar.json", fresh=args.fresh)
    if not args.table:
        if not args.data or not args.weights:
            options.error("it needs --data and --weights")
        run(args, results)
    (args.out / "allocation_cifar.md").write_text(text(results.data))


if __name__ == "__main__":
    main()
