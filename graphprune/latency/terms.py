"""What a program's op calls look like at other widths, and which variables their times depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphprune.axes import Atom, Axis
from graphprune.cost.polynomial import symbolic
from graphprune.coupling import Coupling
from graphprune.latency.calls import OpCall, Operand
from graphprune.latency.table import Variable
from graphprune.program import Node, Value

MOST_VARIABLES = 3
Place = tuple[str | int, ...]
"""Argument name, index in a list where there is one, and dim of a tensor; or the path of an int."""


@dataclass(frozen=True, eq=False)
class Term:
    """One op call of the program whose time depends on widths.

    Attributes:
        node: its name.
        module: path of the module that makes it.
        call: at the original's widths.
        variables: what its time depends on, each alone; none where that is only how much it computes.
        places: per place of a size, the constant and the variables whose product it is.
        amount: how much it computes: multiply-adds where it has those, else elements.
        several: whether its time depends on more than one size.
        axes: per place, the axis.
        coupling: where the axes live.
    """

    node: str
    module: str
    call: OpCall
    variables: tuple[Variable, ...]
    places: Mapping[Place, tuple[int, tuple[int, ...]]]
    amount: Variable
    several: bool
    axes: Mapping[Place, Axis]
    coupling: Coupling

    def at(self, values: Sequence[int]) -> OpCall:
        """The call at values of the variables."""
        return _resized(self.call, {p: c * math.prod(values[v] for v in vs) for p, (c, vs) in self.places.items()})

    def along(self, fraction: float) -> tuple[float, OpCall]:
        """The amount and the call when all groups keep a fraction of their channels."""
        kept = {atom: max(1, round(fraction * atom.size)) for atom in self.coupling.atoms.values()}
        memo: dict[Axis, Any] = {}
        width = {place: int(self.coupling.axes.width(axis, kept, memo)) for place, axis in self.axes.items()}
        products = self.amount.products
        value = sum(math.prod(self.coupling.axes.width(a, kept, memo) for a in product) for product in products)
        return float(value), _resized(self.call, width)

    @property
    def key(self) -> str:
        """The same for calls that take the same time at all values of their variables."""
        sizes = [v.size for v in self.variables]
        ends = [(value, call.key) for value, call in map(self.along, (0.25, 0.5))]
        return f"{self.call.key} {sizes} {sorted(self.places.items(), key=repr)} {ends}"


def terms(coupling: Coupling, calls: Mapping[str, OpCall]) -> list[Term]:
    """The op calls whose times depend on widths.

    Args:
        coupling: of the program.
        calls: per node name, the call at the original's widths.
    """
    reader = _Reader(coupling)
    found = []
    for node in coupling.program.nodes:
        if node.name in calls and node.name in coupling.applied and (term := reader.term(node, calls[node.name])):
            found.append(term)
    return found


class _Reader:
    """Reads variables off the axes of calls."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.expression = symbolic(coupling.axes, list(coupling.atoms.values()))

    def term(self, node: Node, call: OpCall) -> Term | None:
        """The term of a node; None if its sizes do not depend on widths."""
        axes = {p: a for p, a in self._axes(node) if isinstance(self.expression(a), tuple)}
        if not axes:
            return None
        macs = self.coupling.applied[node.name].macs
        products: Sequence[Sequence[Axis]] = [(*made, *summed) for made, summed in macs]
        variables, places = self._grid(axes)
        several = len(variables) > 1
        if not products or not 1 <= len(variables) <= MOST_VARIABLES:
            variables, places = (), {}
        if not products:
            products = [self.coupling.dims[v] for v in (*node.values(), *node.outputs)]
        amount = Variable(products, sum(math.prod(a.size for a in product) for product in products))
        return Term(node.name, node.module, call, variables, places, amount, several, axes, self.coupling)

    def _axes(self, node: Node) -> Iterator[tuple[Place, Axis]]:
        """Every size among the arguments of a node, and its axis."""
        for name, argument in node.arguments.items():
            if isinstance(argument, Value):
                yield from (((name, d), axis) for d, axis in enumerate(self.coupling.dims[argument]))
            elif isinstance(argument, (tuple, list)):
                for i, each in enumerate(argument):
                    if isinstance(each, Value):
                        yield from (((name, i, d), axis) for d, axis in enumerate(self.coupling.dims[each]))
        yield from ((literal.path, literal.axis) for literal in self.coupling.applied[node.name].literals)

    def _grid(
        self, axes: Mapping[Place, Axis]
    ) -> tuple[tuple[Variable, ...], dict[Place, tuple[int, tuple[int, ...]]]]:
        """Variables, and each size as a constant times some of them: factors that occur together are one variable."""
        constants: dict[Place, int] = {}
        factors: dict[Any, tuple[Axis, list[Place]]] = {}
        for place, axis in axes.items():
            constants[place] = 1
            for factor in self.coupling.axes.factors(axis):
                expression = self.expression(factor)
                if isinstance(expression, tuple):
                    factors.setdefault(expression, (factor, []))[1].append(place)
                else:
                    constants[place] *= factor.size
        together: dict[tuple[Place, ...], list[Axis]] = {}
        for factor, found in factors.values():
            together.setdefault(tuple(found), []).append(factor)
        members: dict[Place, list[int]] = {place: [] for place in axes}
        for i, where in enumerate(together):
            for place in where:
                members[place].append(i)
        variables = []
        for i, (where, parts) in enumerate(together.items()):
            alone = all(members[place] == [i] for place in where)
            shared = {constants[place] for place in where}
            constant = shared.pop() if alone and len(shared) == 1 else 1
            if constant > 1:
                constants |= dict.fromkeys(where, 1)
            size = constant * math.prod(part.size for part in parts)
            variables.append(Variable(((Atom(constant), *parts),), size))
        return tuple(variables), {place: (constants[place], tuple(members[place])) for place in axes}


def _resized(call: OpCall, sizes: Mapping[Place, int]) -> OpCall:
    """The call with other sizes at some places."""
    arguments = dict(call.arguments)
    for name, argument in arguments.items():
        if isinstance(argument, Operand):
            arguments[name] = _reshaped(argument, {p[-1]: s for p, s in sizes.items() if p[0] == name})
        elif isinstance(argument, (tuple, list)):
            items = list(argument)
            for i, item in enumerate(items):
                if isinstance(item, Operand):
                    items[i] = _reshaped(item, {p[-1]: s for p, s in sizes.items() if p[:2] == (name, i)})
                else:
                    items[i] = sizes.get((name, i), item)
            arguments[name] = tuple(items)
        else:
            arguments[name] = sizes.get((name,), argument)
    return replace(call, arguments=arguments)


def _reshaped(operand: Operand, sizes: Mapping[Any, int]) -> Operand:
    return replace(operand, shape=tuple(sizes.get(d, size) for d, size in enumerate(operand.shape)))
