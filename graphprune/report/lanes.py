"""The coupling graph as SVG: a row for each call that mixes channels, a lane for each axis as long as it is in use.

Groups and what is pinned are axes. An axis runs down its lane from the call that first writes or reads it to the last;
lanes are given out from the left and used again, as `git log --graph` does, so a residual stream is one long line with
the groups inside its blocks beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from graphprune.report.records import Op, Stage

if TYPE_CHECKING:
    from graphprune.report import Report

ROW, TOP = 26, 14
SPREAD, NARROW, BROAD = 420, 14, 44
"""Columns share the first, each no narrower and no broader than the others, in pixels."""
LETTERS = 42
"""Longest label; it is cut in the middle."""
WRITTEN = 3
"""Axes that are named beside the call that writes them."""
FAN = 6
"""A call that reads or writes more axes than this gets one straight line instead of as many curves."""
MOST = 3000
"""Calls that are drawn; the page says how many are left out."""


@dataclass(frozen=True)
class Lane:
    """An axis in the drawing.

    Attributes:
        axis: its position: first the groups, then what is pinned.
        column: from the left.
        first, last: rows between which it is in use.
        made, ended: whether a call writes it first, and whether a call reads it last; else it goes on past the drawing.
    """

    axis: int
    column: int
    first: int
    last: int
    made: bool
    ended: bool


def lanes(stages: Sequence[Stage]) -> list[Lane]:
    """Lanes of all axes, the leftmost free one for each from the top down; longer ones first where several begin."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for row, stage in enumerate(stages):
        for axis in (*stage.reads, *stage.writes):
            first.setdefault(axis, row)
            last[axis] = row
    free_from: list[int] = []
    found = []
    for axis in sorted(first, key=lambda a: (first[a], -last[a], a)):
        column = next((c for c, row in enumerate(free_from) if row < first[axis]), len(free_from))
        free_from[column : column + 1] = [last[axis]]
        made, ended = axis in stages[first[axis]].writes, axis in stages[last[axis]].reads
        found.append(Lane(axis, column, first[axis], last[axis], made, ended))
    return found


def drawing(report: Report) -> str:
    """The SVG; empty if no channels flow. Axes carry their position as `data-a`, rows that of the first they write."""
    stages = report.stages[:MOST]
    if not stages:
        return ""
    placed = lanes(stages)
    labels = [label(report.ops[stage.op]) for stage in stages]
    left = 24 + int(6.7 * max(map(len, labels)))
    columns = 1 + max(lane.column for lane in placed)
    apart = min(BROAD, max(NARROW, SPREAD // columns))
    column = {lane.axis: left + apart * lane.column for lane in placed}
    right = left + apart * columns
    said = [_said(report, stage) for stage in stages]
    width = right + 24 + int(6.7 * max(map(len, said)))
    height = TOP + ROW * len(stages) + TOP
    parts = [
        f'<svg class="lanes" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="coupling graph">'
    ]
    for k, stage in enumerate(stages):
        cells = f'<rect width="{width}" height="{ROW}"/><text x="8" y="17">{escape(labels[k])}</text>'
        cells += f'<text class="s" x="{right}" y="17">{escape(said[k])}</text>'
        parts.append(_row(report, stage, TOP + ROW * k, cells))
    parts += [_lane(report, lane, column[lane.axis]) for lane in placed]
    parts += [_links(stage, _middle(k), column) for k, stage in enumerate(stages)]
    return "".join([*parts, "</svg>"])


def label(op: Op) -> str:
    """A call in a few letters."""
    return cut(op.module or f"{op.op} {op.source}")


def cut(name: str) -> str:
    """A name without its middle, where it is long."""
    return name if len(name) <= LETTERS else f"{name[: LETTERS // 2 - 1]}…{name[-LETTERS // 2 :]}"


def _middle(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _row(report: Report, stage: Stage, y: int, cells: str) -> str:
    target = (*stage.writes, *stage.reads)[0]
    title = f"<title>{escape(str(report.ops[stage.op]))}</title>"
    return f'<g class="r" data-a="{target}" transform="translate(0 {y})">{title}{cells}</g>'


def _said(report: Report, stage: Stage) -> str:
    """What a call writes, in words."""
    said = []
    for axis in stage.writes:
        if axis < len(report.groups):
            group = report.groups[axis]
            said.append(f"{cut(group.name)} {group.before} → {group.after}")
        else:
            pin = report.pinned[axis - len(report.groups)]
            said.append(f"{cut(pin.name)} {pin.size}")
    return ", ".join(said[:WRITTEN]) + (f" and {len(said) - WRITTEN} more" if len(said) > WRITTEN else "")


def _lane(report: Report, lane: Lane, x: int) -> str:
    """A line as thick as the axis is wide, with what is left of it in a darker tone."""
    groups = len(report.groups)
    if lane.axis < groups:
        group = report.groups[lane.axis]
        name, size, kept = group.name, group.before, group.after / group.before
        kind, said = group.exactness, f"{group.before} → {group.after}"
    else:
        pin = report.pinned[lane.axis - groups]
        name, size, kept, kind, said = pin.name, pin.size, 1.0, "pinned", f"{pin.size}, pinned: {pin.reason}"
    wide = thickness(report, size)
    top = _middle(lane.first) + (6 if lane.made else -9)
    bottom = _middle(lane.last) + (-6 if lane.ended else 9)
    line = f'd="M{x} {top}V{max(bottom, top + 1)}"'
    inner = f'<path class="k" {line} stroke-width="{max(wide * kept, 0.8):.1f}"/>' if kept < 1 else ""
    return (
        f'<g class="x {kind}" data-a="{lane.axis}"><title>{escape(name)}: {escape(said)}</title>'
        f'<path class="h" {line}/><path class="w" {line} stroke-width="{wide:.1f}"/>{inner}</g>'
    )


def thickness(report: Report, size: int) -> float:
    """How thick a line stands for so many channels."""
    most = max([g.before for g in report.groups] + [size])
    return 2 + 8 * math.sqrt(size / most)


def _links(stage: Stage, y: int, column: dict[int, int]) -> str:
    """From what a call reads to what it writes; a dot on what it does both."""
    both = set(stage.reads) & set(stage.writes)
    reads = [column[a] for a in stage.reads if a not in both]
    writes = [column[a] for a in stage.writes if a not in both]
    path = ""
    if max(len(reads), len(writes)) > FAN:
        ends = sorted([*reads, *writes])
        path = f"M{ends[0]} {y}H{ends[-1]}"
        path += "".join(f"M{x} {y - 6}V{y}" for x in reads) + "".join(f"M{x} {y}V{y + 6}" for x in writes)
    else:
        path = "".join(f"M{a} {y - 6}C{a} {y + 3} {b} {y - 3} {b} {y + 6}" for a in reads for b in writes)
    dots = "".join(f'<circle cx="{column[a]}" cy="{y}" r="2.5"/>' for a in sorted(both))
    dots += "".join(f'<circle cx="{x}" cy="{y + 6}" r="2.5"/>' for x in writes)
    return (f'<path class="l" d="{path}"/>' if path else "") + dots
