"""From what the steps of a pruning found to the plain data of its report."""

from __future__ import annotations

import dataclasses
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune.axes import Atom
from graphprune.cost import Cost, widths
from graphprune.coupling import Coupling, Group
from graphprune.importance import Importance, Order, Scores, ordered
from graphprune.latency import Prediction
from graphprune.plan import Plan
from graphprune.program import Node, Value
from graphprune.report.records import Change, Histogram, Layer, Op, Pinned, Slot, Stage, Timing, Width

SHOWN = 24
"""Members that are listed per group; groups of a concatenation can have thousands."""
BINS = 20


@dataclass
class Ops:
    """Calls in the user's code, each once, with their positions."""

    positions: dict[Op, int] = field(default_factory=dict)

    def at(self, node: Node) -> int:
        """The position of the call behind a node."""
        op = Op(node.op, node.module, node.source, node.code)
        return self.positions.setdefault(op, len(self.positions))


# -- criteria ------------------------------------------------------------------------------------------------------


def described(criterion: object) -> str:
    """The class of a criterion and those of its options that are plain and differ from their defaults; words as such.

    Example:
        >>> import graphprune as gp
        >>> described(gp.importance.Gamma("max", otherwise=gp.importance.Magnitude()))
        "Gamma(reduction='max', otherwise=Magnitude)"
    """
    if isinstance(criterion, str):
        return criterion
    if not dataclasses.is_dataclass(criterion):
        return str(getattr(criterion, "__name__", type(criterion).__name__))
    options = []
    for option in dataclasses.fields(criterion):
        value = getattr(criterion, option.name)
        if value == option.default or option.name == "progress":  # which says nothing about scores
            continue
        if dataclasses.is_dataclass(value) and callable(value):
            options.append(f"{option.name}={described(value)}")
        elif isinstance(value, (bool, int, float, str)):
            options.append(f"{option.name}={reprlib.repr(value)}")
    return type(criterion).__name__ + (f"({', '.join(options)})" if options else "")


def histogram(score: torch.Tensor | Order, width: int) -> Histogram:
    """How scores are spread, in the order in which channels go; all but `width` of them went."""
    values = _in_order_of_removal(score)
    finite = torch.isfinite(values)
    gone = torch.arange(len(values)) < len(values) - width
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    bins = ((values[finite] - low) / ((high - low) or 1.0) * BINS).long().clamp(0, BINS - 1)
    counts = [torch.bincount(bins[which[finite]], minlength=BINS).tolist() for which in (~gone, gone)]
    parted = bool(gone.any() and (~gone).any() and values[gone].max() <= values[~gone].min())
    cut = float(values[~gone].min()) if parted else None
    return Histogram(low, high, tuple(counts[0]), tuple(counts[1]), cut, int((~finite).sum()))


def _in_order_of_removal(score: torch.Tensor | Order) -> torch.Tensor:
    """What each channel is worth, float64: its score, or what its order says that it costs."""
    if isinstance(score, torch.Tensor):
        found = score.detach().cpu().double()
        return found[torch.argsort(found, descending=True, stable=True).flip(0)]
    return ordered(score).lost.detach().cpu().double().flip(0).diff()


# -- groups --------------------------------------------------------------------------------------------------------


def groups(
    coupling: Coupling, plan: Plan, scores: Scores, by: Mapping[str, Importance], whole: Mapping[str, str], ops: Ops
) -> Iterator[Width]:
    """Everything there is to say about each group.

    Args:
        coupling, plan: whose groups, and what is left of them.
        scores: how their channels were scored.
        by: per group that an `otherwise` scored, which criterion that was.
        whole: per group that steps have made whole, why.
        ops: to be filled with the calls that tie members.
    """
    kept = widths(plan)
    for group in coupling.groups:
        width = kept[group.name]
        yield Width(
            name=group.name,
            before=group.size,
            after=width,
            members=len(group.members),
            exactness=group.exactness,
            cause=group.cause,
            slots=slots(coupling, group, ops),
            scores=histogram(scores[group.name], width) if group.name in scores else None,
            criterion=described(by[group.name]) if group.name in by else "",
            whole=whole.get(group.name, ""),
        )


def slots(coupling: Coupling, group: Group, ops: Ops) -> tuple[Slot, ...]:
    """The first members of a group, each with the shortest chain of ties to one before it."""
    listed = [(m.name, m.dim) for m, _ in zip(group.members, range(SHOWN), strict=False)]
    before = _tree(coupling, coupling.atoms[group.name], listed)
    number = {slot: k for k, slot in enumerate(listed)}
    found = []
    for k, slot in enumerate(listed):
        chain: list[int] = []
        here: tuple[str, int] | None = slot
        while here in before and (here is slot or number.get(here, k) >= k):
            here, node = before[here]
            chain.append(ops.at(node))
        to = number.get(here, k) if here is not None else k
        through = tuple(dict.fromkeys(reversed(chain)))
        found.append(Slot(*slot, *((to, through) if to < k else ())))
    return tuple(found)


def _tree(
    coupling: Coupling, atom: Atom, wanted: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], tuple[tuple[str, int], Node]]:
    """Per slot of an atom, the one before it on the way from the first that is wanted, and the node that ties them."""
    graph, within = coupling.graph, coupling.occurrences.get(atom, {})
    found: dict[tuple[str, int], tuple[tuple[str, int], Node]] = {}
    left, work = set(wanted[1:]), deque(wanted[:1])
    while work and left:
        here = work.popleft()
        for there, edge in graph.adj.get(here, {}).items():
            if there in within and there not in found and there != wanted[0]:
                found[there] = here, edge["node"]
                left.discard(there)
                work.append(there)
    return found


def pinned(coupling: Coupling) -> Iterator[Pinned]:
    """What stayed whole."""
    for p in coupling.pinned:
        yield Pinned(p.name, p.size, len(p.members), p.reason, p.where)


# -- layers and the flow between axes --------------------------------------------------------------------------------


def layers(coupling: Coupling, kept: Mapping[str, int], latency: Prediction | None = None) -> Iterator[Layer]:
    """Multiply-adds, parameters and predicted time of each module that has any of its own, as they first run."""
    program = coupling.program
    called = [
        (a.node.module, [(*made, *summed) for made, summed in a.macs]) for a in coupling.applied.values() if a.macs
    ]
    held = [(v.target.rpartition(".")[0], [coupling.dims[v]]) for v in program.parameters]
    found: dict[str, dict[str, Change]] = {}
    for name, parts in (("macs", called), ("params", held)):
        cost = Cost(name, [products for _, products in parts], coupling.axes, coupling.atoms)
        sums = [cost.polynomial.at(cost.vector(now)) for now in ({}, kept)]
        for (module, _), before, after in zip(parts, *sums, strict=True):
            costs = found.setdefault(module, {n: Change(0, 0) for n in ("macs", "params")})
            sofar = costs[name]
            costs[name] = Change(sofar.before + round(before), sofar.after + round(after))
    if latency is not None:
        before, after = (latency.by_module(now) for now in ({}, kept))
        for module in found | before:
            costs = found.setdefault(module, {n: Change(0, 0) for n in ("macs", "params")})
            costs["latency"] = Change(round(before.get(module, 0.0)), round(after.get(module, 0.0)))
    turns = {module: k for k, module in enumerate(dict.fromkeys(node.module for node in program.nodes))}
    for module in sorted(found, key=lambda module: turns.get(module, len(turns))):
        yield Layer(module, found[module])


def timing(latency: Prediction) -> Timing:
    """What the time that is predicted is made of."""
    total = latency.at({})
    together, nanoseconds = latency.together
    besides = max(0.0, total - sum(latency.by_module({}).values()))
    return Timing(besides, together, min(1.0, nanoseconds / total) if total else 0.0)


def stages(coupling: Coupling, ops: Ops) -> Iterator[Stage]:
    """The calls between which channels flow: those that multiply, and those that make channels not seen before."""
    named = list(coupling.atoms.values()) + [coupling.pins[p.name] for p in coupling.pinned]
    positions = {atom: k for k, atom in enumerate(named)}
    seen: set[int] = set()
    for node in coupling.program.nodes:
        applied = coupling.applied.get(node.name)
        given = _positions(coupling, [v for v in node.values() if v.kind in ("node", "input")], positions)
        made = _positions(coupling, node.outputs, positions)
        through = {k for k in given & made if k < len(coupling.atoms)}
        reads, writes = (given - made) | through, (made - given) | through
        if ((applied is not None and applied.macs) or not made <= seen) and (reads or writes):
            yield Stage(ops.at(node), tuple(sorted(reads)), tuple(sorted(writes)))
        seen |= given | made


def _positions(coupling: Coupling, values: Iterable[Value], positions: Mapping[Atom, int]) -> set[int]:
    found: Any = (coupling.axes.leaves(axis) for value in values for axis in coupling.dims[value])
    return {positions[atom] for leaves in found for atom in leaves if atom in positions}
