"""One op call while its rule is applied, and the record of what the rule said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from graphprune.axes import Atom, Axes, Axis, Pin
from graphprune.errors import RuleError
from graphprune.program import Node, Value

Dims: TypeAlias = tuple[Axis, ...]
Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Literal:
    """An int among a node's arguments that is the size of an axis, so it changes when the axis does.

    Attributes:
        path: argument name, then the index inside a list argument.
        axis: whose size it is.
    """

    path: Path
    axis: Axis


@dataclass(frozen=True)
class Fixed:
    """An argument left to a default that depends on an axis; it must be stated once that axis changes."""

    argument: str
    value: Any
    axis: Axis


@dataclass(frozen=True)
class Replacement:
    """The op to call instead once one of `axes` changes (`chunk` becomes `split_with_sizes`).

    Attributes:
        op: ATen name with overload, such as "split_with_sizes.default".
        arguments: all of its arguments.
        literals: which of them are sizes.
        axes: what it depends on.
    """

    op: str
    arguments: Mapping[str, Any]
    literals: tuple[Literal, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Distinct:
    """Two axes whose widths must stay different, and why."""

    axes: tuple[Axis, Axis]
    reason: str


class Multiplied(NamedTuple):
    """Multiply-adds: the product of the sizes of these axes.

    Attributes:
        made: axes of the outputs.
        summed: axes the outputs do not have.
    """

    made: Dims
    summed: Dims


@dataclass(frozen=True)
class Applied:
    """What a rule said about one node.

    Attributes:
        node: the node.
        operands: axes of each tensor argument, lists of tensors flattened, in schema order; None where absent.
        outputs: axes of each output.
        ties: slots that the op makes one index set: per tie, (position, dim) with outputs counted after operands.
        literals: int arguments that are sizes.
        fixed: arguments that must be stated once an axis changes.
        replacement: another op to call where the literals cannot say it.
        renormalised: axes over which the op takes statistics.
        macs: products of axes, their sum being the multiply-adds of the op.
        zero: per output and dim, whether the removed positions hold zeros in the zeroed original.
        distinct: axes that may shrink, but not to one width.
    """

    node: Node
    operands: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    ties: tuple[tuple[tuple[int, int], ...], ...] = ()
    literals: tuple[Literal, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    replacement: Replacement | None = None
    renormalised: tuple[Axis, ...] = ()
    macs: tuple[Multiplied, ...] = ()
    zero: tuple[tuple[bool, ...], ...] = ()
    distinct: tuple[Distinct, ...] = ()


class Rule(Protocol):
    """How one op ties the axes of its operands and outputs."""

    def __call__(self, call: Call, /) -> Sequence[Dims]:
        """State what `call` ties, through `call`; return the axes of each output."""


class Call:
    """What a rule sees of a node, and where it states what the op means for the axes.

    Args:
        node: the op call.
        axes: the equations.
        dims: axes per value.
        zero: per value and dim, whether removed positions hold zeros.
    """

    def __init__(
        self, node: Node, axes: Axes, dims: Mapping[Value, Dims], zero: Mapping[Value, tuple[bool, ...]]
    ) -> None:
        self.node, self.axes = node, axes
        self._dims, self._zero = dims, zero
        self.literals: list[Literal] = []
        self.fixed: list[Fixed] = []
        self.replacement: Replacement | None = None
        self.renormalised: list[Axis] = []
        self.macs: list[Multiplied] = []
        self.ties: list[tuple[tuple[int, int], ...]] = []
        self.zero: list[tuple[bool, ...]] | None = None
        self.distinct: list[Distinct] = []

    def __getitem__(self, name: str) -> Any:
        """The argument called `name` in the op's schema; None where the overload has none of that name."""
        return self.node.arguments.get(name)

    def has(self, name: str) -> bool:
        """Whether this overload of the op has an argument called `name`."""
        return name in self.node.arguments

    def dims(self, value: Value) -> Dims:
        """The axes of a tensor argument."""
        return self._dims[value]

    def zeros(self, value: Value) -> tuple[bool, ...]:
        """Per dim of a tensor argument, whether its removed positions hold zeros in the zeroed original."""
        return self._zero[value]

    @property
    def first(self) -> Value:
        """The first tensor argument.

        Raises:
            RuleError: there is none.
        """
        if self.node.values():
            return self.node.values()[0]
        raise RuleError(f"{self.node} has no tensor argument")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.node.outputs[0].shape

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """The dim argument `name`, counted from the front."""
        given = self[name]
        return int(given) % max(1, len(self.dims(self.first)) if rank is None else rank)

    def unify(self, a: Axis, b: Axis) -> Axis:
        """State that two axes are one index set; a single position couples nothing. Returns the wider one."""
        if a.size == 1 or b.size == 1:
            return b if a.size == 1 else a
        self.axes.unify(a, b, self.node)
        return a

    def pin(self, axis: Axis, reason: str) -> None:
        """State that every position of `axis` must stay, because of `reason`."""
        if axis.size > 1:
            self.axes.pin(axis, Pin(reason, self.node))

    def pinned(self, size: int, reason: str) -> Axis:
        """A new axis that must stay whole."""
        axis = Atom(size)
        self.pin(axis, reason)
        return axis

    def literal(self, axis: Axis, *path: str | int) -> None:
        """State that the int argument at `path` is the size of `axis`."""
        self.literals.append(Literal(path, axis))

    def fix(self, argument: str, value: Any, axis: Axis) -> None:
        """State the value of an argument that is left to a default, for when `axis` changes."""
        self.fixed.append(Fixed(argument, value, axis))

    def differ(self, a: Axis, b: Axis, reason: str) -> None:
        """State that two axes must not shrink to one width, because of `reason`."""
        self.distinct.append(Distinct((a, b), reason))

    def multiply(self, made: Iterable[Axis], summed: Iterable[Axis]) -> None:
        """State a product of axes as multiply-adds: what the op's outputs have, and what it sums over."""
        self.macs.append(Multiplied(tuple(made), tuple(summed)))

    def tie(self, *places: tuple[int, int]) -> None:
        """State which (operand or output, dim) slots the op makes one index set, for explanations."""
        self.ties.append(places)

    def applied(self, outputs: Sequence[Dims], zero: Sequence[tuple[bool, ...]]) -> Applied:
        """The frozen record of this call."""
        operands = tuple(self._dims[v] if v is not None else None for v in operand_values(self.node))
        return Applied(
            node=self.node,
            operands=operands,
            outputs=tuple(outputs),
            ties=tuple(self.ties),
            literals=tuple(self.literals),
            fixed=tuple(self.fixed),
            replacement=self.replacement,
            renormalised=tuple(self.renormalised),
            macs=tuple(self.macs),
            zero=tuple(zero),
            distinct=tuple(self.distinct),
        )


def operand_values(node: Node) -> list[Value | None]:
    """The tensor arguments of a node in schema order: single tensors (None where absent), then lists flattened."""
    out: list[Value | None] = []
    for name, argument in node.arguments.items():
        if isinstance(argument, Value):
            out.append(argument)
        elif name in node.tensors:
            out.append(None)
        elif isinstance(argument, (tuple, list)) and any(isinstance(a, Value) for a in argument):
            out.extend(a if isinstance(a, Value) else None for a in argument)
    return out
