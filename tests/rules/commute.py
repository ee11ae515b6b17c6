"""The property every rule must have: slicing by an index set commutes with the op.

Remove channels of an axis that the rule leaves free from the operands, write the sizes the rule bound to that axis,
run the op: the result must be what the op gives on the full operands, zeroed at the removed positions, sliced by the
masks of the outputs. Operands whose removed positions are not zero (as after a sigmoid) keep their values there.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from graphprune.axes import Atom, Axes, Pin
from graphprune.program import Node, Value
from graphprune.rules import Call, Rule
from graphprune.rules.call import operand_values
from graphprune.trace import signature


class CaughtWrong(AssertionError):
    """The rule and the op disagree."""


def node_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, dict[Value, torch.Tensor]]:
    """The node that a trace of `op(*args, **kwargs)` would hold, and the tensors of its operands."""
    name, names, tensors, defaults = signature(op)
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    held: dict[Value, torch.Tensor] = {}

    def value(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            v = Value(f"v{len(held)}", tuple(x.shape), x.dtype, "node")
            held[v] = x
            return v
        return [value(i) for i in x] if isinstance(x, (list, tuple)) else x

    arguments = {k: value(given[k]) for k in names if k in given}
    results = as_list(call_op(op, arguments, held))
    outputs = tuple(Value(f"out{i}", tuple(r.shape), r.dtype, "node") for i, r in enumerate(results))
    return Node("node", name, arguments, tensors, outputs, "here"), held


def call_op(op: Any, arguments: dict[str, Any], held: dict[Value, torch.Tensor]) -> Any:
    """Run the op on copies, so that in-place ops leave the operands alone."""

    def tensor(x: Any) -> Any:
        if isinstance(x, Value):
            return held[x].clone()
        return [tensor(i) for i in x] if isinstance(x, (list, tuple)) else x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return op(**{k: tensor(v) for k, v in arguments.items()})


def as_list(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def check(rule: Rule, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> int:
    """Hold `rule` against `op`; returns how many axes it leaves free when every operand is zero where removed.

    Raises:
        CaughtWrong: the rule is wrong.
    """
    node, held = node_of(op, args, kwargs or {})
    floats = [v for v in operand_values(node) if v is not None and v.dtype.is_floating_point]
    every = frozenset(floats)
    modes = {every, frozenset(), *(frozenset([v]) for v in floats), *(every - {v} for v in floats)}
    free = {mode: _check(rule, op, node, held, mode) for mode in sorted(modes, key=len)}
    return free[every]


def _check(rule: Rule, op: Any, node: Node, held: dict[Value, torch.Tensor], zeroed: frozenset[Value]) -> int:
    axes = Axes()
    dims = {v: tuple(Atom(size) for size in t.shape) for v, t in held.items()}
    flags = {v: tuple(v in zeroed for _ in t.shape) for v, t in held.items()}
    call = Call(node, axes, dims, flags)
    outputs = list(rule(call))
    for axis in call.renormalised:
        axes.pin(axis, Pin("statistics"))
    axes.settle()
    atoms = list(dict.fromkeys(a for d in [*dims.values(), *outputs] for axis in d for a in axes.leaves(axis)))
    free = [a for a in atoms if axes.pin_of(a) is None]
    rng = np.random.default_rng(0)
    for removed in [*([a] for a in free), free]:
        keep = _drawn(rng, removed)
        while any(_width(axes, d.axes[0], keep) == _width(axes, d.axes[1], keep) for d in call.distinct):
            keep = _drawn(rng, removed)
        if keep:
            _compare(op, node, held, zeroed, axes, dims, outputs, call, keep)
    return len(free)


def _drawn(rng: np.random.Generator, removed: list[Atom]) -> dict[Atom, np.ndarray]:
    """Random masks that keep one position or more, and not all."""
    keep = {}
    for atom in removed:
        mask = rng.random(atom.size) < 0.5
        mask[rng.integers(atom.size)] = True
        if mask.all():
            mask[rng.integers(atom.size)] = False
        keep[atom] = mask
    return keep


def _width(axes: Axes, axis, keep) -> int:
    return int(axes.mask(axis, keep).sum())


def _compare(op, node, held, zeroed, axes, dims, outputs, call, keep):
    masks = {v: [axes.mask(axis, keep) for axis in d] for v, d in dims.items()}
    full = {v: _zero(t, masks[v]) if v in zeroed else t for v, t in held.items()}
    small = {v: _slice(t, masks[v]) for v, t in full.items()}
    want = as_list(call_op(op, node.arguments, full))
    target, arguments = _rewritten(op, node, axes, call, keep)
    try:
        got = as_list(call_op(target, arguments, small))
    except (RuntimeError, IndexError, ValueError) as error:
        raise CaughtWrong(f"the op does not run on the sliced operands: {error}") from error
    flags = call.zero or [()] * len(outputs)
    for result, wanted, out_dims, zero in zip(got, want, outputs, flags, strict=True):
        out_masks = [axes.mask(axis, keep) for axis in out_dims]
        sliced = _slice(wanted, out_masks)
        if result.shape != sliced.shape:
            raise CaughtWrong(f"shape {list(result.shape)}, wanted {list(sliced.shape)}")
        if not torch.allclose(_wide(result), _wide(sliced), rtol=1e-9, atol=1e-9, equal_nan=True):
            raise CaughtWrong("the values differ")
        for d, (mask, claimed) in enumerate(zip(out_masks, zero, strict=False)):
            gone = wanted.index_select(d, torch.from_numpy(~mask).nonzero().flatten())
            if claimed and gone.any():
                raise CaughtWrong(f"dim {d} is not zero where removed")
            if wanted.is_floating_point() and not torch.isfinite(gone).all():
                raise CaughtWrong(f"dim {d} is not finite where removed")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _rewritten(op, node, axes, call, keep):
    """The op and arguments with the sizes that the rule bound."""
    memo: dict[Any, Any] = {}

    def width(axis):
        return int(axes.mask(axis, keep, memo).sum())

    arguments = dict(node.arguments)
    literals = call.literals
    if call.replacement and any(width(axis) != axis.size for axis in call.replacement.axes):
        name, overload = call.replacement.op.split(".")
        op = getattr(getattr(torch.ops.aten, name), overload)
        arguments, literals = dict(call.replacement.arguments), call.replacement.literals
    for literal in literals:
        name, *index = literal.path
        if index:
            items = list(arguments[name])
            items[index[0]] = width(literal.axis)
            arguments[name] = items
        else:
            arguments[name] = width(literal.axis)
    for fixed in call.fixed:
        if width(fixed.axis) != fixed.axis.size:
            arguments[fixed.argument] = fixed.value
    return op, arguments


def _slice(tensor, masks):
    for d, mask in enumerate(masks):
        tensor = tensor.index_select(d, torch.from_numpy(mask).nonzero().flatten())
    return tensor


def _zero(tensor, masks):
    def along(d, mask):
        return torch.from_numpy(mask).reshape([-1 if k == d else 1 for k in range(tensor.dim())])

    stays = functools.reduce(lambda a, b: a & b, (along(d, m) for d, m in enumerate(masks)), torch.tensor(True))
    return torch.where(stays, tensor, torch.zeros_like(tensor))
