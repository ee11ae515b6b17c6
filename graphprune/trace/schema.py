"""What an ATen op's schema says: its name, its arguments and their defaults."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from graphprune.program import Kind, Node, Value


@functools.cache
def signature(target: Any) -> tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Base name, argument names, single-tensor arguments and defaults of an op."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target)), tuple(f"arg{i}" for i in range(64)), (), {}
    names = tuple(a.name for a in schema.arguments)
    tensors = tuple(a.name for a in schema.arguments if _takes_tensor(a))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    namespace, _, base = schema.name.partition("::")
    return (base if namespace in ("aten", "prim") else f"{namespace}.{base}"), names, tensors, defaults


@functools.cache
def writes(target: Any) -> bool:
    """Whether an op changes an argument; such a call counts even if it returns nothing."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _takes_tensor(argument: Any) -> bool:
    """Whether a schema argument is a tensor, or the number that stands in an operand's place (`add.Scalar`)."""
    kind = str(argument.type)
    return kind in ("Tensor", "Optional[Tensor]") or (kind == "number" and argument.name in ("self", "other"))


def call_node(
    target: Any,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    *,
    name: str,
    outputs: tuple[Value, ...],
    module: str,
    line: tuple[str, int] | None,
) -> Node:
    """The node of one op call, its arguments by their schema names with defaults filled in."""
    op, names, tensors, defaults = signature(target)
    given = defaults | dict(zip(names, args, strict=False)) | dict(kwargs)
    arguments = {k: given[k] for k in names if k in given} if tensors else given
    operands = tensors or tuple(k for k, v in arguments.items() if isinstance(v, Value))
    return Node(name, op, arguments, operands, outputs, module, line)


def value(name: str, val: torch.Tensor, kind: Kind, target: str = "") -> Value:
    """The record of a tensor."""
    return Value(name, tuple(hint(s) for s in val.shape), val.dtype, kind, target)


def hint(size: Any) -> int:
    """The size at the example inputs; a size that depends on data counts as one position, which couples nothing."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return 1 if known is None else int(known)
    return int(size)
