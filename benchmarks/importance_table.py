"""The results of the benchmark of importance as Markdown."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]
REPAIRS = ("none", "batchnorm", "bias", "least_squares")


def line(cell: Record) -> str:
    """One cell on one line."""
    about = f"{cell['network']} {cell['groups']:5} {cell['seed']} {cell['target']} {cell['criterion']:26}"
    if "error_text" in cell:
        return f"{about} {cell['error_text']}"
    found = " ".join(f"{how} {percent(a)}" for how, a in cell["accuracy"].items())
    seconds = sum(a.get("repair_s", 0) for a in cell["accuracy"].values())
    return f"{about} {found}  (MACs {cell['kept']['macs']:.3f}; repairs {seconds:.1f} s)"


def percent(found: Record) -> str:
    """An accuracy; with a tilde where not the whole test set was used."""
    return f"{'~' if found['images'] == 2000 else ''}{100 * found['accuracy']:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(item) for item in row) + " |" for row in lines]


def over_seeds(cells: Sequence[Record], how: str) -> str:
    """Mean accuracy over the seeds, and how many there are if more than one; a dash for none."""
    found = [cell["accuracy"][how] for cell in cells if how in cell["accuracy"]]
    if not found:
        return "-"
    if len(found) == 1:
        return percent(found[0])
    values = [100 * f["accuracy"] for f in found]
    rough = "~" if any(f["images"] == 2000 for f in found) else ""
    return f"{rough}{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(found)})"


def accuracy_text(data: Record) -> list[str]:
    """A table per network and set of groups."""
    lines = [
        "## Accuracy without fine-tuning",
        "",
        f"CIFAR-10, {data['calibration_images']} training images to calibrate. {_environment(data)}",
        "Percent of the 10 000 test images; with a tilde, of the first 2000, where fewer than 60 % of",
        "those were right. Every group keeps the same fraction, the largest that meets the target of multiply-adds.",
        "`all` prunes every group, `inner` keeps the residual stream. A cell shows, in order: no repair / nothing but",
        "batch-norm statistics taken anew / means given back / least squares. Where several seeds were run: mean ±",
        "standard deviation (seeds). torch-pruning is not repaired; its networks are the largest within the same",
        "target, by the same count.",
        "",
    ]
    cells = data["cells"]
    revisions = sorted({c["revision"] for c in cells if "revision" in c})
    if revisions:
        lines += [f"Cells are of revisions {', '.join(revisions)}, which each names in the JSON.", ""]
    for network, whole in data["base"].items():
        for groups in ("all", "inner"):
            mine = [c for c in cells if c["network"] == network and c["groups"] == groups]
            if mine:
                title = f"### {network}, {groups} groups (unpruned {100 * whole['accuracy']:.2f})"
                lines += [title, "", *_criteria(mine), "", *_found(mine, whole["accuracy"]), ""]
    return lines


def _criteria(cells: Sequence[Record]) -> list[str]:
    targets = sorted({c["target"] for c in cells}, reverse=True)
    rows = []
    for criterion in dict.fromkeys(c["criterion"] for c in cells):
        row = [criterion]
        for target in targets:
            same = [c for c in cells if c["criterion"] == criterion and c["target"] == target]
            failed = next((c for c in same if "error_text" in c), None)
            hows = ("none",) if criterion.startswith("torch-pruning") else REPAIRS
            row.append("fails" if failed else " / ".join(over_seeds(same, how) for how in hows))
        rows.append(row)
    return table(["criterion", *(f"{t:g} of MACs" for t in targets)], rows)


def _found(cells: Sequence[Record], whole: float) -> list[str]:
    """The best of each target, what a repair made worse, and what failed."""
    lines = []
    for target in sorted({c["target"] for c in cells}, reverse=True):
        means = [
            (statistics.mean(c["accuracy"][how]["accuracy"] for c in same), criterion, how)
            for criterion in dict.fromkeys(c["criterion"] for c in cells)
            for how in REPAIRS
            if (same := [c for c in cells if _is(c, criterion, target) and how in c["accuracy"]])
        ]
        if means:
            best, criterion, how = max(means)
            lost = 100 * (whole - best)
            lines.append(f"* {target:g}: best {criterion}, {how}: {100 * best:.2f}, {lost:.2f} points lost.")
    lines += filter(None, (_against(cells, how) for how in REPAIRS[1:]))
    errors = {(c["criterion"], c["error_text"]) for c in cells if "error_text" in c}
    return lines + [f"* {criterion}: {text}" for criterion, text in sorted(errors)]


def _is(cell: Record, criterion: str, target: float) -> bool:
    return (cell["criterion"], cell["target"]) == (criterion, target)


def _against(cells: Sequence[Record], how: str) -> str:
    """In how many cells a repair is better than none; empty where both were measured in no cell."""
    both = [c for c in cells if {"none", how} <= c["accuracy"].keys()]
    if not both:
        return ""
    worse = [c for c in both if c["accuracy"][how]["accuracy"] <= c["accuracy"]["none"]["accuracy"]]
    named = "; not " + ", ".join(f"{c['criterion']} at {c['target']:g}" for c in worse[:8]) if worse else ""
    more = ", ..." if len(worse) > 8 else ""
    return f"* {how} beats no repair in {len(both) - len(worse)} of {len(both)} cells{named}{more}."


def lite0_text(data: Record) -> list[str]:
    """EfficientNet-Lite0: accuracy and agreement."""
    base = data["base"]
    lines = [
        "## EfficientNet-Lite0",
        "",
        f"Over all 1000 classes of ImageNet, {base['images']} validation images of ten of them, of which the unpruned",
        f"network classifies {100 * base['accuracy']:.1f} % correctly. A cell shows percent correct and, in brackets,",
        "percent classified like the unpruned network, without repair -> after least squares. Statistics are of",
        f"{data['calibration_images']} images, least squares of as many as fit into memory. {_environment(data)}",
        "",
    ]
    for groups in ("inner", "all"):
        cells = [c for c in data["cells"] if c["groups"] == groups]
        targets = sorted({c["target"] for c in cells}, reverse=True)
        rows = []
        for criterion in dict.fromkeys(c["criterion"] for c in cells):
            found = {c["target"]: c for c in cells if c["criterion"] == criterion}
            rows.append([criterion, *(_guesses(found[t]) if t in found else "-" for t in targets)])
        if rows:
            lines += [f"### {groups} groups", "", *table(["criterion", *(f"{t:g} of MACs" for t in targets)], rows), ""]
    return lines


def _guesses(cell: Record) -> str:
    found = (f"{100 * a['accuracy']:.1f} ({100 * a['agreement']:.1f})" for a in cell["accuracy"].values())
    return cell.get("error_text") or " -> ".join(found)


def _environment(data: Record) -> str:
    env = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{versions}; {env['threads']} thread(s) of {env['cpus']} CPUs; {env['date']}."


def speed_text(data: Record) -> list[str]:
    """Seconds and memory per criterion, and what was aimed at."""
    lines = [
        "## Speed",
        "",
        "One run each, in a process of its own: seconds, and MiB that resident memory rose by. A criterion's time",
        "holds its own pass over the images, but not what is done once (trace and couple). ResNet-50 has random",
        f"weights and images; a dash was not measured. {_environment(data)}",
        "",
    ]
    names = list(data["rows"])
    header = ["what"]
    for name in names:
        header += [f"{name}, {data['sizes'][name][0]} images: s", "MiB"]
    rows = []
    for what in dict.fromkeys(what for name in names for what in data["rows"][name]):
        found = [data["rows"][name].get(what, {}) for name in names]
        if any("peak_bytes" in f for f in found):
            cells = (
                [f"{f['seconds']:.2f}", f"{f['peak_bytes'] / 2**20:.0f}"] if "seconds" in f else "--" for f in found
            )
            rows.append([what, *itertools.chain(*cells)])
    loads = [f["load_average_before"] for found in data["rows"].values() for f in found.values()]
    lines += [f"Load average before each: {min(loads):.1f} to {max(loads):.1f}, so seconds are upper bounds.", ""]
    return [*lines, *table(header, rows), "", *_beside(data), ""]


def _cost(found: Record) -> tuple[str, str]:
    if "peak_bytes" not in found:
        return "-", "-"
    return f"{found['seconds']:.2f}", f"{found['peak_bytes'] / 2**20:.0f}"


def _beside(data: Record) -> list[str]:
    """What is measured against something else."""
    lines = []
    for name, rows in data["rows"].items():
        if f := rows.get("Fisher beside plain"):
            took = f"{f['seconds']:.2f} s against {f['plain_s']:.2f} s"
            lines.append(f"* Fisher, {name}: {f['times_plain']:.2f} x a plain forward and backward ({took}).")
        if f := rows.get("ranks beside a loop"):
            took = f"{f['seconds']:.2f} s against {f['loop_s']:.2f} s and {f['batched_s']:.2f} s"
            lines.append(
                f"* Ranks of the {f['maps']} maps of {f['images']} images, {name}: {f['times_faster']:.1f} x faster "
                f"than `torch.linalg.matrix_rank` map by map ({took} in batches); {f['different']} ranks differ."
            )
        if f := rows.get("least squares repair"):
            lines.append(
                f"* Least squares, {name}, half of all channels: {f['seconds']:.1f} s with its measurements before and "
                f"after, fitted on {f['fitted_on']} of {f['images']} images; output error {f['error_before']:.3f} -> "
                f"{f['error_after']:.3f}."
            )
    for f in data.get("selection", []):
        lines.append(
            f"* {f['channels']} channels with {f['taps']} tap(s) into {f['outputs']} outputs, from their moments: "
            f"greedy removal {f['removal_s']:.3f} s, forward selection {f['selection_s']:.2f} s."
        )
    return lines


def text(held: Mapping[str, Record]) -> str:
    """The results there are."""
    lines = ["# Importance and repair", "", "Written by `benchmarks/importance.py`.", ""]
    for name, write in (("accuracy", accuracy_text), ("lite0", lite0_text), ("speed", speed_text)):
        if held.get(name):
            lines += write(held[name])
    return "\n".join(lines)
