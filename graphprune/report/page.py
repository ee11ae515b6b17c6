"""A report as one HTML page that loads nothing, and as a fragment for notebooks.

What is shown at once is plain HTML and SVG, written here; `page.js` adds search and the panel that tells of one group,
from the data at the end of the page. Names and code come from the user's model, so all of it is escaped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from graphprune.errors import counted
from graphprune.report import charts, text
from graphprune.report.lanes import MOST, drawing
from graphprune.report.markdown import facts
from graphprune.report.records import Width

if TYPE_CHECKING:
    from graphprune.report import Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing, whatever is in it."""
FIRST = 40
"""Groups that a notebook shows."""


@functools.cache
def _asset(name: str) -> str:
    return (files("graphprune.report") / name).read_text(encoding="utf-8")


def document(report: Report) -> str:
    """The whole page."""
    title = escape(f"{report.model_class}: pruning report")
    sections = [(n, name, body) for n, name, body in _sections(report) if body]
    links = "".join(f'<a href="#{n}">{name}</a>' for n, name, _ in sections)
    bodies = "".join(f'<section id="{n}"><h2>{name}</h2>{body}</section>' for n, name, body in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<style>{_asset("page.css")}</style></head><body class="graphprune">'
        f"{_header(report)}<nav>{links}</nav><main>{bodies}</main>"
        '<aside id="panel" hidden></aside>'
        f'<script type="application/json" id="data">{_payload(report)}</script>'
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def fragment(report: Report) -> str:
    """Totals, what was done, and the widths of the first groups; no script, so that any notebook shows it."""
    left = len(report.groups) - FIRST
    more = f'<p class="note">and {counted(left, "more group")}</p>' if left > 0 else ""
    return (
        f'<div class="graphprune fragment"><style>{_asset("page.css")}</style>{_header(report)}<main>'
        f"{charts.totals(report)}{_facts(report)}<details><summary>Widths</summary>"
        f"{_widths(report, report.groups[:FIRST])}{more}</details></main></div>"
    )


def _sections(report: Report) -> Iterable[tuple[str, str, str]]:
    """Anchor, title and body of each section; those without anything to show have no body."""
    yield "totals", "Totals", charts.totals(report) + _facts(report)
    yield "widths", "Widths", _search("widths", "groups") + _widths(report, report.groups) if report.groups else ""
    yield "coupling", "Coupling", _coupling(report)
    yield "layers", "Layers", _search("layers", "layers") + charts.layers(report) if report.layers else ""
    yield "pinned", "Pinned", _pinned(report)
    yield "sensitivity", "Sensitivity", charts.sensitivity(report.sensitivity) if report.sensitivity else ""
    yield "training", "Sparse training", charts.training(report.training) if report.training else ""


def _header(report: Report) -> str:
    chosen = f" · {escape(report.importance)}, {escape(report.allocation)} allocation" if report.importance else ""
    return (
        f'<header><p class="brand">graphprune</p><h1>{escape(report.model_class)}</h1>'
        f'<p class="sub">requested <b>{escape(str(report.requested))}</b>{chosen}</p></header>'
    )


def _facts(report: Report) -> str:
    v = report.verification
    state = "none" if v is None else "good" if v.effect > v.tolerance else "weak"
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd{f' class={state}' if name == 'verified' else ''}>{escape(said)}</dd>"
        for name, said in facts(report)
    )
    return f"<dl>{rows}</dl>"


def _search(anchor: str, what: str) -> str:
    return (
        f'<div class="tools"><input type="search" data-for="{anchor}" placeholder="Search {what}" '
        f'aria-label="Search {what}"><span class="count"></span></div>'
    )


def _widths(report: Report, groups: Sequence[Width]) -> str:
    most = max((w.before for w in report.groups), default=1)
    rows = []
    for k, w in enumerate(groups):
        mark = "" if w.exactness == "exact" else f'<em class="tag">{escape(w.exactness)}</em>'
        mark += '<em class="tag whole">whole</em>' if w.whole else ""
        rows.append(
            f'<li data-a="{k}"><button><code>{escape(w.name)}</code>{mark}</button>'
            f'{charts.bar(w.before / most, w.after / most)}<span class="n">{w.before} → {w.after}</span></li>'
        )
    return f'<ol class="rows widths">{"".join(rows)}</ol>'


def _coupling(report: Report) -> str:
    drawn = drawing(report)
    if not drawn:
        return ""
    left = len(report.stages) - MOST
    more = f" {counted(left, 'call')} after these {'is' if left == 1 else 'are'} not drawn." if left > 0 else ""
    return (
        '<p class="note">Each row is a call that mixes channels, in the order in which they run; each line is a group, '
        "as thick as it is wide, dark as far as it is kept. A call reads the lines that enter it and writes those that "
        f"leave it. Click a line or a row to see the members of a group and what ties them.{more}</p>"
        '<p class="legend"><i class="exact"></i>exact<i class="renormalised"></i>renormalised'
        f'<i class="pinned"></i>pinned</p>{_search("coupling", "calls")}<div class="scroll">{drawn}</div>'
    )


def _pinned(report: Report) -> str:
    out = []
    for reason, count in text.causes(report).most_common():
        rows = "".join(
            f"<tr><td><code>{escape(p.name)}</code></td><td>{p.size}</td><td>{escape(p.where)}</td></tr>"
            for p in report.pinned
            if p.reason == reason
        )
        out.append(
            f'<details><summary>{escape(reason)} <span class="n">{count}</span></summary><div class="scroll"><table>'
            f"<thead><tr><th>axis</th><th>size</th><th>at</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return "".join(out)


def _brief(score: float) -> float:
    """To six digits, which is more than the page shows."""
    return float(f"{score:.6g}")


def _payload(report: Report) -> str:
    """What the panel needs, as JSON without a character that could end the script it stands in."""
    groups: list[Any] = []
    for w in report.groups:
        s = w.scores
        spread = s and [
            *map(_brief, (s.low, s.high)),
            s.kept,
            s.removed,
            None if s.cut is None else _brief(s.cut),
            s.unseen,
        ]
        slots = [[slot.name, slot.dim, slot.to, slot.through] for slot in w.slots]
        groups.append([w.name, w.before, w.after, w.members, w.exactness, w.cause, w.criterion, w.whole, spread, slots])
    data = {
        "importance": report.importance,
        "groups": groups,
        "pinned": [[p.name, p.size, p.members, p.reason, p.where] for p in report.pinned],
        "ops": [[op.op, op.module, op.source, op.code] for op in report.ops],
    }
    dense = json.dumps(data, separators=(",", ":"))  # ASCII only
    return dense.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
