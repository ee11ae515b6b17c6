"""Ops that pick positions by number or by mask: the picked dims stay whole, the others pass through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphprune.axes import Atom, Axis
from graphprune.program import Value
from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.registry import function, op, table
from graphprune.rules.shape import straight


def _picked(call: Call, dims: Dims, indices: Sequence[Value | None]) -> tuple[list[int], int, list[Axis]]:
    """Pin the indexed dims; return them, where the index dims go in the result, and the axes of the index.

    A mask lies over as many dims as it has, and picks one list of positions from them.
    """
    index: list[Axis] = []
    where: list[int] = []
    at = 0
    for value in indices:
        if value is None:
            at += 1
            continue
        mask = value.dtype in _MASKS
        axes: Dims = (Atom(1),) if mask else call.dims(value)
        covered = range(at, at + (len(value.shape) if mask else 1))
        for d in covered:
            call.pin(dims[d], f"{call.node.op} picks positions of it")
        for axis, d in zip(call.dims(value) if mask else (), covered, strict=False):
            call.unify(axis, dims[d])
        index = [*[Atom(1)] * (len(axes) - len(index)), *index]
        for k, axis in enumerate(reversed(axes), start=1):
            index[-k] = call.unify(index[-k], axis)
        where.extend(covered)
        at = covered.stop
    adjacent = where == list(range(where[0], where[0] + len(where))) if where else True
    return where, where[0] if adjacent and where else 0, index


_MASKS = (torch.bool, torch.uint8)


@function("index")
def index(call: Call) -> Sequence[Dims]:
    """`x[i, :, j]`: indexed dims give way to those of the index."""
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    gone, at, made = _picked(call, dims, call["indices"])
    if any(v is not None and v.dtype in _MASKS for v in call["indices"]):
        made = [call.pinned(call.shape[at + k], "index lists what a mask picks") for k in range(len(made))]
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
    """`x[i] = v`: as `index`, with the picked part tied to the values; `x[mask] = 0` fills."""
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    given = [v for v in call["indices"] if v is not None]
    if len(given) == 1 and given[0].dtype in _MASKS and math.prod(call["values"].shape) == 1:
        for axis, over in zip(call.dims(given[0]), dims[list(call["indices"]).index(given[0]) :], strict=False):
            call.unify(axis, over)
        call.zero = [tuple(False for _ in zeros)]
        return [dims]
    gone, at, made = _picked(call, dims, call["indices"])
    rest = [d for d in range(len(dims)) if d not in gone]
    picked = [*(dims[d] for d in rest if d < at), *made, *(dims[d] for d in rest if d >= at)]
    for axis in made:
        call.pin(axis, "index_put lists positions along it")
    values = call.dims(call["values"])
    for a, b in zip(reversed(picked), reversed(values), strict=False):
        if a.size == b.size:
            call.unify(a, b)
        else:
            call.pin(b, "index_put lists positions along it")
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


@function("searchsorted")
def searchsorted(call: Call) -> Sequence[Dims]:
    """Where values would go in sorted rows; the rows stay whole."""
    sequence, values = call.dims(call["sorted_sequence"]), call["self"]
    call.pin(sequence[-1], "searchsorted searches it")
    if isinstance(call["sorter"], Value):
        for a, b in zip(sequence, call.dims(call["sorter"]), strict=True):
            call.unify(a, b)
    found = call.dims(values) if isinstance(values, Value) else tuple(Atom(1) for _ in call.shape)
    if len(sequence) == 1:
        return [found]
    return [(*(call.unify(a, b) for a, b in zip(sequence[:-1], found[:-1], strict=True)), found[-1])]


@function("gather take_along_dim")
def gather(call: Call) -> Sequence[Dims]:
    """Positions of one dim by number, chosen anew at every place of the other dims, which go side by side."""
    dims, zeros = call.dims(call["self"]), call.zeros(call["self"])
    index = call.dims(call["indices" if call.has("indices") else "index"])
    if call["dim"] is None:
        return _whole(call)
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


@function("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> Sequence[Dims]:
    """Positions of one dim written by number, for each element of the others; those are tied where they are whole."""
    into, index = call["self"], call["index"]
    others = [index, *(call[n] for n in ("src",) if isinstance(call[n], Value))]
    dims, dim = call.dims(into), call.dim(rank=max(1, len(into.shape)))
    for d, axis in enumerate(dims):
        reach = [call.dims(v)[d] for v in others if call.dims(v)]
        if d == dim or any(a.size != axis.size for a in reach):
            for a in (axis, *reach):
                call.pin(a, f"{call.node.op} picks positions of it")
            continue
        for a in reach:
            call.unify(axis, a)
    stays = [v for v in (into, *others[1:]) if v.shape]
    kept = len(others) > 1 or call["value"] == 0
    call.zero = [tuple(kept and d != dim and all(call.zeros(v)[d] for v in stays) for d in range(len(dims)))]
    return [dims]


@function("index_add index_copy index_fill index_reduce")
def index_add(call: Call) -> Sequence[Dims]:
    """Positions of one dim by number are changed; the others are tied to those of the source."""
    dims, dim = call.dims(call["self"]), call.dim(rank=max(1, len(call["self"].shape)))
    source = call["source"] if isinstance(call["source"], Value) else None
    for axis in call.dims(call["index"]):
        call.pin(axis, f"{call.node.op} lists positions along it")
    for d, axis in enumerate(dims):
        if d == dim:
            call.pin(axis, f"{call.node.op} picks positions of it")
            if source is not None:
                call.pin(call.dims(source)[d], f"{call.node.op} lists positions along it")
        elif source is not None:
            call.unify(axis, call.dims(source)[d])
    held = [call.zeros(v) for v in (call["self"], source) if v is not None]
    kept = source is not None or call["value"] == 0
    call.zero = [tuple(kept and d != dim and all(z[d] for z in held) for d in range(len(dims)))]
    return [dims]


@function("slice_scatter select_scatter")
def part_scatter(call: Call) -> Sequence[Dims]:
    """A run or one position of a dim is replaced; that dim stays whole."""
    dims, dim = call.dims(call["self"]), call.dim(rank=len(call["self"].shape))
    source, flags = list(call.dims(call["src"])), list(call.zeros(call["src"]))
    if call.node.op == "select_scatter":
        source.insert(dim, Atom(1))
        flags.insert(dim, False)
    for d, (a, b) in enumerate(zip(dims, source, strict=True)):
        if d == dim:
            call.pin(a, f"{call.node.op} replaces positions of it")
            call.pin(b, f"{call.node.op} replaces positions with it")
        else:
            call.unify(a, b)
    zeros = call.zeros(call["self"])
    call.zero = [tuple(d != dim and zeros[d] and flags[d] for d in range(len(dims)))]
    return [dims]


def _whole(call: Call) -> Sequence[Dims]:
    for value in call.node.values():
        for axis in call.dims(value):
            call.pin(axis, f"{call.node.op} picks positions of it")
    return [tuple(call.pinned(size, f"{call.node.op} makes it") for size in call.shape)]


INDEX = table(
    op("masked_scatter", _whole),
    op("isin", "*s, *t! -> *s", checked=False),
    op("bucketize", "*s, n! -> *s", checked=False),
    module=globals(),
)
