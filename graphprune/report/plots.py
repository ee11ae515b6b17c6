"""A report as figures of matplotlib, for papers and notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.errors import InputError
from graphprune.report.text import by_layer

if TYPE_CHECKING:
    from graphprune.report import Report
    from graphprune.report.history import History

KEPT, GONE, WHOLE = "#0d7a6f", "#e0925a", "#c3e0dc"
SHOWN = 60
"""Bars in a figure; of more, the largest are shown."""
PANELS = 24
"""Histograms in a figure; of more, those of the largest groups are shown."""


def figures(report: Report) -> dict[str, Any]:
    """The figures for which there is data, by name; none of them is open in pyplot.

    Raises:
        InputError: matplotlib is not installed.
    """
    make = _figure()
    found = {}
    for name, draw in _FIGURES.items():
        figure = draw(report, make)
        if figure is not None:
            found[name] = figure
    return found


def history(found: History) -> Any:
    """The figure of a sparse training.

    Raises:
        InputError: matplotlib is not installed.
    """
    return _history(found, _figure())


def _figure() -> Any:
    """The class of figures.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot needs matplotlib: pip install 'graphprune[plot]'") from error
    return Figure


def _panels(make: Any, count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels in up to four columns."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = make(figsize=(2.6 * columns, 2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels:
        axes.tick_params(labelsize=6)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _bars(make: Any, rows: Sequence[tuple[str, float, float]], label: str) -> Any:
    """Horizontal bars, before and after, the first row on top."""
    shown = sorted(sorted(range(len(rows)), key=lambda k: -rows[k][1])[:SHOWN])
    if not shown:
        return None
    names, before, after = zip(*(rows[k] for k in shown), strict=True)
    figure = make(figsize=(8, 1 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shown)), before, color=WHOLE, label="before")
    axes.barh(range(len(shown)), after, color=KEPT, label="after")
    axes.set_yticks(range(len(shown)), [_literal(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label + (f" (the largest {SHOWN} of {len(rows)})" if len(rows) > SHOWN else ""))
    axes.legend()
    return figure


def _literal(name: str) -> str:
    """A name in which no dollar starts a formula."""
    return name.replace("$", r"\$")


def _totals(report: Report, make: Any) -> Any:
    return _bars(make, [(name, 1.0, change.kept) for name, change in report.costs.items()], "fraction kept")


def _widths(report: Report, make: Any) -> Any:
    return _bars(make, [(w.name, w.before, w.after) for w in report.groups], "channels")


def _layers(report: Report, make: Any) -> Any:
    macs = [(layer.name, layer.costs["macs"]) for layer in report.layers if layer.costs["macs"].before]
    return _bars(make, [(name, c.before, c.after) for name, c in macs], "MACs")


def _times(report: Report, make: Any) -> Any:
    names, layers, _ = by_layer(report)
    if "latency" not in names:
        return None
    times = [(layer.name, layer.costs["latency"]) for layer in layers]
    return _bars(make, [(name, c.before / 1e6, c.after / 1e6) for name, c in times if c.before], "predicted ms")


def _scores(report: Report, make: Any) -> Any:
    """A histogram per group, with what was cut off and where."""
    scored = [(w, w.scores) for w in sorted(report.groups, key=lambda w: -w.before) if w.scores is not None][:PANELS]
    if not scored:
        return None
    figure, panels = _panels(make, len(scored))
    for axes, (width, spread) in zip(panels, scored, strict=True):
        step = (spread.high - spread.low) / len(spread.kept) or 1.0
        centres = [spread.low + step * (k + 0.5) for k in range(len(spread.kept))]
        axes.bar(centres, spread.kept, step * 0.9, color=KEPT)
        axes.bar(centres, spread.removed, step * 0.9, bottom=spread.kept, color=GONE)
        if spread.cut is not None:
            axes.axvline(spread.cut, color="black", linestyle="--", linewidth=1)
        axes.set_title(_literal(width.name), fontsize=7)
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-2, 4))
        axes.xaxis.get_offset_text().set_fontsize(6)
    return figure


def _history(found: History, make: Any) -> Any:
    """The fraction near zero, and a panel per group: smallest to largest, 10 to 90 % and the median."""
    groups = list(found.groups.items())[:PANELS]
    figure, (first, *panels) = _panels(make, 1 + len(groups))
    first.plot(found.steps, found.near_zero, color=KEPT)
    first.set_ylim(-0.02, 1.02)
    first.set_title("near zero, fraction of all channels", fontsize=7)
    for axes, (name, track) in zip(panels, groups, strict=True):
        low, high = track.bounds
        least, lower, middle, upper, most = zip(*([max(low, s) for s in row] for row in track.sizes), strict=True)
        axes.set_yscale("log")
        axes.fill_between(found.steps, least, most, color=WHOLE, linewidth=0)
        axes.fill_between(found.steps, lower, upper, color=KEPT, alpha=0.4, linewidth=0)
        axes.plot(found.steps, middle, color=KEPT)
        axes.axhline(track.near, color="black", linestyle="--", linewidth=1)
        axes.set_ylim(low, high * 1.2)
        axes.set_title(_literal(name), fontsize=7)
    return figure


def _training(report: Report, make: Any) -> Any:
    return None if report.training is None else _history(report.training, make)


def _sensitivity(report: Report, make: Any) -> Any:
    if report.sensitivity is None:
        return None
    figure = make(figsize=(8, 5), layout="constrained")
    report.sensitivity.plot(figure.subplots())
    return figure


_FIGURES: Mapping[str, Callable[[Report, Any], Any]] = {
    "totals": _totals,
    "widths": _widths,
    "layers": _layers,
    "times": _times,
    "scores": _scores,
    "sensitivity": _sensitivity,
    "training": _training,
}
