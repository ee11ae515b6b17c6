"""Which channels live or die together: groups, pins, and the answers to why."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import networkx as nx
import numpy as np

from graphprune.axes import Atom, Axes, Mask
from graphprune.errors import UnknownName, counted, nearest
from graphprune.program import Node, Program, Value
from graphprune.rules import Applied, Dims
from graphprune.rules.call import operand_values

SHOWN = 6
"""How many shared parts of two parameters `explain` spells out."""
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
        left: per parameter name, the dim along which it is left as it is where channels are zeroed, because another
            parameter makes the result zero there and the op is not finite without it (the direction of a weight norm).
        pins: per name of what is pinned, the atom it is.
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
    left: Mapping[str, int] = field(repr=False, default_factory=dict)
    pins: Mapping[str, Atom] = field(repr=False, default_factory=dict)

    def group(self, name: str) -> Group:
        """The group called `name`.

        Raises:
            UnknownName: no such group; the message gives the nearest names.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise UnknownName(f"no group {name!r}{nearest(name, [g.name for g in self.groups])}")

    def alike(self, other: Coupling) -> bool:
        """Whether a plan for one is a plan for the other: the same groups of the same sizes."""
        return {(g.name, g.size) for g in self.groups} == {(g.name, g.size) for g in other.groups}

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

        Parameters and buffers go by their own names, other values by a % and theirs. Of the slots that one op ties,
        each is joined to the first.
        """
        graph = nx.Graph()
        for applied in self.applied.values():
            slots = [*operand_values(applied.node), *applied.node.outputs]
            for tie in ties(applied, self.axes):
                named = [(slots[i], d) for i, d in tie if i < len(slots) and slots[i] is not None]
                for b, db in named[1:]:
                    graph.add_edge((_label(named[0][0]), named[0][1]), (_label(b), db), node=applied.node)
        return graph

    def explain(self, a: str, b: str) -> str:
        """Why two parameters are tied, in sentences with source lines.

        Args:
            a, b: fully qualified names of parameters or buffers.
        Returns:
            For each part they share, one line per op on the shortest chain of ties; or a sentence saying they are not
            tied.
        Raises:
            UnknownName: a name is not in the model.
        """
        first, second = self.slot(a), self.slot(b)
        if first is second:
            return f"{a} and {b} are one and the same tensor"
        chains = []
        for da, axis in enumerate(self.dims[first]):
            for db, other in enumerate(self.dims[second]):
                theirs = set(self.axes.leaves(other))
                shared = [atom for atom in self.axes.leaves(axis) if atom in theirs]
                chains += [self._chain((a, first, da), (b, second, db), atom) for atom in shared]
        if len(chains) > SHOWN:
            chains[SHOWN:] = [f"and {len(chains) - SHOWN} more parts"]
        return "\n".join(chains) or f"{a} and {b} are not tied: they share no channels"

    def _chain(self, a: tuple[str, Value, int], b: tuple[str, Value, int], atom: Atom) -> str:
        title = f"{a[0]} dim {a[2]} and {b[0]} dim {b[2]} share {atom.size} channels{self._group_of(atom)}:"
        within = self.graph.subgraph(self.occurrences.get(atom, ()))
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
    def occurrences(self) -> Mapping[Atom, Mapping[tuple[str, int], None]]:
        """Per atom, the slots of `graph` that it occurs in, in order."""
        found: dict[Atom, dict[tuple[str, int], None]] = {}
        for slot in self.graph:
            for atom in self._leaves_of(slot):
                found.setdefault(atom, {})[slot] = None
        return found

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
            lines.append(f"no rule for {u.op} ({counted(len(u.nodes), 'node')}): {u.why}")
        return "\n".join(lines)


def ties(applied: Applied, axes: Axes) -> Iterable[Sequence[tuple[int, int]]]:
    """Per tie, the (position, dim) of each slot that an op makes one index set, outputs counted after operands.

    They are what the rule stated, or, for a rule that states none, the dims that share atoms.
    """
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
