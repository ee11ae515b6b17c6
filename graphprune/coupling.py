"""Which channels live or die together: rules applied over a program, read as groups and pins."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import networkx as nx
import numpy as np

from graphprune.axes import Atom, Axes, Axis, Mask, Pin
from graphprune.errors import InputError, RuleError, UnknownName, UnsupportedOp, nearest
from graphprune.program import Node, Program, Value
from graphprune.rules import RULES, Applied, Call, Dims, Rule, find
from graphprune.rules.call import operand_values

Exactness = Literal["exact", "renormalised"]


@dataclass(frozen=True)
class Member:
    """A dim of a parameter or buffer in which a group occurs.

    Attributes:
        name: fully qualified name of the tensor.
        dim: which of its dims.
    """

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


class Members(Sequence[Member]):
    """The members of a group. Groups of a concatenation share most of theirs, so the runs are kept, not copied."""

    def __init__(self, runs: Sequence[Sequence[Member]]) -> None:
        self._runs = runs

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def __iter__(self) -> Iterator[Member]:
        return itertools.chain.from_iterable(self._runs)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Member]: ...
    def __getitem__(self, index: int | slice) -> Member | Sequence[Member]:
        return tuple(self)[index]

    def __repr__(self) -> str:
        return f"Members({', '.join(map(str, self))})"


@dataclass(frozen=True)
class Group:
    """Channels that are removed one by one, each from all members at once.

    Attributes:
        name: a parameter's name, and which part of its dim where the group is only a part of it:
            `conv[8:24]` for a run of positions, `qkv:3x[12]x64` for a factor of a product.
        size: number of channels.
        members: where they occur, the one that names the group first.
        exactness: "exact" when removing a channel is the same as zeroing it; "renormalised" when a normalisation
            takes statistics over the group.
        cause: the normalisation, for a renormalised group.
    """

    name: str
    size: int
    members: Sequence[Member]
    exactness: Exactness
    cause: str = ""


@dataclass(frozen=True)
class PinnedAxis:
    """A part of some parameter's dims that must stay whole, and why."""

    name: str
    size: int
    members: Sequence[Member]
    reason: str
    where: str


@dataclass(frozen=True)
class Unknown:
    """An op that no rule covers: everything it touches is pinned."""

    op: str
    nodes: tuple[str, ...]
    why: str


@dataclass(frozen=True, eq=False)
class Coupling:
    """The channel-coupling graph of a program.

    Attributes:
        program: what was coupled.
        groups: channels that may be removed, in order of their first parameter.
        pinned: parts of parameters that stay whole, with the cause.
        unknown: ops without a rule.
        applied: per node name, what its rule said.
        dims: axes of every value.
        axes: the solved equations.
        atoms: per group name, the atom it is.
        again: couples another program of the same model with the same options.
    """

    program: Program
    groups: tuple[Group, ...]
    pinned: tuple[PinnedAxis, ...]
    unknown: tuple[Unknown, ...]
    applied: Mapping[str, Applied] = field(repr=False)
    dims: Mapping[Value, Dims] = field(repr=False)
    axes: Axes = field(repr=False)
    atoms: Mapping[str, Atom] = field(repr=False)
    again: Callable[[Program], Coupling] = field(repr=False)

    def group(self, name: str) -> Group:
        """The group called `name`.

        Raises:
            UnknownName: no such group; the message gives the nearest names.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise UnknownName(f"no group {name!r}{nearest(name, [g.name for g in self.groups])}")

    def slot(self, name: str) -> Value:
        """The state tensor called `name`, by any of its names.

        Raises:
            UnknownName: no such parameter or buffer; the message gives the nearest names.
        """
        target = self.program.aliases.get(name, name)
        for value in self.program.state:
            if value.target == target:
                return value
        raise UnknownName(f"no parameter or buffer {name!r}{nearest(name, self.program.names())}")

    def keep(self, kept: Mapping[str, Sequence[int]]) -> dict[Atom, Mask]:
        """Per atom, which positions stay, from kept positions per group name."""
        masks: dict[Atom, Mask] = {}
        for name, positions in kept.items():
            atom = self.atoms[self.group(name).name]
            mask = np.zeros(atom.size, dtype=bool)
            mask[list(positions)] = True
            masks[atom] = mask
        return masks

    @functools.cached_property
    def graph(self) -> nx.Graph:
        """Slots (value name, dim) joined by the ops that make them one index set; edges carry their `node`.

        Of the slots that one op ties, each is joined to the first.
        """
        graph = nx.Graph()
        for applied in self.applied.values():
            slots = [*operand_values(applied.node), *applied.node.outputs]
            for tie in _ties(applied, self.axes):
                named = [(slots[i], d) for i, d in tie if i < len(slots) and slots[i] is not None]
                for b, db in named[1:]:
                    graph.add_edge((_label(named[0][0]), named[0][1]), (_label(b), db), node=applied.node)
        return graph

    def explain(self, a: str, b: str) -> str:
        """Why two parameters are tied, in sentences with source lines.

        Args:
            a, b: fully qualified names of parameters or buffers.
        Returns:
            One line per op on the shortest chain of ties between them, or a sentence saying they are not tied.
        Raises:
            UnknownName: a name is not in the model.
        """
        first, second = self.slot(a), self.slot(b)
        for da, axis in enumerate(self.dims[first]):
            for db, other in enumerate(self.dims[second]):
                shared = [x for x in self.axes.leaves(axis) if x in set(self.axes.leaves(other))]
                if shared and (first is not second or da < db):
                    return self._chain((a, first, da), (b, second, db), shared[0])
        return f"{a} and {b} are not tied: they share no channels"

    def _chain(self, a: tuple[str, Value, int], b: tuple[str, Value, int], atom: Atom) -> str:
        title = f"{a[0]} dim {a[2]} and {b[0]} dim {b[2]} share {atom.size} channels{self._group_of(atom)}:"
        within = self.graph.edge_subgraph(
            [e for e in self.graph.edges if all(atom in self._leaves_of(slot) for slot in e)]
        )
        ends = (_label(a[1]), a[2]), (_label(b[1]), b[2])
        if not all(end in within for end in ends) or not nx.has_path(within, *ends):
            return f"{title} they are the same index set by their sizes alone"
        path = nx.shortest_path(within, *ends)
        lines = []
        for here, there in itertools.pairwise(path):
            node: Node = within.edges[here, there]["node"]
            code = f": `{node.code}`" if node.code else ""
            lines.append(f"  {_spell(here)} goes with {_spell(there)} through {node}{code}")
        return "\n".join([title, *lines])

    def _group_of(self, atom: Atom) -> str:
        for name, held in self.atoms.items():
            if held is atom:
                return f" (group {name})"
        pin = self.axes.pin_of(atom)
        return f" (pinned: {pin})" if pin else ""

    @functools.cached_property
    def _by_label(self) -> Mapping[str, Value]:
        return {_label(v): v for v in self.dims}

    def _leaves_of(self, slot: tuple[str, int]) -> list[Atom]:
        dims = self.dims[self._by_label[slot[0]]]
        return self.axes.leaves(dims[slot[1]]) if slot[1] < len(dims) else []

    def why_not(self, name: str, dim: int) -> str:
        """Why a dim of a parameter cannot be pruned, or which groups it can lose channels from.

        Args:
            name: fully qualified name of a parameter or buffer.
            dim: which of its dims.
        Raises:
            UnknownName: the name is not in the model, or it has no such dim.
        """
        value = self.slot(name)
        if not 0 <= dim < len(value.shape):
            raise UnknownName(f"{name} has dims 0..{len(value.shape) - 1}, not {dim}")
        if value.target in self.program.unused:
            return f"{name} is read by no op of the traced forward, so nothing ties or shrinks it"
        axis = self.dims[value][dim]
        leaves = self.axes.leaves(axis)
        if not leaves:
            return f"{name} dim {dim} has no two channels that could be told apart (its parts have size 1)"
        named = {atom: n for n, atom in self.atoms.items()}
        lines = []
        for atom in leaves:
            if atom in named:
                lines.append(f"{name} dim {dim}: {atom.size} channels can be pruned, as group {named[atom]}")
            else:
                lines.append(f"{name} dim {dim}: {atom.size} channels stay because {self.axes.pin_of(atom)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """A readable table: one line per group, then what is pinned, by cause."""
        wide = max([len(g.name) for g in self.groups] + [5])
        lines = [f"{'group':<{wide}}  channels  members  class"]
        for g in self.groups:
            lines.append(f"{g.name:<{wide}}  {g.size:>8}  {len(g.members):>7}  {g.exactness}")
        if self.pinned:
            lines.append("pinned")
        for p in self.pinned:
            lines.append(f"  {p.name} ({p.size}): {p.reason}" + (f", at {p.where}" if p.where else ""))
        for u in self.unknown:
            lines.append(f"no rule for {u.op} ({len(u.nodes)} nodes): {u.why}")
        return "\n".join(lines)


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
        self.base: dict[Value, Value] = {}
        for value in program.state:
            self.dims[value] = tuple(Atom(size) for size in value.shape)
            self.zero[value] = tuple(True for _ in value.shape)
        for value in program.inputs:
            self.dims[value] = tuple(Atom(size) for size in value.shape)
            self.zero[value] = tuple(False for _ in value.shape)
            for d, axis in enumerate(self.dims[value]):
                self.axes.pin(axis, Pin(f"it reaches dim {d} of the model's input {value.target}"))

    def keep(self, names: Iterable[str]) -> None:
        """Pin the widths of the parameters and modules named.

        Raises:
            UnknownName: the model has none of that name.
        """
        targets = {v.target: v for v in self.program.state if v.target}
        for name in names:
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
            for d, axis in enumerate(self.dims[value]):
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
        """An in-place op changes what it was given, and what that is a view of."""
        operands = list(node.values())
        if not node.outputs or not operands:
            return
        if node.op.endswith("_") and not node.op.endswith("__"):
            value: Value | None = operands[0]
            now = self.zero[node.outputs[0]]
            if value is not None and len(now) == len(self.zero[value]):
                self.zero[value] = now
            while (value := self.base.get(value) if value else None) is not None:
                self.zero[value] = tuple(z and all(now) for z in self.zero[value])
            self.base[node.outputs[0]] = operands[0]
        elif node.op in _VIEWS:
            for out in node.outputs:
                self.base[out] = operands[0]

    def finish(self, norms: Literal["pin", "prune"], again: Callable[[Program], Coupling]) -> Coupling:
        """Settle the equations and read groups and pins off them."""
        renormalised: dict[Atom, Node] = {}
        if norms == "pin":
            for axis, node in self.statistics:
                self.axes.pin(axis, Pin(f"{node.op} takes statistics over it (norms='prune' allows it)", node))
        self.axes.settle()
        for axis, node in self.statistics:
            for atom in self.axes.leaves(axis):
                renormalised.setdefault(atom, node)
        slots = self._slots()
        names = _names({atom: found[0].best for atom, found in slots.items()}, self.dims, self.axes)
        groups, pinned, atoms = [], [], {}
        for atom, found in slots.items():
            members = Members([occurrence.members for occurrence in found])
            pin = self.axes.pin_of(atom)
            if pin is not None:
                pinned.append(PinnedAxis(names[atom], atom.size, members, pin.reason, str(pin.where)))
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
        )

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


_VIEWS = frozenset(
    {
        *("view", "reshape", "slice", "select", "unbind", "chunk", "split", "split_with_sizes", "narrow", "transpose"),
        *("permute", "t", "squeeze", "unsqueeze", "expand", "expand_as", "alias", "detach", "flatten", "unflatten"),
        *("view_as", "movedim", "diagonal", "as_strided", "lift_fresh", "contiguous", "tensor_split", "to"),
    }
)


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


def _ties(applied: Applied, axes: Axes) -> Iterable[Sequence[tuple[int, int]]]:
    """The ties a rule stated, or, for a rule that states none, the dims that share atoms."""
    if applied.ties:
        return applied.ties
    by_atom: dict[Atom, list[tuple[int, int]]] = {}
    for i, dims in enumerate((*applied.operands, *applied.outputs)):
        for d, axis in enumerate(dims or ()):
            for atom in axes.leaves(axis):
                by_atom.setdefault(atom, []).append((i, d))
    return [places for places in by_atom.values() if len(places) > 1]


def _label(value: Value | None) -> str:
    assert value is not None
    return value.target if value.kind in ("parameter", "buffer") else f"%{value.name}"


def _spell(slot: tuple[str, int]) -> str:
    return f"dim {slot[1]} of {slot[0]}"


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
        lines.append(f"{why} for {name} ({len(nodes)} nodes)" if why == "no rule" else f"{name}: {why}")
        lines.extend(f"  at {node}" for node in nodes[:4])
        rank = len(nodes[0].outputs[0].shape) if nodes[0].outputs else 0
        dims = " ".join(f"{c}!" for c in "bcxyzuvw"[:rank])
        lines.append(f"  add op({name!r}, '{dims} -> {dims}') to the rules, or leave it pinned: on_unknown='pin'")
    return "\n".join(lines)
