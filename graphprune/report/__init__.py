"""What was asked for, what came out, what stayed whole and why: as data, text, Markdown, HTML and figures.

`records` is what a report holds, `gather` puts it together, `codec` makes JSON of it; `text`, `markdown`, `page` and
`plots` show it.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graphprune.allocate import Target
from graphprune.cost import COSTS, Costs, widths
from graphprune.coupling import Coupling, Unknown
from graphprune.errors import GraphpruneError, InputError
from graphprune.files import write_whole
from graphprune.importance import Importance, Scores
from graphprune.latency import Prediction
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.recover import Repair
from graphprune.report import gather, markdown, page, plots, text
from graphprune.report.codec import decoded, encoded
from graphprune.report.history import History, Track
from graphprune.report.records import Change, Histogram, Layer, Op, Pinned, Slot, Stage, Timing, Width
from graphprune.rewrite import Rewritten
from graphprune.sensitivity import Sensitivity
from graphprune.verify import Verification

__all__ = [
    "Change",
    "Choice",
    "Histogram",
    "History",
    "Layer",
    "Op",
    "Pinned",
    "Report",
    "Slot",
    "Stage",
    "Timing",
    "Track",
    "Width",
    "report",
]

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """Everything a user may want to know about one pruning.

    Attributes:
        model_class: name of the pruned class.
        requested: the target.
        costs: macs, params, memory in bytes and channels, before and after, at the example inputs; where time was
            measured also the latency, predicted, in nanoseconds.
        groups: every group before and after.
        pinned: parts of parameters that stayed whole, with the cause.
        unknown: ops without a rule.
        unused: parameters and buffers that the traced forward does not read.
        traced: "recorded", or "exported" and why, if recording was tried.
        emitter: "module", "graft" or "graph".
        reason: what is limited about it, and why the emitters before it were passed over; empty if nothing. Printed
            reports have the beginning of it, in one line.
        grafts: paths of the modules whose forward comes from the trace.
        verification: what the comparison with the zeroed original found before any repair; None if switched off.
        repair: what repair did and was worth; None if none was asked for.
        importance: the criterion and its options, as far as they are plain; empty where nothing was scored.
        allocation: how the target was shared out over the groups; empty where nothing was scored.
        layers: modules with costs of their own, before and after.
        stages: the calls between which channels flow, in order.
        ops: the calls that `groups` and `stages` speak of by position.
        sensitivity: a scan of the model; None if there was none.
        measured: nanoseconds that the original and the smaller model took, measured in turn; None if they were not.
        timing: what the predicted time is made of, beside the calls of the layers; None without one.
        training: how a penalty shrank the channels before; None if none is known.
    """

    model_class: str
    requested: Target
    costs: Mapping[str, Change]
    groups: tuple[Width, ...]
    pinned: tuple[Pinned, ...]
    unknown: tuple[Unknown, ...]
    unused: tuple[str, ...]
    traced: str
    emitter: str
    reason: str
    grafts: tuple[str, ...]
    verification: Verification | None
    repair: Repair | None = None
    importance: str = ""
    allocation: str = ""
    layers: tuple[Layer, ...] = field(default=(), repr=False)
    stages: tuple[Stage, ...] = field(default=(), repr=False)
    ops: tuple[Op, ...] = field(default=(), repr=False)
    sensitivity: Sensitivity | None = field(default=None, repr=False)
    measured: Change | None = None
    timing: Timing | None = None
    training: History | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """A summary of one screen; `table()` has every group."""
        return text.summary(self)

    def table(self) -> str:
        """One line per group: width before and after, members, exact or renormalised."""
        return text.table(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"format": FORMAT, **encoded(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            InputError: the text is no such report.
        """
        try:
            return _read(json.loads(text))
        except (ValueError, RecursionError, GraphpruneError) as error:
            raise InputError(f"not a report: {error}; write reports with to_json()") from error

    def to_markdown(self) -> str:
        """The report as Markdown: totals, what was done, groups, layers and pins in tables."""
        return markdown.document(self)

    def to_html(self) -> str:
        """The report as one HTML page that loads nothing from anywhere."""
        return page.document(self)

    def _repr_html_(self) -> str:
        """What notebooks show: totals, widths and what was checked."""
        return page.fragment(self)

    def plot(self) -> dict[str, Any]:
        """The report as figures of matplotlib, by name; those for which it has no data are left out.

        They are "totals", "widths", "layers", "times", "scores", "sensitivity" and "training".

        Raises:
            InputError: matplotlib is not installed.
        """
        return plots.figures(self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file, as its suffix says: .html, .md, .json or .txt. It is whole or not there.

        Raises:
            InputError: another suffix.
        """
        target = Path(path)
        make = _FORMS.get(target.suffix.lower())
        if make is None:
            raise InputError(f"a report is written as {', '.join(_FORMS)}; {target.name!r} ends in none of them")
        content = make(self).encode()
        write_whole(target, lambda file: file.write(content))
        return target

    def with_sensitivity(self, scan: Sensitivity) -> Report:
        """The report, and a scan of the same model to show with it."""
        return replace(self, sensitivity=scan)

    def with_training(self, history: History) -> Report:
        """The report, and what a penalty recorded while the model was trained, to show with it."""
        return replace(self, training=history)


def _text(report: Report) -> str:
    return f"{report}\n\n{report.table()}\n"


_FORMS = {".html": Report.to_html, ".md": Report.to_markdown, ".json": Report.to_json, ".txt": _text}


def _read(data: object) -> Report:
    """A report from what JSON holds.

    Raises:
        ValueError: it holds something else.
    """
    if not isinstance(data, dict):
        raise ValueError(f"it is {type(data).__name__}, not an object")
    if data.get("format") != FORMAT:
        raise ValueError(f"its format {data.get('format')!r} is not {FORMAT}, the one this version reads")
    found = decoded(Report, {name: item for name, item in data.items() if name != "format"})
    for complaint, good in _demands(found):
        if not good:
            raise ValueError(complaint)
    return found


def _demands(found: Report) -> Iterator[tuple[str, bool]]:
    """What must hold of a report beyond the types of its fields, and whether it does."""
    axes, ops = len(found.groups) + len(found.pinned), len(found.ops)
    slots = [(slot, k) for width in found.groups for k, slot in enumerate(width.slots)]
    ties = [op for slot, _ in slots for op in slot.through] + [stage.op for stage in found.stages]
    ends = [axis for stage in found.stages for axis in (*stage.reads, *stage.writes)]
    spreads = [width.scores for width in found.groups if width.scores is not None]
    costs = [found.costs, *(layer.costs for layer in found.layers)]
    changes = [change for cost in costs for change in cost.values()] + ([found.measured] if found.measured else [])
    curves = found.sensitivity.curves.values() if found.sensitivity else ()
    yield "an op is not among its ops", all(0 <= op < ops for op in ties)
    yield "a slot is tied to none before it", all(slot.to is None or 0 <= slot.to < k for slot, k in slots)
    yield "a call has no axes, or others than there are", all(0 <= axis < axes for axis in ends)
    yield "a call has no axes, or others than there are", all(s.reads or s.writes for s in found.stages)
    yield "a group grew, or was empty", all(0 <= w.after <= w.before and w.before for w in found.groups)
    yield "a histogram has no bins", all(0 < len(s.kept) == len(s.removed) for s in spreads)
    yield "a cost is missing", all({"macs", "params"} <= cost.keys() for cost in costs)
    yield "a cost is no number", all(c.before >= 0 and c.after >= 0 for c in changes)
    yield "a time is no number", found.timing is None or (found.timing.besides >= 0 and 0 <= found.timing.share <= 1)
    yield "an unknown op has no nodes", all(u.nodes for u in found.unknown)
    h = found.training
    rows = [] if h is None else [h.near_zero, *(track.sizes for track in h.groups.values())]
    yield "a history has other records than steps", h is None or all(0 < len(r) == len(h.steps) for r in rows)
    yield "a record has not five sizes", all(len(sizes) == 5 for each in rows[1:] for sizes in each)  # type: ignore[arg-type]
    yield "a curve has no points", all(0 < len(c.widths) == len(c.increases) and c.size > 0 for c in curves)


@dataclass(frozen=True)
class Choice:
    """How the channels were chosen.

    Attributes:
        importance: the criterion, or words for it.
        allocation: the method.
        scores: what the criterion gave, by group.
        others: per group that an `otherwise` scored, which criterion that was.
    """

    importance: Importance | str
    allocation: str
    scores: Scores
    others: Mapping[str, Importance] = field(default_factory=dict)


def _traced(program: Program) -> str:
    if program.source is None:
        return "recorded"
    return "exported" + (f" because of {program.unrecorded.splitlines()[0]}" if program.unrecorded else "")


def report(
    coupling: Coupling,
    plan: Plan,
    target: Target,
    rewritten: Rewritten,
    verification: Verification | None,
    repair: Repair | None = None,
    *,
    choice: Choice | None = None,
    latency: Costs | None = None,
    measured: tuple[float, float] | None = None,
    whole: Mapping[str, str] = types.MappingProxyType({}),
) -> Report:
    """Put together what the steps found; `whole` says why groups stay that were some before earlier steps."""
    kept, ops = widths(plan), gather.Ops()
    scan = getattr(choice.importance, "sensitivity", None) if choice else None
    costs: list[Costs] = [make(coupling) for make in COSTS.values()] + ([] if latency is None else [latency])
    scores, others = (choice.scores, choice.others) if choice else ({}, {})
    predicted = latency if isinstance(latency, Prediction) else None
    return Report(
        model_class=coupling.program.model_class,
        requested=replace(target, protect=tuple(target.protect), tied=tuple(map(tuple, target.tied))),
        costs={cost.name: Change(cost.at({}), cost.at(kept)) for cost in costs},
        groups=tuple(gather.groups(coupling, plan, scores, others, whole, ops)),
        pinned=tuple(gather.pinned(coupling)),
        unknown=coupling.unknown,
        unused=tuple(n for n in coupling.program.unused if not n.endswith("num_batches_tracked")),
        traced=_traced(coupling.program),
        emitter=rewritten.emitter,
        reason=rewritten.reason,
        grafts=rewritten.grafts,
        verification=verification,
        repair=repair,
        importance=gather.described(choice.importance) if choice else "",
        allocation=choice.allocation if choice else "",
        layers=tuple(gather.layers(coupling, kept, predicted)),
        stages=tuple(gather.stages(coupling, ops)),
        ops=tuple(ops.positions),
        sensitivity=scan if isinstance(scan, Sensitivity) else None,
        measured=None if measured is None else Change(*map(round, measured)),
        timing=None if predicted is None else gather.timing(predicted),
    )
