"""The table of `cifar10.py`, from its JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def line(cell: Record) -> str:
    """What is printed of a cell as it comes."""
    what = f"{cell['removed']:.2f} of the channels" if "removed" in cell else f"target {cell['target']:.2f}"
    accuracy = cell["accuracy"]
    found = f"{100 * accuracy['pruned']:.2f} -> {100 * accuracy['tuned']:.2f}, MACs {cell['kept']['macs']:.3f}"
    return f"{cell['network']} {cell['method']}, {what}, seed {cell['seed']}: {found}"


def table(results: Record) -> str:
    """All of it, as Markdown: per network and settings the methods, then the curve of slimming."""
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    parts = [
        "# CIFAR-10",
        "Accuracy on the test images in percent: mean over seeds, and standard deviation where there are several. The "
        "epoch was chosen on images kept back from training. Channels inside blocks were pruned; the residual stream "
        "stays. In brackets: the strength of a penalty. Written by `benchmarks/cifar10.py`.",
        f"{env['device']}, threads: {env['threads']}; {versions}; last run {env['date']}.",
    ]
    keys = dict.fromkeys((c["network"], json.dumps(c["settings"])) for c in results["cells"])
    for network, settings in keys:
        of_both = [c for c in results["cells"] if (c["network"], json.dumps(c["settings"])) == (network, settings)]
        original = results["original"][network]
        told = ", ".join(f"{name} {value}" for name, value in json.loads(settings).items() if value is not None)
        parts += [f"## {network}: {100 * original['accuracy']:.2f} before, {original['macs'] / 1e6:.2f} M MACs", told]
        for name, head in (("target", "method"), ("removed", "channels removed after slimming")):
            if rows := _rows([c for c in of_both if name in c], name):
                columns = f"| {head} | MACs kept | parameters kept | pruned | fine-tuned | seeds | seconds |"
                parts.append("\n".join([columns, "|---|---:|---:|---:|---:|---:|---:|", *rows]))
    return "\n\n".join(parts) + "\n"


def _rows(cells: Sequence[Record], by: str) -> list[str]:
    """A line for each method and target, the best first; for a curve in order."""
    groups: dict[Any, list[Record]] = {}
    for cell in cells:
        groups.setdefault((cell["method"] + _strength(cell), cell[by]), []).append(cell)

    def order(item: Any) -> Any:
        (method, value), held = item
        return (value,) if by == "removed" else (-value, -statistics.mean(c["accuracy"]["tuned"] for c in held), method)

    rows = []
    for (method, value), held in sorted(groups.items(), key=order):
        kept = [statistics.mean(c["kept"][name] for c in held) for name in ("macs", "params")]
        found = [spread([100 * c["accuracy"][name] for c in held]) for name in ("pruned", "tuned")]
        seconds = statistics.mean(sum(c["seconds"].values()) for c in held)
        first = method if by == "target" else f"{value:.2f}"
        rows.append(
            f"| {first} | {kept[0]:.3f} | {kept[1]:.3f} | {found[0]} | {found[1]} | {len(held)} | {seconds:.0f} |"
        )
    return rows


def _strength(cell: Record) -> str:
    return f" ({cell['strength']:g})" if "strength" in cell else ""


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation of several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
