"""What was asked for, what came out, what stayed whole and why: as data, and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.allocate import Target
from graphprune.cost import COSTS, Costs, widths
from graphprune.coupling import Coupling, PinnedAxis, Unknown
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.recover import Quality, Repair
from graphprune.rewrite import Rewritten
from graphprune.verify import Verification


@dataclass(frozen=True)
class Width:
    """One group before and after."""

    name: str
    before: int
    after: int
    members: int
    exactness: str


@dataclass(frozen=True)
class Change:
    """One cost before and after."""

    before: int
    after: int

    @property
    def kept(self) -> float:
        """Fraction kept; 1 for a cost of nothing."""
        return self.after / self.before if self.before else 1.0

    def __str__(self) -> str:
        return f"{self.before:>15,} -> {self.after:>15,}  ({self.kept:.3f} kept)"

    def timed(self, how: str) -> str:
        """Of nanoseconds, the same in milliseconds."""
        return f"{self.before / 1e6:>15,.3f} -> {self.after / 1e6:>15,.3f}  ({self.kept:.3f} kept, ms {how})"


@dataclass(frozen=True)
class Report:
    """Everything a user may want to know about one pruning.

    Attributes:
        model_class: name of the pruned class.
        requested: the target.
        costs: macs, params and channels, before and after; MACs at the example inputs. With a latency in the target
            also that, in nanoseconds, as predicted.
        groups: width of every group before and after.
        pinned: parts of parameters that stayed whole, with the cause.
        unknown: ops without a rule.
        unused: parameters and buffers that the traced forward does not read.
        traced: "recorded", or "exported" and why, if recording was tried.
        emitter: "module", "graft" or "graph".
        reason: why the emitters before it were passed over; empty if it was the first.
        grafts: paths of the modules whose forward comes from the trace.
        verification: what the comparison with the zeroed original found before any repair; None if switched off.
        repair: what repair did and was worth; None if none was asked for.
        measured: nanoseconds that the original and the smaller model took, measured in turn; None without a latency
            in the target, and where times are not this device's.
    """

    model_class: str
    requested: Target
    costs: Mapping[str, Change]
    groups: tuple[Width, ...]
    pinned: tuple[PinnedAxis, ...]
    unknown: tuple[Unknown, ...]
    unused: tuple[str, ...]
    traced: str
    emitter: str
    reason: str
    grafts: tuple[str, ...]
    verification: Verification | None
    repair: Repair | None = None
    measured: Change | None = None

    def __str__(self) -> str:
        """A summary of one screen; `table()` has every group."""
        asked = self.requested
        lines = [f"graphprune: {self.model_class}, requested {asked}"]
        for name, change in self.costs.items():
            lines.append(f"  {name:<9} " + (change.timed("predicted") if name == "latency" else str(change)))
        if self.measured is not None:
            lines.append(f"  {'':<9} {self.measured.timed('measured')}")
        smaller = sum(w.after < w.before for w in self.groups)
        kinds = Counter(w.exactness for w in self.groups)
        classes = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines.append(f"  groups    {smaller} of {len(self.groups)} smaller ({classes})")
        lines.append(f"  traced    {self.traced}")
        lines.append(f"  emitted   {self.emitter}" + (f" because {self.reason}" if self.reason else ""))
        if self.grafts:
            more = f" and {len(self.grafts) - 3} more" if len(self.grafts) > 3 else ""
            lines.append(f"  grafted   {', '.join(self.grafts[:3])}{more}: their forward comes from the trace")
        lines.append(f"  verified  {self._verified()}")
        lines.extend(self._repaired())
        lines.extend(f"  pinned    {n} axes: {reason}" for reason, n in self._causes().most_common(6))
        if self.unused:
            lines.append(
                f"  not read  {len(self.unused)} tensors, such as {self.unused[0]}: the eval-mode forward does not "
                "read them, so they keep their shape; code that only training runs may not fit them any more"
            )
        for u in self.unknown:
            lines.append(f"  no rule   {u.op}, {len(u.nodes)} nodes, first at {u.nodes[0]}: {u.why}")
        return "\n".join(lines)

    def _verified(self) -> str:
        v = self.verification
        if v is None:
            return "no (verify=False)"
        text = f"relative error {v.error:.1e} in {v.precision} on {v.inputs} inputs (tolerance {v.tolerance:.0e})"
        if v.effect <= v.tolerance:
            return f"{text}; the removed channels had no effect on these inputs, so this proves nothing"
        return f"{text}; zeroing itself moved the output by {v.effect:.1e}"

    def _repaired(self) -> list[str]:
        r = self.repair
        if r is None:
            return []
        how = f"{r.method}, on {r.samples} of {r.given} samples" if r.method != "none" else "no weights"
        if r.method != "none" and not r.kept:
            how += ", taken back since it did not help"
        lines = [
            f"  repaired  {how}; batch norm statistics {'taken anew' if r.batchnorm else 'as they were'}",
            f"    before pruning  {_said(r.original)}",
            f"    pruned          {_said(r.pruned)}",
            f"    repaired        {_said(r.repaired)}",
        ]
        if r.ridges:
            low, high = min(r.ridges.values()), max(r.ridges.values())
            lines.append(
                f"    fitted          {len(r.ridges)} layers, ridge {low:.0e} to {high:.0e} of the mean square"
            )
        if r.left:
            name, reason = next(iter(r.left.items()))
            lines.append(f"    not repaired    {len(r.left)} layers, such as {name}: {reason}")
        return lines

    def _causes(self) -> Counter[str]:
        return Counter(p.reason for p in self.pinned)

    def table(self) -> str:
        """One line per group: width before and after, members, exact or renormalised."""
        wide = max([len(w.name) for w in self.groups] + [5])
        head = f"{'group':<{wide}}  before  after  members  class"
        rows = [f"{w.name:<{wide}}  {w.before:>6}  {w.after:>5}  {w.members:>7}  {w.exactness}" for w in self.groups]
        return "\n".join([head, *rows])


def _said(quality: Quality) -> str:
    loss = "" if quality.loss is None else f"loss {quality.loss:.4g}, "
    agreement = "" if quality.agreement is None else f", same largest output for {quality.agreement:.1%}"
    return f"{loss}output off by {quality.error:.3g}{agreement}"


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
    latency: Costs | None = None,
    measured: tuple[float, float] | None = None,
) -> Report:
    """Put together what the steps found."""
    kept = widths(plan)
    models = [model(coupling) for model in COSTS.values()]
    costs = {cost.name: Change(cost.at({}), cost.at(kept)) for cost in models}
    if latency is not None:
        costs["latency"] = Change(latency.at({}), latency.at(kept))
    return Report(
        model_class=coupling.program.model_class,
        requested=target,
        costs=costs,
        groups=tuple(Width(g.name, g.size, kept[g.name], len(g.members), g.exactness) for g in coupling.groups),
        pinned=coupling.pinned,
        unknown=coupling.unknown,
        unused=tuple(n for n in coupling.program.unused if not n.endswith("num_batches_tracked")),
        traced=_traced(coupling.program),
        emitter=rewritten.emitter,
        reason=rewritten.reason,
        grafts=rewritten.grafts,
        verification=verification,
        repair=repair,
        measured=None if measured is None else Change(round(measured[0]), round(measured[1])),
    )
