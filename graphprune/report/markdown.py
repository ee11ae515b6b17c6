"""A report as Markdown, for pull requests, model cards and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graphprune.errors import counted
from graphprune.report import text
from graphprune.report.records import Change

if TYPE_CHECKING:
    from graphprune.report import Report

LISTED = 200
"""Rows of a table before the rest is counted only; the JSON has them all."""


def document(report: Report) -> str:
    """The whole report."""
    costs = [*report.costs.items(), *([("latency measured", report.measured)] if report.measured else [])]
    parts = [
        f"# {plain(report.model_class)}, pruned to {plain(str(report.requested))}",
        _table(
            ("", "before", "after", "kept"),
            [(n, *_cells(n.split()[0], c), f"{c.kept:.3f}") for n, c in costs],
        ),
        "\n".join(f"* **{title}**: {plain(said)}" for title, said in facts(report)),
        *_section("Groups", _groups(report)),
        *_section("Layers", _layers(report)),
        *_section("Pinned", _pinned(report)),
        *_section("Sensitivity", _sensitivity(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(report: Report) -> list[tuple[str, str]]:
    """What was done and found, a title and a sentence each."""
    found = [("timed", text.timed(report))] if report.timing else []
    found.append(("groups", text.grouped(report)))
    if report.importance:
        found.append(("scored", f"by {report.importance}, {report.allocation} allocation"))
    found += [("scored apart", line) for line in text.scored_apart(report)]
    if report.training is not None:
        found.append(("trained", str(report.training)))
    found += [("whole", line) for line in text.stuck(report)]
    found.append(("traced", report.traced))
    found.append(("emitted", text.emitted(report)))
    if report.grafts:
        found.append(("grafted", text.grafted(report)))
    found.append(("verified", text.verified(report)))
    if report.repair is not None:
        found.append(("repaired", text.repaired(report)))
        for title, quality in (("before pruning", "original"), ("pruned", "pruned"), ("after repair", "repaired")):
            found.append((title, text.said(getattr(report.repair, quality))))
        found += [("fitted", text.fitted(report))] if report.repair.ridges else []
        found += [("not repaired", f"{name}: {why}") for name, why in report.repair.left.items()]
    if report.unused:
        found.append(("not read", text.not_read(report)))
    return found + [
        ("no rule", f"{u.op}, {counted(len(u.nodes), 'node')}, first at {u.nodes[0]}: {u.why}") for u in report.unknown
    ]


def plain(words: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(words.split()))


def _code(name: str) -> str:
    """A name in code style, whatever is in it."""
    flat = " ".join(name.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    pad = " " if "`" in flat or not flat else ""
    return f"{fence}{pad}{flat or '(the model)'}{pad}{fence}"


def _cells(name: str, change: Change) -> tuple[str, str]:
    return text.amount(name, change.before), text.amount(name, change.after)


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    found = list(rows)
    if not found:
        return ""
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *found[:LISTED]]
    more = f"\n\nand {len(found) - LISTED} more" if len(found) > LISTED else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + more


def _groups(report: Report) -> str:
    return _table(
        ("group", "before", "after", "members", "class"),
        [(_code(w.name), str(w.before), str(w.after), str(w.members), w.exactness) for w in report.groups],
    )


def _layers(report: Report) -> str:
    titles = {"macs": "MACs", "params": "parameters", "latency": "time"}
    names, layers, left = text.by_layer(report)
    head = ("layer", *(title for name in names for title in (f"{titles[name]} before", "after")))
    rows = [(_code(y.name), y) for y in layers] + [(y.name, y) for y in left]
    return _table(head, [(name, *(c for n in names for c in _cells(n, y.costs[n]))) for name, y in rows])


def _pinned(report: Report) -> str:
    first = {p.reason: p for p in reversed(report.pinned)}
    return _table(
        ("cause", "axes", "such as", "at"),
        [
            (plain(reason), str(n), _code(first[reason].name), plain(first[reason].where))
            for reason, n in text.causes(report).most_common()
        ],
    )


def _sensitivity(report: Report) -> str:
    scan = report.sensitivity
    if scan is None:
        return ""
    rows = [
        (
            _code(name),
            str(curve.size),
            ", ".join(f"{w}: {i:+.4f}" for w, i in zip(curve.widths, curve.increases, strict=True)),
        )
        for name, curve in scan.worst_first()
    ]
    head = f"By how much the loss, {scan.loss:.4g} on {counted(scan.samples, 'sample')}, rises at each width.\n\n"
    return head + _table(("group", "channels", "rise of the loss"), rows)
