"""Ops that pick positions by number or by mask: the picked dims stay whole, the others pass through."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.axes import Atom, Axis
from graphprune.errors import RuleError
from graphprune.program import Value
from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.registry import function, table
from graphprune.rules.shape import straight


def _picked(call: Call, dims: Dims, indices: Sequence[Value | None]) -> tuple[list[int], int, list[Axis]]:
    """Pin the indexed dims; return them, where the index dims go in the result, and the axes of the index.

    Raises:
        RuleError: a mask.
    """
    given = [(d, v) for d, v in enumerate(indices) if v is not None]
    if any(v.dtype in (torch.bool, torch.uint8) for _, v in given):
        raise RuleError(f"indexing with a mask, whose result depends on its values, has no rule, in {call.node}")
    rank = max(len(v.shape) for _, v in given)
    index: list[Axis] = [Atom(1)] * rank
    for d, value in given:
        call.pin(dims[d], f"{call.node.op} picks positions of it")
        for k, axis in enumerate(reversed(call.dims(value)), start=1):
            index[-k] = call.unify(index[-k], axis)
    where = [d for d, _ in given]
    adjacent = where == list(range(where[0], where[-1] + 1))
    return where, where[0] if adjacent else 0, index


@function("index")
def index(call: Call) -> Sequence[Dims]:
    """`x[i, :, j]`: indexed dims give way to those of the index."""
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    gone, at, made = _picked(call, dims, call["indices"])
    rest = [d for d in range(len(dims)) if d not in gone]
    before = [d for d in rest if d < at]
    after = [d for d in rest if d >= at]
    outputs = len(operand_values(call.node))
    for j, d in [*enumerate(before), *enumerate(after, start=len(before) + len(made))]:
        call.tie((0, d), (outputs, j))
    call.zero = [(*(zeros[d] for d in before), *(False for _ in made), *(zeros[d] for d in after))]
    return [(*(dims[d] for d in before), *made, *(dims[d] for d in after))]


@function("index_put")
def index_put(call: Call) -> Sequence[Dims]:
    """`x[i] = v`: as `index`, with the picked part tied to the values."""
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    gone, at, made = _picked(call, dims, call["indices"])
    rest = [d for d in range(len(dims)) if d not in gone]
    picked = [*(dims[d] for d in rest if d < at), *made, *(dims[d] for d in rest if d >= at)]
    for axis in made:
        call.pin(axis, "index_put lists positions along it")
    values = call.dims(call["values"])
    for a, b in zip(reversed(picked), reversed(values), strict=False):
        call.unify(a, b)
    call.zero = [tuple(False for _ in zeros)]
    return [dims]


@function("index_select")
def index_select(call: Call) -> Sequence[Dims]:
    """Positions of one dim by number."""
    dims, zeros, dim = call.dims(call.first), call.zeros(call.first), call.dim()
    call.pin(dims[dim], "index_select picks positions of it")
    picked = call.dims(call["index"])
    for d in range(len(dims)):
        if d != dim:
            call.tie((0, d), (2, d))
    call.zero = [tuple(z and d != dim for d, z in enumerate(zeros))]
    return [(*dims[:dim], picked[0] if picked else Atom(1), *dims[dim + 1 :])]


@function("gather take_along_dim")
def gather(call: Call) -> Sequence[Dims]:
    """Positions of one dim by number, chosen anew at every place of the other dims, which go side by side.

    Raises:
        RuleError: it takes them over all dims at once.
    """
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    index = call.dims(call["indices" if call.has("indices") else "index"])
    if call["dim"] is None:
        raise RuleError(f"positions over all dims at once have no rule, in {call.node}")
    dim, out = call.dim(), list(index)
    for d, axis in enumerate(dims):
        if d == dim:
            call.pin(axis, f"{call.node.op} picks positions of it")
        else:
            out[d] = _beside(call, axis, index[d])
            straight(call, [(d, d)])
    call.zero = [tuple(z and d != dim and out[d].size == dims[d].size for d, z in enumerate(zeros))]
    return [tuple(out)]


def _beside(call: Call, axis: Axis, other: Axis) -> Axis:
    """The dim of the result where a dim of the tensor and one of the index go side by side."""
    if axis.size == other.size:
        return call.unify(axis, other)
    if call.node.op == "take_along_dim":  # which broadcasts
        return other if axis.size == 1 else axis
    for a in (axis, other):
        call.pin(a, f"{call.node.op} cuts one of two dims short")
    return other


@function("scatter scatter_add scatter_reduce index_copy index_fill masked_scatter")
def scatter(call: Call) -> Sequence[Dims]:
    """Positions written by number: every dim of every operand stays whole."""
    for value in call.node.values():
        for axis in call.dims(value):
            call.pin(axis, f"{call.node.op} picks positions of it")
    return [tuple(call.pinned(size, f"{call.node.op} makes it") for size in call.shape)]


@function("index_add")
def index_add(call: Call) -> Sequence[Dims]:
    """Rows added at the positions listed: that dim stays whole, the others go side by side."""
    dims, source, dim = call.dims(call["self"]), call.dims(call["source"]), call.dim()
    zeros = zip(call.zeros(call["self"]), call.zeros(call["source"]), strict=True)
    for d, axis in enumerate(dims):
        if d == dim:
            for a in (axis, source[d], *call.dims(call["index"])):
                call.pin(a, f"{call.node.op} lists positions along it")
        else:
            call.unify(axis, source[d])
            straight(call, [(d, d)])
    call.zero = [tuple(a and b and d != dim for d, (a, b) in enumerate(zeros))]
    return [dims]


INDEX = table(module=globals())
