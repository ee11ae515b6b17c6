"""The results of the benchmark of targets as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]
NEAR = 0.005
"""A target counts as met when at most so much of it is left."""
SHOWN = ("uniform", "global", "global per cost", "isomorphic", "greedy", "knapsack")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(str(item) for item in row) + " |" for row in lines]


def text(data: Record) -> str:
    """All tables."""
    environment, networks = data["environment"], data["networks"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "# Targets",
        "",
        f"{versions}; {environment['cpus']} CPUs, {environment['threads']} thread, {environment['date']}.",
        f"Random weights; each filter is scaled by exp(n), n normal with deviation {data['spread']}, as those of",
        "trained networks differ. Scores are squared magnitudes of all that goes with a channel, divided by their mean",
        f"in each group, or as they are. Every group keeps at least {data['floor']:.0%} of its channels.",
        "",
        *_met(networks),
        *_emitted(networks),
        *_lost(networks),
        *_seconds(networks, data.get("wide")),
        *_gaps(data.get("small")),
    ]
    return "\n".join(lines)


def _met(networks: Mapping[str, Record]) -> list[str]:
    rows = []
    for name, network in networks.items():
        found = [row for row in network["rows"] if "infeasible" not in row]
        far = [row for row in found if row["miss"] > NEAR]
        room = [row for row in far if row["a_step_would_fit"]]
        impossible = sorted({row["target"] for row in network["rows"] if "infeasible" in row})
        over, odd = (sum(bad(row) for row in found) for bad in (lambda r: r["over"], lambda r: not r["multiples"]))
        worst = f"{max((row['miss'] for row in room), default=0.0):.2%}"
        rows.append((name, len(found), over, odd, len(far), len(room), worst, ", ".join(impossible) or "-"))
    header = (
        "network",
        "plans",
        "over target",
        "odd multiples",
        "missed by > 0.5 %",
        "with room",
        "worst",
        "infeasible",
    )
    return [
        "## Targets met",
        "",
        "All methods, all targets, both scores. Missed: more than 0.5 % of the target is left unused. With room: a",
        "next step of some group would still have fitted; else every next step would pass a budget. Infeasible: no",
        "widths that the floor allows meet the target, which is an error.",
        "",
        *table(header, rows),
        "",
    ]


def _emitted(networks: Mapping[str, Record]) -> list[str]:
    rows = []
    for name, network in networks.items():
        found = network["emitted"]
        same = [sum(e["said"][what] == e["counted"][what] for e in found) for what in ("macs", "params")]
        whole = [network["whole"][what] == network["counted"][what] for what in ("macs", "params")]
        emitters = ", ".join(sorted({e["emitter"] for e in found}))
        rows.append((name, len(found), *same, " and ".join("yes" if w else "no" for w in whole), emitters))
    header = ("network", "plans carried out", "MACs as said", "parameters as said", "before pruning", "emitter")
    return [
        "## Counted on the modules that come out",
        "",
        "MACs by `torch.utils.flop_counter.FlopCounterMode` (half its FLOPs), parameters one by one, on one plan",
        "for each target, with scores of mean 1; equal to the last digit, or not counted here. Fused attention is off",
        "while torch counts, which knows only matrix products.",
        "",
        *table(header, rows),
        "",
    ]


def _lost(networks: Mapping[str, Record]) -> list[str]:
    lines = ["## Importance lost at equal cost", ""]
    keys = dict.fromkeys((row["scores"], row["target"]) for n in networks.values() for row in n["rows"])
    shown = [(scores, "MACs 0.5") for scores in dict.fromkeys(scores for scores, _ in keys)]
    for scores, target in shown:
        rows = []
        for name, network in networks.items():
            lost = losses(network, scores, target)
            if lost:
                rows.append((name, *(f"{lost[method]:.2%}" for method in SHOWN)))
        lines += [f"{target}, scores {scores}; percent of all importance:", "", *table(("network", *SHOWN), rows), ""]
    rows = []
    for scores, target in keys:
        found = [lost for n in networks.values() if (lost := losses(n, scores, target))]
        rows.append(
            (
                f"{scores}, {target}",
                *(f"{sum(below(lost, a, b) for lost in found)}/{len(found)}" for a, b in PAIRS),
                f"{sum(ordered(lost, 'global') for lost in found)}/{len(found)}",
                f"{sum(ordered(lost, 'global per cost') for lost in found)}/{len(found)}",
            )
        )
    names = [f"{a} <= {b}" for a, b in PAIRS]
    return [
        *lines,
        "On how many networks the order holds. `global` has one threshold over the scores; `global per cost` one over",
        "scores divided by what a channel costs before pruning. The whole order: knapsack <= greedy <= the one or the",
        "other <= uniform.",
        "",
        *table(("scores, target", *names, "order, global", "order, per cost"), rows),
        "",
    ]


PAIRS = (
    ("knapsack", "greedy"),
    ("greedy", "global"),
    ("greedy", "global per cost"),
    ("global", "uniform"),
    ("global per cost", "uniform"),
)


def losses(network: Record, scores: str, target: str) -> dict[str, float]:
    """What each method loses; empty for an infeasible target."""
    rows = [row for row in network["rows"] if (row["scores"], row["target"]) == (scores, target)]
    return {} if any("infeasible" in row for row in rows) else {row["method"]: row["lost"] for row in rows}


def below(lost: Mapping[str, float], a: str, b: str) -> bool:
    """Whether one method loses no more than another."""
    return lost[a] <= lost[b] * (1 + 1e-9)


def ordered(lost: Mapping[str, float], which: str) -> bool:
    """Whether the order holds, with this as the global method."""
    return below(lost, "knapsack", "greedy") and below(lost, "greedy", which) and below(lost, which, "uniform")


def _seconds(networks: Mapping[str, Record], wide: Record | None) -> list[str]:
    methods = [method for method in SHOWN if method != "global per cost"]
    rows: list[Sequence[object]] = []
    for name, network in networks.items():
        most = [
            max((row["seconds"] for row in network["rows"] if row["method"] == m and "seconds" in row), default=0.0)
            for m in methods
        ]
        rows.append((name, network["groups"], network["channels"], *(f"{s:.2f}" for s in most)))
    if wide:
        rows.append(("a chain", wide["groups"], wide["channels"], *(f"{wide['seconds'][m]:.2f}" for m in methods)))
    return [
        "## Seconds to allocate",
        "",
        "The slowest target, by the clock, beside other runs on the same machine (load averages are in the JSON).",
        "",
        *table(("network", "groups", "channels", *methods), rows),
        "",
    ]


def _gaps(small: Record | None) -> list[str]:
    if not small:
        return []
    rows = []
    for method, gaps in small["gaps"].items():
        optimal = sum(gap < 1e-9 for gap in gaps)
        rows.append((method, f"{optimal}/{len(gaps)}", *(f"{v:.2%}" for v in (statistics.mean(gaps), max(gaps)))))
    return [
        "## Against the best of all choices",
        "",
        f"{small['nets']} small networks, {small['problems']} problems: how much more importance is lost than the",
        "least possible.",
        "",
        *table(("method", "optimal", "mean gap", "largest gap"), rows),
        "",
    ]
