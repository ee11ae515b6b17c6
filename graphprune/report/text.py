"""A report as text: a summary of one screen, and a table of its groups."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from graphprune.errors import counted
from graphprune.recover import Quality
from graphprune.report.records import Change, Layer

if TYPE_CHECKING:
    from graphprune.report import Report


BRIEF = 0.01
"""Layers without multiply-adds are shown one by one where they take at least this part of the time."""
LONGEST = 300
"""How many characters of a reason are shown; what torch says of a module it cannot trace goes on for lines."""


def summary(report: Report) -> str:
    """What a terminal shows."""
    lines = [f"graphprune: {report.model_class}, requested {report.requested}"]
    for name, change in report.costs.items():
        lines.append(f"  {name:<9} {_line(name, change, 'predicted')}")
    if report.measured is not None:
        lines.append(f"  {'':<9} {_line('latency', report.measured, 'measured')}")
    if report.timing is not None:
        lines.append(f"  timed     {timed(report)}")
    lines.append(f"  groups    {grouped(report)}")
    if report.importance:
        lines.append(f"  scored    by {report.importance}, {report.allocation} allocation")
    lines.extend(f"  scored    {line}" for line in scored_apart(report))
    if report.training is not None:
        lines.append(f"  trained   {report.training}")
    lines.extend(f"  whole     {line}" for line in stuck(report))
    lines.append(f"  traced    {report.traced}")
    lines.append(f"  emitted   {emitted(report)}")
    if report.grafts:
        lines.append(f"  grafted   {grafted(report)}")
    lines.append(f"  verified  {verified(report)}")
    lines.extend(_repaired(report))
    lines.extend(f"  pinned    {counted(n, 'axis', 'axes')}: {reason}" for reason, n in causes(report).most_common(6))
    if report.unused:
        lines.append(f"  not read  {not_read(report)}")
    for u in report.unknown:
        lines.append(f"  no rule   {u.op}, {counted(len(u.nodes), 'node')}, first at {u.nodes[0]}: {u.why}")
    return "\n".join(lines)


def table(report: Report) -> str:
    """One line per group."""
    wide = max([len(w.name) for w in report.groups] + [5])
    head = f"{'group':<{wide}}  before  after  members  class"
    rows = [f"{w.name:<{wide}}  {w.before:>6}  {w.after:>5}  {w.members:>7}  {w.exactness}" for w in report.groups]
    return "\n".join([head, *rows])


# -- sentences that all forms of a report share -----------------------------------------------------------------------


def amount(name: str, value: int | float) -> str:
    """How much there is of a cost: nanoseconds as milliseconds, and at least four digits of all else."""
    if name == "latency":
        return f"{value / 1e6:,.3f} ms"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _line(name: str, change: Change, how: str) -> str:
    """Before, after and fraction kept; `how` a time is known."""
    before, after = (amount(name, value).removesuffix(" ms") for value in (change.before, change.after))
    return f"{before:>15} -> {after:>15}  ({change.kept:.3f} kept" + (f", ms {how})" if name == "latency" else ")")


def by_layer(report: Report) -> tuple[list[str], list[Layer], list[Layer]]:
    """The costs that are known layer by layer, the layers that are worth a row, and rows for what is left.

    That is all other layers together and, where there are times, what the model takes outside of all calls, so that
    every column adds up.
    """
    known = any("latency" in layer.costs for layer in report.layers)
    names = ["macs", "params", *(["latency"] if known else [])]
    none = {name: Change(0, 0) for name in names}
    layers = [Layer(layer.name, {**none, **layer.costs}) for layer in report.layers]
    total = sum(layer.costs["latency"].before for layer in layers) if known else 0

    def worth(layer: Layer) -> bool:
        return bool(layer.costs["macs"].before or (known and layer.costs["latency"].before > BRIEF * total))

    shown, rest = [y for y in layers if worth(y)], [y for y in layers if not worth(y)]
    left = []
    if rest:
        sums = {n: Change(*(sum(getattr(y.costs[n], w) for y in rest) for w in ("before", "after"))) for n in names}
        left.append(Layer(f"{len(rest)} without MACs", sums))
    if known and report.timing is not None:
        left.append(Layer("outside all calls", {**none, "latency": Change(*[report.timing.besides] * 2)}))
    return names, shown, left


def timed(report: Report) -> str:
    """What a predicted time is made of."""
    t = report.timing
    if t is None:
        return "no"
    besides = f"call by call, {amount('latency', t.besides)} besides"
    if not t.together:
        return besides
    whose = "its" if t.together == 1 else "their"
    together = f"{counted(t.together, 'call')}, {t.share:.3f} of the time, only as all {whose} sizes shrink at once"
    return f"{besides}; {together}"


def grouped(report: Report) -> str:
    """How many groups got smaller."""
    smaller = sum(w.after < w.before for w in report.groups)
    kinds = Counter(w.exactness for w in report.groups)
    return f"{smaller} of {len(report.groups)} smaller ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"


def scored_apart(report: Report) -> list[str]:
    """Groups that another criterion scored, or none."""
    by = Counter(w.criterion for w in report.groups if w.criterion)
    first = {w.criterion: w.name for w in reversed(report.groups)}
    lines = [f"{counted(n, 'group')} by {criterion} instead, such as {first[criterion]}" for criterion, n in by.items()]
    without = [w.name for w in report.groups if w.scores is None and not w.whole]
    if 0 < len(without) < len(report.groups):
        stay = "it stays as it was" if len(without) == 1 else "they stay as they were"
        lines.append(f"{counted(len(without), 'group')} not at all, such as {without[0]}: {stay}")
    return lines


def stuck(report: Report) -> list[str]:
    """Groups that are none any more, by cause, or none."""
    by = Counter(w.whole for w in report.groups if w.whole)
    first = {w.whole: w.name for w in reversed(report.groups)}
    are = {why: f"{counted(n, 'group')} {'is' if n == 1 else 'are'} none any more" for why, n in by.items()}
    return [f"{said}, such as {first[why]}: {why}" for why, said in are.items()]


def emitted(report: Report) -> str:
    """How the smaller module was made and why so, in one line; `report.reason` has all of it."""
    if not report.reason:
        return report.emitter
    said = report.reason.splitlines()[0]
    if len(said) > LONGEST:
        said = said[:LONGEST].rpartition(" ")[0] or said[:LONGEST]
    return f"{report.emitter} because {said}" + (" ..." if said != report.reason else "")


def grafted(report: Report) -> str:
    """Whose forward was written anew."""
    more = f" and {len(report.grafts) - 3} more" if len(report.grafts) > 3 else ""
    return f"{', '.join(report.grafts[:3])}{more}: their forward comes from the trace"


def verified(report: Report) -> str:
    """What the comparison found."""
    v = report.verification
    if v is None:
        return "no (verify=False)"
    found = (
        f"relative error {v.error:.1e} in {v.precision} on {counted(v.inputs, 'input')} (tolerance {v.tolerance:.0e})"
    )
    if v.effect <= v.tolerance:
        return f"{found}; the removed channels had no effect on these inputs, so this proves nothing"
    return f"{found}; zeroing itself moved the output by {v.effect:.1e}"


def _repaired(report: Report) -> list[str]:
    r = report.repair
    if r is None:
        return []
    lines = [
        f"  repaired  {repaired(report)}",
        f"    before pruning  {said(r.original)}",
        f"    pruned          {said(r.pruned)}",
        f"    repaired        {said(r.repaired)}",
    ]
    if r.ridges:
        lines.append(f"    fitted          {fitted(report)}")
    if r.left:
        name, reason = next(iter(r.left.items()))
        lines.append(f"    not repaired    {counted(len(r.left), 'layer')}, such as {name}: {reason}")
    return lines


def repaired(report: Report) -> str:
    """How weights were repaired."""
    r = report.repair
    if r is None:
        return "no"
    how = f"{r.method}, on {r.samples} of {counted(r.given, 'sample')}" if r.method != "none" else "no weights"
    if r.method != "none" and not r.kept:
        how += ", taken back since it did not help"
    return f"{how}; batch norm statistics {'taken anew' if r.batchnorm else 'as they were'}"


def fitted(report: Report) -> str:
    """How many layers were fitted, and how stiffly."""
    ridges = report.repair.ridges.values() if report.repair else ()
    return f"{counted(len(ridges), 'layer')}, ridge {min(ridges):.0e} to {max(ridges):.0e} of the mean square"


def said(quality: Quality) -> str:
    """How a model does on the batches."""
    loss = "" if quality.loss is None else f"loss {quality.loss:.4g}, "
    agreement = "" if quality.agreement is None else f", same largest output for {quality.agreement:.1%}"
    return f"{loss}output off by {quality.error:.3g}{agreement}"


def not_read(report: Report) -> str:
    """What the traced forward does not read."""
    which, keep = ("it", "it keeps its shape") if len(report.unused) == 1 else ("them", "they keep their shape")
    return (
        f"{counted(len(report.unused), 'tensor')}, such as {report.unused[0]}: the eval-mode forward does not "
        f"read {which}, so {keep}; code that only training runs may not fit {which} any more"
    )


def causes(report: Report) -> Counter[str]:
    """How many axes stayed whole, by cause."""
    return Counter(p.reason for p in report.pinned)
