"""Charts of a report as HTML and SVG: totals, costs by layer, curves of sensitivity, sizes while training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from graphprune.errors import counted
from graphprune.report import text
from graphprune.report.plots import PANELS
from graphprune.sensitivity import Sensitivity

if TYPE_CHECKING:
    from graphprune.report import Report
    from graphprune.report.history import History

TITLES = {
    "macs": "MACs",
    "params": "Parameters",
    "memory": "Memory in bytes",
    "channels": "Channels",
    "latency": "Predicted time",
}
CURVES = 8
"""Curves of sensitivity that get a colour and a name."""
_WIDE, _HIGH, _LEFT, _LOW = 560, 260, 56, 34
_ACROSS, _DOWN = 200, 90


def bar(before: float, after: float) -> str:
    """Two bars, one in the other, as fractions of the whole width."""
    inner = 100 * after / before if before else 0
    return f'<span class="bar"><i style="width:{100 * before:.1f}%"><b style="width:{inner:.1f}%"></b></i></span>'


def short(value: int | float) -> str:
    """A cost in few letters."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def totals(report: Report) -> str:
    """A card per cost; a mark on the bar where a target was set."""
    cards = []
    shown = [(name, TITLES.get(name, name), change) for name, change in report.costs.items()]
    shown += [("latency", "Measured time", report.measured)] if report.measured else []
    for name, title, change in shown:
        asked = report.requested.budgets.get(name)
        mark = f'<u style="left:{100 * asked:.1f}%"></u>' if asked is not None else ""
        wanted = f"<span>requested {asked:g}</span>" if asked is not None else ""
        cards.append(
            f'<div class="card"><h3>{escape(title)}{wanted}</h3><p class="big">{change.kept:.3f}'
            f'<small> kept</small></p><div class="gauge">{bar(1, min(change.kept, 1))}{mark}</div>'
            f"<p>{text.amount(name, change.before)} → {text.amount(name, change.after)}</p></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def layers(report: Report) -> str:
    """What each layer costs; see `text.by_layer`."""
    names, shown, left = text.by_layer(report)
    most = {name: max((layer.costs[name].before for layer in shown), default=1) or 1 for name in names}
    rows = []
    for k, layer in enumerate([*shown, *left]):
        cells = []
        for name in names:
            change, unit = layer.costs[name], 1e3 if name == "latency" else 1
            drawn = bar(change.before / most[name], change.after / most[name]) if k < len(shown) else "<span></span>"
            cells.append(f'{drawn}<span class="n">{short(change.before / unit)} → {short(change.after / unit)}</span>')
        rows.append(f"<li><code>{escape(layer.name or '(the model itself)')}</code>{''.join(cells)}</li>")
    titles = {"macs": "MACs", "params": "parameters", "latency": "time in μs"}
    head = "".join(f"<span>{titles[name]}</span><span></span>" for name in names)
    timed = " timed" if "latency" in names else ""
    return f'<ol class="rows layers{timed}"><li class="head"><span>layer</span>{head}</li>{"".join(rows)}</ol>'


def sensitivity(scan: Sensitivity) -> str:
    """How the loss rises as each group alone keeps less; the steepest curves are named."""
    curves = scan.worst_first()
    highs = [i for _, curve in curves for i in curve.increases if abs(i) < float("inf")]
    low, high = min([0.0, *highs]), max([*highs, 0.0]) or 1.0

    def point(x: float, y: float) -> str:
        across = _LEFT + (_WIDE - _LEFT - 10) * x
        return f"{across:.1f},{10 + (_HIGH - _LOW - 10) * (high - max(min(y, high), low)) / (high - low or 1.0):.1f}"

    parts, names = [], []
    for rank, (name, curve) in reversed(list(enumerate(curves))):
        kept = [*zip((w / curve.size for w in curve.widths), curve.increases, strict=True), (1.0, 0.0)]
        points = " ".join(point(x, y) for x, y in kept if y == y)
        tone = f"c{rank}" if rank < CURVES else "rest"
        parts.append(f'<polyline class="{tone}" points="{points}"><title>{escape(name)}</title></polyline>')
        if rank < CURVES:
            worst = max(curve.increases)
            names.append(
                f'<li><i class="{tone}"></i><code>{escape(name)}</code><span class="n">+{worst:.3g}</span></li>'
            )
    ticks = "".join(
        f'<text x="{point(x, low).split(",")[0]}" y="{_HIGH - 16}" text-anchor="middle">{x:g}</text>'
        for x in (0, 0.25, 0.5, 0.75, 1)
    )
    for y in (low, (low + high) / 2, high):
        height = point(0, y).split(",")[1]
        ticks += f'<text x="{_LEFT - 6}" y="{height}" text-anchor="end" dy="4">{y:.3g}</text>'
        ticks += f'<line x1="{_LEFT}" x2="{_WIDE - 10}" y1="{height}" y2="{height}"/>'
    return (
        f'<p class="note">By how much the loss, {scan.loss:.4g} on {counted(scan.samples, "sample")}, rises where '
        f"one group alone keeps a fraction of its channels; the steepest of {len(curves)} are named.</p>"
        '<div class="curves">'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="sensitivity">{ticks}'
        f'<text x="{(_WIDE + _LEFT) / 2}" y="{_HIGH - 2}" text-anchor="middle">fraction kept</text>'
        f"{''.join(parts)}</svg>"
        f"<ol>{''.join(reversed(names))}</ol></div>"
    )


def training(history: History) -> str:
    """The fraction near zero, and a panel per group: smallest to largest, 10 to 90 % and the median, over the steps."""
    first, last = history.steps[0], history.steps[-1]
    xs = [_ACROSS * (step - first) / ((last - first) or 1) for step in history.steps]

    def line(ys: Iterable[float]) -> list[str]:
        return [f"{x:.1f},{_DOWN * (1 - min(max(0.0, y), 1.0)):.1f}" for x, y in zip(xs, ys, strict=True)]

    near = f'<polyline points="{" ".join(line(history.near_zero))}"/>'
    panels = [_panel("near zero, of all channels", near, "1", "0", history)]
    for name, track in list(history.groups.items())[:PANELS]:
        low, high = track.bounds
        every = [[math.log(max(low, s) / low) / math.log(high / low) for s in row] for row in track.sizes]
        least, lower, middle, upper, most = (line(ys) for ys in zip(*every, strict=True))
        drawn = "".join(
            f'<polygon class="{kind}" points="{" ".join([*above, *reversed(below)])}"/>'
            for kind, below, above in (("all", least, most), ("most", lower, upper))
        )
        zero = line([math.log(max(low, track.near) / low) / math.log(high / low)] * len(xs))
        drawn += f'<polyline class="cut" points="{zero[0]} {_ACROSS},{zero[0].split(",")[1]}"/>'
        panels.append(
            _panel(name, f'{drawn}<polyline points="{" ".join(middle)}"/>', f"{high:.2g}", f"{low:.1g}", history)
        )
    left = len(history.groups) - PANELS
    more = f" {counted(left, 'more group')} {'is' if left == 1 else 'are'} not drawn." if left > 0 else ""
    return (
        f'<p class="note">Sizes of the channels that {escape(history.penalty)} shrank, over the steps of training, '
        "on a logarithmic scale: from the smallest to the largest, from 10 to 90 % of the channels, and the median. "
        f'Below the dashed line a channel is near zero.{more}</p><div class="panels">{"".join(panels)}</div>'
    )


def _panel(name: str, drawn: str, high: str, low: str, history: History) -> str:
    ends = [
        (-6, 9, "end", high),
        (-6, _DOWN, "end", low),
        (0, _DOWN + 16, "start", f"{history.steps[0]:,}"),
        (_ACROSS, _DOWN + 16, "end", f"{history.steps[-1]:,}"),
    ]
    said = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>' for x, y, anchor, words in ends)
    return (
        f"<figure><figcaption><code>{escape(name)}</code></figcaption>"
        f'<svg viewBox="-56 -4 {_ACROSS + 60} {_DOWN + 24}">{drawn}{said}</svg></figure>'
    )
