"""A traced model as plain data: values, the nodes that compute them, and where each came from.

Nothing here is specific to a tracer: a front end fills these records, everything after it reads only them.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from graphprune.errors import counted

Kind = Literal["parameter", "buffer", "constant", "input", "node"]


VIEWS = frozenset(
    {
        *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "narrow", "permute", "select", "slice"),
        *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as"),
    }
)
"""Ops whose outputs share the memory of their first operand."""
MAYBE_VIEWS = VIEWS | {
    *("contiguous", "expand_as", "flatten", "lift_fresh", "movedim", "reshape", "tensor_split", "to", "unflatten"),
}
"""Ops whose outputs do, or may, as layout, type and device have it."""


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One tensor of the program.

    Attributes:
        name: unique in the program.
        shape: sizes at the example inputs.
        dtype: element type.
        kind: where it comes from; "constant" is a tensor the model's code made or kept outside its state.
        target: fully qualified name for parameters and buffers (and constants kept as attributes),
            the argument's name for inputs, empty for computed values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    target: str = ""

    def __repr__(self) -> str:
        return f"%{self.name}{list(self.shape)}"


@dataclass(frozen=True, eq=False, slots=True)
class SymbolicInt:
    """An int that depends on the batch size; `hint` is its value at the example inputs."""

    name: str
    hint: int


@dataclass(frozen=True, eq=False)
class Node:
    """One op call.

    Attributes:
        name: unique in the program.
        op: the ATen name without namespace and overload, such as "conv2d" or "relu_".
        arguments: every argument by its schema name, defaults filled in; tensors are `Value`s.
        tensors: names of the arguments that are operands, in schema order: single tensors, and numbers in their place.
        outputs: the values it computes.
        module: path of the innermost module whose forward made the call ("" is the model itself).
        line: file and line number of the innermost Python frame outside torch; None where none was recorded.
    """

    name: str
    op: str
    arguments: Mapping[str, Any]
    tensors: tuple[str, ...]
    outputs: tuple[Value, ...]
    module: str
    line: tuple[str, int] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the call writes to its first operand; `__and__` and its like do not."""
        return self.op.endswith("_") and not self.op.endswith("__")

    @property
    def source(self) -> str:
        """The user's line behind this call, as `file.py:12`; empty where none was recorded."""
        return f"{self.line[0].rsplit('/', 1)[-1]}:{self.line[1]}" if self.line else ""

    @property
    def code(self) -> str:
        """The text of that line."""
        return linecache.getline(*self.line).strip() if self.line else ""

    def __str__(self) -> str:
        """Op, module path and source line, for messages."""
        source = f" ({self.source})" if self.source else ""
        return f"{self.op} in {self.module or 'the model itself'}{source}"

    def values(self) -> tuple[Value, ...]:
        """Every tensor among the arguments, lists included, in schema order."""
        return self._values

    @functools.cached_property
    def _values(self) -> tuple[Value, ...]:
        found: list[Value] = []
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                found.append(argument)
            elif isinstance(argument, (tuple, list)):
                found += [a for a in argument if isinstance(a, Value)]
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Program:
    """A traced model.

    Attributes:
        model_class: name of the traced class.
        state: parameters, buffers and constants, each tensor once, in registration order.
        aliases: further fully qualified names of a state tensor, to the name it has in `state` (tied weights).
        inputs, outputs: the model's tensors in and out, flattened in order.
        carried: positions among the outputs of what belongs to an object that the model takes back as an argument, such
            as a cache; it shrinks along with the model.
        nodes: op calls in execution order.
        unused: parameters and buffers that no node reads.
        overlapping: names of different state tensors that share storage, such as a weight and its transpose.
        dynamic_batch: whether the batch size was left open.
        source: the exported program behind it, which can be run and rewritten; None if the calls were only recorded.
        unrecorded: why it was exported, where recording was tried first and given up.
    """

    model_class: str
    state: tuple[Value, ...]
    aliases: Mapping[str, str]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    carried: frozenset[int]
    nodes: tuple[Node, ...]
    unused: tuple[str, ...]
    overlapping: tuple[tuple[str, ...], ...]
    dynamic_batch: bool
    source: Any = field(repr=False, default=None)
    unrecorded: str = ""

    @property
    def parameters(self) -> tuple[Value, ...]:
        """The state tensors that are parameters."""
        return tuple(v for v in self.state if v.kind == "parameter")

    @functools.cached_property
    def readers(self) -> Mapping[Value, list[Node]]:
        """Per value that is read, the nodes that do, in order; one that reads it twice is listed twice."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.values():
                found.setdefault(value, []).append(node)
        return found

    def names(self) -> list[str]:
        """Every fully qualified name of the state, aliases included."""
        return [v.target for v in self.state if v.target] + list(self.aliases)

    def __str__(self) -> str:
        count = len(self.parameters)
        return f"Program of {self.model_class}: {counted(len(self.nodes), 'node')}, {counted(count, 'parameter')}"


_LIBRARY = ("/torch/nn/", "/torch/_", "/torch/utils/", "/torch/export/", "/torch/fx/", "/torch/functional.py")


@functools.cache
def is_library(path: str) -> bool:
    """Whether a source file belongs to torch, whose frames say little to the user."""
    return any(part in path for part in _LIBRARY)
