"""From a plan to a smaller module: the user's own class where that can be, a graph module otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import InputError, RewriteError
from graphprune.plan import Plan
from graphprune.rewrite.changes import Change, changes
from graphprune.rewrite.graft import emit_grafted
from graphprune.rewrite.graph import emit_graph
from graphprune.rewrite.module import emit_module
from graphprune.trace import Inputs

__all__ = ["Change", "Emit", "Rewritten", "changes", "rewrite"]

Emit = Literal["auto", "module", "graft", "graph"]


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A smaller module and how it was made.

    Attributes:
        model: the module.
        emitter: "module" (same class), "graft" (same class, some modules with a forward from the trace) or "graph".
        reason: what is limited about it, and why the emitters before it were passed over; empty if nothing.
        grafts: paths of the grafted modules.
        changes: the ints that its modules keep and that differ from the original's; none of a graph module.
    """

    model: nn.Module
    emitter: Literal["module", "graft", "graph"]
    reason: str
    grafts: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


def rewrite(
    model: nn.Module,
    example_inputs: Any,
    coupling: Coupling,
    plan: Plan,
    *,
    emit: Emit = "auto",
    problem: Callable[[nn.Module], str] = lambda candidate: "",
) -> Rewritten:
    """Build the smaller module.

    Args:
        model: the original; not modified.
        example_inputs: as for `trace`.
        coupling, plan: what to remove.
        emit: "module" for the same class, "graft" for the same class with some forwards from the trace, "graph" for a
            graph module, "auto" for the first of them without a problem.
        problem: what is wrong with a candidate, empty if nothing; it decides between readings of ambiguous attributes,
            and which modules are grafted.
    Raises:
        InputError: `emit` is none of these.
        PlanError: the plan was made for another model.
        RewriteError: the emitter asked for cannot carry out this plan.
    """
    if emit not in ("auto", "module", "graft", "graph"):
        raise InputError(f"emit={emit!r}; it is 'auto', 'module', 'graft' or 'graph'")
    plan.check(coupling)
    plan.check_model(model)
    _check_distinct(coupling, plan)
    inputs = Inputs.of(example_inputs)
    reasons: list[str] = []
    if emit in ("auto", "module"):
        try:
            small = emit_module(model, inputs, coupling, plan, problem)
            return Rewritten(small, "module", "", changes=changes(model, small))
        except RewriteError as error:
            reasons.append(f"the same class does not work: {error}")
            if emit == "module":
                raise RewriteError(f"{reasons[0]}\nuse emit='auto', 'graft' or 'graph'") from error
    if emit in ("auto", "graft"):
        try:
            grafted, paths = emit_grafted(model, inputs, coupling, plan, problem)
            kind: Literal["module", "graft"] = "graft" if paths else "module"
            return Rewritten(grafted, kind, "; ".join(reasons), paths, changes(model, grafted))
        except RewriteError as error:
            reasons.append(f"grafts do not work: {error}")
            if emit == "graft":
                raise RewriteError(f"{reasons[0]}\nuse emit='auto' or emit='graph'") from error
    small, limits = emit_graph(model, inputs, coupling, plan)
    return Rewritten(small, "graph", "; ".join(filter(None, (limits, *reasons))))


def _check_distinct(coupling: Coupling, plan: Plan) -> None:
    """Refuse a plan that gives one width to axes which an op tells apart by their sizes.

    Raises:
        RewriteError: it does; the message names the op.
    """
    widths = {coupling.atoms[name]: len(kept) for name, kept in plan.groups.items()}
    for applied in coupling.applied.values():
        for distinct in applied.distinct:
            first, second = (int(coupling.axes.width(axis, widths)) for axis in distinct.axes)
            if first == second:
                raise RewriteError(
                    f"{distinct.reason}, at {applied.node}, and the plan gives both the width {first}; "
                    "keep more or fewer channels of one of them"
                )
