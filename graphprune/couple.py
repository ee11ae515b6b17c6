"""Rules applied over a program, and the solved equations read as groups and pins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from graphprune.axes import Atom, Axes, Axis, Pin, Sum
from graphprune.collector import paused
from graphprune.coupling import Coupling, Exactness, Group, Member, Members, PinnedAxis, Unknown
from graphprune.errors import InputError, RuleError, TraceError, UnknownName, UnsupportedOp, counted, nearest
from graphprune.program import MAYBE_VIEWS, Node, Program, Value
from graphprune.rules import RULES, Applied, Call, Dims, Rule, find, left
from graphprune.trace import Inputs, trace


@paused()
def couple(
    program: Program,
    *,
    norms: Literal["pin", "prune"] = "pin",
    on_unknown: Literal["pin", "error"] = "pin",
    keep_names: Iterable[str] = (),
    rules: Mapping[str, Rule] = RULES,
) -> Coupling:
    """Work out which channels of a program must live or die together.

    Args:
        program: from `trace`.
        norms: "pin" keeps every axis that a normalisation takes statistics over; "prune" makes them renormalised
            groups, whose removal is not the same as zeroing.
        on_unknown: what an op without a rule does to the axes it touches: "pin" them, or "error".
        keep_names: parameters, buffers or modules whose widths must stay.
        rules: op name to rule; extend with `RULES | op(...)`.
    Raises:
        InputError: `norms` or `on_unknown` is none of these.
        UnsupportedOp: `on_unknown="error"` and ops without a rule; all of them are listed.
        UnknownName: a name in `keep_names` is not in the model.

    Example:
        >>> import torch, graphprune as gp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
        >>> [(g.name, g.size) for g in couple(gp.trace(net, torch.zeros(2, 3))).groups]
        [('0', 8)]
    """
    if norms not in ("pin", "prune"):
        raise InputError(f"norms={norms!r}; it is 'pin' or 'prune'")
    if on_unknown not in ("pin", "error"):
        raise InputError(f"on_unknown={on_unknown!r}; it is 'pin' or 'error'")
    keep_names = (keep_names,) if isinstance(keep_names, str) else tuple(keep_names)
    builder = _Builder(program, rules)
    builder.keep(keep_names)
    builder.apply()
    if builder.unknown and on_unknown == "error":
        raise UnsupportedOp(_unsupported(builder.unknown))
    again = functools.partial(couple, norms=norms, on_unknown=on_unknown, keep_names=keep_names, rules=rules)
    return builder.finish(norms, again)


def exported(coupling: Coupling, model: nn.Module, inputs: Inputs, *, anew: bool = False) -> Coupling:
    """The coupling of a program of `model` that can be run and rewritten: one that was exported, not only recorded.

    Args:
        coupling: of the same model, or of a copy of it in another precision.
        model, inputs: what is exported.
        anew: even if the program at hand can be run.
    Raises:
        TraceError: the model cannot be exported, or its exported program has other groups.
    """
    if coupling.program.source is not None and not anew:
        return coupling
    again = coupling.again(trace(model, inputs, front_end="export"))
    if not again.alike(coupling):
        raise TraceError(
            f"{coupling.program.model_class} has other groups when exported than when recorded; "
            "take the steps of gp.prune one by one, with gp.trace(..., front_end='export')"
        )
    return again


class _Builder:
    """The state of one coupling run."""

    def __init__(self, program: Program, rules: Mapping[str, Rule]) -> None:
        self.program, self.rules = program, rules
        self.axes = Axes()
        self.dims: dict[Value, Dims] = {}
        self.zero: dict[Value, tuple[bool, ...]] = {}
        self.applied: dict[str, Applied] = {}
        self.statistics: list[tuple[Axis, Node]] = []
        self.unknown: dict[str, tuple[str, list[Node]]] = {}
        self.root: dict[Value, Value] = {}
        self.live = _live(program)
        for value in program.state:
            self.dims[value] = tuple(Atom(size) for size in value.shape)
            self.zero[value] = tuple(value.kind != "constant" for _ in value.shape)
        for value in program.inputs:
            self.dims[value] = tuple(Atom(size) for size in value.shape)
            self.zero[value] = tuple(False for _ in value.shape)
            for d, axis in enumerate(self.dims[value]):
                self.axes.pin(axis, Pin(f"it reaches dim {d} of the model's input {value.target}"))

        self.left = _left(program)
        for value, dim in self.left.items():
            self.zero[value] = tuple(z and d != dim for d, z in enumerate(self.zero[value]))
        by_name = {v.target: v for v in program.state}
        for names in program.overlapping:
            for name in names:
                for axis in self.dims[by_name[name]]:
                    self.axes.pin(axis, Pin(f"{' and '.join(names)} share storage, so they cannot shrink apart"))

    def keep(self, names: Iterable[str]) -> None:
        """Pin the widths of the parameters and modules named.

        Raises:
            InputError: a name is not a string.
            UnknownName: the model has none of that name.
        """
        targets = {v.target: v for v in self.program.state if v.target}
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"keep_names holds {name!r}; it lists names of parameters or modules")
            name_here = self.program.aliases.get(name, name)
            found = [v for t, v in targets.items() if t == name_here or t.startswith(f"{name_here}.")]
            if not found:
                modules = {".".join(t.split(".")[:k]) for t in targets for k in range(1, t.count(".") + 2)}
                raise UnknownName(f"keep_names: no parameter or module {name!r}{nearest(name, [*targets, *modules])}")
            for value in found:
                for axis in self.dims[value]:
                    self.axes.pin(axis, Pin(f"keep_names asks for {name}"))

    def apply(self) -> None:
        """Apply the rule of every node, in order; what no rule fits is pinned and noted."""
        for node in self.program.nodes:
            call = Call(node, self.axes, self.dims, self.zero)
            rule = find(self.rules, node.op)
            try:
                outputs = _outputs(rule, call)
            except (RuleError, ValueError) as error:
                self.unknown.setdefault(node.op, (str(error), []))[1].append(node)
                call, outputs = self._touched(node)
            self._record(call, outputs)
        for k, value in enumerate(self.program.outputs):
            for d, axis in enumerate(self.dims[value] if k not in self.program.carried else ()):
                self.axes.pin(axis, Pin(f"it reaches dim {d} of the model's output {k}"))

    def _touched(self, node: Node) -> tuple[Call, list[Dims]]:
        """Everything an unknown op touches is pinned."""
        call = Call(node, self.axes, self.dims, self.zero)
        for value in node.values():
            for axis in self.dims[value]:
                call.pin(axis, f"no rule covers {node.op}")
        reason = f"no rule covers {node.op}"
        return call, [tuple(call.pinned(size, reason) for size in v.shape) for v in node.outputs]

    def _record(self, call: Call, outputs: list[Dims]) -> None:
        node = call.node
        zero = call.zero if call.zero is not None else [self._zero_of(node, dims) for dims in outputs]
        for value, dims, flags in zip(node.outputs, outputs, zero, strict=True):
            self.dims[value], self.zero[value] = dims, flags
        if node.name in self.live:  # statistics that nobody reads do not change what comes out
            self.statistics.extend((axis, node) for axis in call.renormalised)
        self.applied[node.name] = call.applied(outputs, zero)
        self._write_through(node)

    def _zero_of(self, node: Node, dims: Dims) -> tuple[bool, ...]:
        """A dim of a reshaped value holds zeros where all the dims it came from do."""
        operands = [(a, z) for v in node.values() for a, z in zip(self.dims[v], self.zero[v], strict=True)]

        def holds(axis: Axis) -> bool:
            parts = set(self.axes.leaves(axis))
            flags = [z for a, z in operands if a is axis or parts.intersection(self.axes.leaves(a))]
            return bool(flags) and all(flags)

        return tuple(holds(axis) for axis in dims)

    def _write_through(self, node: Node) -> None:
        """An in-place op changes what it was given, and everything that is a view of the same tensor."""
        operands = node.values()
        if not node.outputs or not operands:
            return
        if node.in_place or node.op in MAYBE_VIEWS:
            root = self.root.setdefault(operands[0], operands[0])
            for out in node.outputs:
                self.root[out] = root
        if node.in_place:
            zeros_stay = all(self.zero[node.outputs[0]])
            for value in [v for v, root_of in self.root.items() if root_of is self.root[operands[0]]]:
                if value is not node.outputs[0]:
                    same = value is operands[0] and len(self.zero[value]) == len(self.zero[node.outputs[0]])
                    now = self.zero[node.outputs[0]] if same else (zeros_stay,) * len(self.zero[value])
                    self.zero[value] = tuple(z and n for z, n in zip(self.zero[value], now, strict=True))

    def finish(self, norms: Literal["pin", "prune"], again: Callable[[Program], Coupling]) -> Coupling:
        """Settle the equations and read groups and pins off them."""
        renormalised: dict[Atom, Node] = {}
        if norms == "pin":
            for axis, node in self.statistics:
                self.axes.pin(axis, Pin(f"{node.op} takes statistics over it (norms='prune' allows it)", node))
        self.axes.settle()
        self._pin_unread()
        for axis, node in self.statistics:
            for atom in self.axes.leaves(axis):
                renormalised.setdefault(atom, node)
        slots = self._slots()
        names = _names({atom: found[0].best for atom, found in slots.items()}, self.dims, self.axes)
        groups, pinned, atoms, pins = [], [], {}, {}
        for atom, found in slots.items():
            members = Members([occurrence.members for occurrence in found])
            pin = self.axes.pin_of(atom)
            if pin is not None:
                pinned.append(PinnedAxis(names[atom], atom.size, members, pin.reason, str(pin.where)))
                pins[names[atom]] = atom
                continue
            by = renormalised.get(atom)
            exactness: Exactness = "exact" if by is None else "renormalised"
            groups.append(Group(names[atom], atom.size, members, exactness, "" if by is None else str(by)))
            atoms[names[atom]] = atom
        return Coupling(
            program=self.program,
            groups=tuple(groups),
            pinned=tuple(pinned),
            unknown=tuple(Unknown(op, tuple(str(n) for n in nodes), why) for op, (why, nodes) in self.unknown.items()),
            applied=self.applied,
            dims=self.dims,
            axes=self.axes,
            atoms=atoms,
            again=again,
            left={value.target: dim for value, dim in self.left.items()},
            pins=pins,
        )

    def _pin_unread(self) -> None:
        """Pin positions of parameters that are only cut off, such as rows of a position table past the input.

        What is read meets the input, or is summed over on the way (the inner dim of a product of two parameters).
        """
        met, read = set(self.program.inputs), set[Axis]()
        for node in self.program.nodes:
            if not met.isdisjoint(node.values()):
                met.update(node.outputs)
                read.update(axis for v in node.values() for axis in self.dims[v])
            elif node.op not in MAYBE_VIEWS:
                given = {self.axes.find(axis) for v in node.values() for axis in self.dims[v]}
                read |= given - {self.axes.find(axis) for v in node.outputs for axis in self.dims[v]}
        known = set(self.axes.leaves(Sum(*set(map(self.axes.find, read)))))
        every = Sum(*(axis for v in self.program.state if v.kind == "parameter" for axis in self.dims[v]))
        for atom in self.axes.leaves(every):
            if atom not in known:
                self.axes.pin(atom, Pin("it is cut off at these inputs, and other inputs may need it"))
        self.axes.settle()

    def _slots(self) -> dict[Atom, list[_Occurrence]]:
        """Per atom that occurs in a parameter, where; the occurrence that names it comes first.

        An atom is named by the first parameter it is an output of (dim 0 of two dims or more), else by the first slot.
        """
        unused = set(self.program.unused)
        by_axis: dict[Axis, list[tuple[Value, int]]] = {}
        for value in self.program.state:
            if value.target not in unused:
                for d, axis in enumerate(self.dims[value]):
                    by_axis.setdefault(self.axes.find(axis), []).append((value, d))
        slots: dict[Atom, list[_Occurrence]] = {}
        for axis, found in by_axis.items():
            occurrence = _Occurrence.of(found)
            for atom in self.axes.leaves(axis):
                slots.setdefault(atom, []).append(occurrence)
        for where in slots.values():
            best = min(range(len(where)), key=lambda i: (where[i].rank, i))
            where.insert(0, where.pop(best))
        return {a: found for a, found in slots.items() if found[0].rank < _BUFFER}


def _left(program: Program) -> dict[Value, int]:
    """Parameters that keep their values along one dim when channels are zeroed: all that read them ask for it."""
    asked: dict[Value, set[int | None]] = {}
    for node in program.nodes:
        found = left(node)
        for value in node.values():
            asked.setdefault(value, set()).add(found[1] if found is not None and found[0] is value else None)
    shown = set(program.outputs)
    return {
        value: dim
        for value, dims in asked.items()
        if value.kind == "parameter" and value not in shown and len(dims) == 1
        for dim in dims
        if dim is not None
    }


@dataclass(frozen=True)
class _Occurrence:
    """The slots that have one and the same axis, the best name first."""

    best: tuple[Value, int]
    rank: int
    members: tuple[Member, ...]

    @classmethod
    def of(cls, slots: list[tuple[Value, int]]) -> _Occurrence:
        ranks = [_rank(*slot) for slot in slots]
        slots.insert(0, slots.pop(ranks.index(min(ranks))))
        return cls(slots[0], min(ranks), tuple(Member(value.target, d) for value, d in slots))


def _live(program: Program) -> set[str]:
    """Names of the nodes whose results reach an output, and of those that write in place."""
    needed = set(program.outputs)
    live = set()
    for node in reversed(program.nodes):
        if node.in_place or not needed.isdisjoint(node.outputs):
            live.add(node.name)
            needed.update(node.values())
    return live


_BUFFER = 3


def _rank(value: Value, dim: int) -> int:
    """How well a slot names its channels: as output of a weight, as vector, as input."""
    if value.kind != "parameter":
        return _BUFFER
    if len(value.shape) == 1:
        return 1
    return 0 if dim == 0 else 2


def _names(first: Mapping[Atom, tuple[Value, int]], dims: Mapping[Value, Dims], axes: Axes) -> dict[Atom, str]:
    """Readable, unique names: the parameter, and which part of its dim the group is."""
    names: dict[Atom, str] = {}
    taken: set[str] = set()
    for atom, (value, d) in first.items():
        base = value.target.removesuffix(".weight").removesuffix(".bias") or value.name
        if len(value.shape) > 1 and d > 0:
            base = f"{base}.dim{d}"
        name = base + _part(atom, dims[value][d], axes)
        unique, k = name, 2
        while unique in taken:
            unique, k = f"{name}#{k}", k + 1
        taken.add(unique)
        names[atom] = unique
    return names


def _part(atom: Atom, axis: Axis, axes: Axes) -> str:
    """Which part of `axis` an atom is: `[8:24]` of a sum, `:3x[12]x64` of a product, nothing if it is the whole."""
    text, axis = "", axes.find(axis)
    while axis is not atom:
        terms = axes.terms(axis)
        if len(terms) > 1:
            start = 0
            for term in terms:
                if atom in axes.leaves(term):
                    break
                start += term.size
            text += f"[{start}:{start + term.size}]"
            axis = term
        else:
            factors = axes.factors(terms[0])
            here = next(i for i, f in enumerate(factors) if atom in axes.leaves(f))
            text += ":" + "x".join(f"[{f.size}]" if i == here else str(f.size) for i, f in enumerate(factors))
            axis = factors[here]
        axis = axes.find(axis)
    return text


def _outputs(rule: Rule | None, call: Call) -> list[Dims]:
    """The axes a rule gives the outputs of a call.

    Raises:
        RuleError: there is no rule, or its shapes are not those of the op.
    """
    if rule is None:
        raise RuleError("no rule")
    outputs = list(rule(call))
    shapes = [tuple(a.size for a in dims) for dims in outputs]
    wanted = [v.shape for v in call.node.outputs]
    if shapes != wanted:
        raise RuleError(f"the rule gives shapes {shapes}, the op {wanted}")
    return outputs


def _unsupported(unknown: Mapping[str, tuple[str, list[Node]]]) -> str:
    lines = []
    for name, (why, nodes) in unknown.items():
        lines.append(f"{why} for {name} ({counted(len(nodes), 'node')})" if why == "no rule" else f"{name}: {why}")
        lines.extend(f"  at {node}" for node in nodes[:4])
        rank = len(nodes[0].outputs[0].shape) if nodes[0].outputs else 0
        dims = " ".join(f"{c}!" for c in "bcxyzuvw"[:rank])
        lines.append(f"  add op({name!r}, '{dims} -> {dims}') to the rules, or leave it pinned: on_unknown='pin'")
    return "\n".join(lines)
