"""Ops that join dims and cut them: concatenation, splits, slices, padding, windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphprune.axes import Atom, Axis, Prod, Sum
from graphprune.rules.call import Call, Dims, Literal, Replacement
from graphprune.rules.registry import function, op, table
from graphprune.rules.shape import as_int, straight


@function("cat concat concatenate")
def cat(call: Call) -> Sequence[Dims]:
    """Tensors one after the other along a dim."""
    tensors = [v for v in call["tensors"] if v.shape != (0,)]
    dim = call["dim"] % len(tensors[0].shape)
    return _joined(call, [call.dims(v) for v in tensors], [call.zeros(v) for v in tensors], dim)


def _joined(call: Call, dims: Sequence[Dims], zeros: Sequence[tuple[bool, ...]], dim: int) -> Sequence[Dims]:
    rank, out = len(dims[0]), list(dims[0])
    for d in range(rank):
        if d != dim:
            for axis in dict.fromkeys(call.axes.find(other[d]) for other in dims[1:]):
                out[d] = call.unify(out[d], axis)
    out[dim] = Sum(*(d[dim] for d in dims)) if len(dims) > 1 else dims[0][dim]
    call.zero = [tuple(all(z[d] for z in zeros) for d in range(rank))]
    return [tuple(out)]


_STACKED = {
    "hstack": (1, 1, 0),
    "vstack": (2, 0, 0),
    "row_stack": (2, 0, 0),
    "dstack": (3, 2, 1),
    "column_stack": (2, 1, 1),
}
"""Per op: how many dims at least, along which it joins, and how many of the new ones come after those of a vector."""


@function(" ".join(_STACKED))
def stacked(call: Call) -> Sequence[Dims]:
    """A concatenation of tensors that are given more dims first."""
    least, dim, behind = _STACKED[call.node.op]
    dims: list[Dims] = []
    zeros: list[tuple[bool, ...]] = []
    for value in call["tensors"]:
        short = max(0, least - len(value.shape))
        after = min(short, behind)
        before = short - after
        dims.append((*[Atom(1)] * before, *call.dims(value), *[Atom(1)] * after))
        zeros.append((*[False] * before, *call.zeros(value), *[False] * after))
    return _joined(call, dims, zeros, min(dim, len(dims[0]) - 1))


@function("stack")
def stack(call: Call) -> Sequence[Dims]:
    """Tensors side by side along a new dim, which stays whole."""
    tensors = list(call["tensors"])
    rank, dim = len(tensors[0].shape), call["dim"] % (len(tensors[0].shape) + 1)
    dims = [call.dims(v) for v in tensors]
    for other in dims[1:]:
        for a, b in zip(dims[0], other, strict=True):
            call.unify(a, b)
    for d in range(rank):
        call.tie(*((i, d) for i in range(len(tensors))), (len(tensors), d + (d >= dim)))
    zeros = [all(call.zeros(v)[d] for v in tensors) for d in range(rank)]
    new = call.pinned(len(tensors), "stack lists its tensors")
    call.zero = [(*zeros[:dim], True, *zeros[dim:])]  # nothing is ever removed from the new dim
    return [(*dims[0][:dim], new, *dims[0][dim:])]


def _split(call: Call, dim: int, parts: Sequence[Axis]) -> Sequence[Dims]:
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    if len(parts) > 1:
        call.axes.unify(dims[dim], Sum(*parts), call.node)
    else:
        parts = [dims[dim]]
    for i in range(len(parts)):
        for d in range(len(dims)):
            call.tie((0, d), (1 + i, d))
    call.zero = [zeros for _ in parts]
    return [tuple(p if d == dim else a for d, a in enumerate(dims)) for p in parts]


_SPLIT_DIM = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


@function(
    "chunk split tensor_split unsafe_chunk unsafe_split split_with_sizes unsafe_split_with_sizes hsplit vsplit dsplit"
)
def split(call: Call) -> Sequence[Dims]:
    """A dim cut into runs. Equal runs need not stay equal: then the sizes are stated instead of their number."""
    dim = min(_SPLIT_DIM[call.node.op], len(call.shape) - 1) if call.node.op in _SPLIT_DIM else call.dim()
    parts: list[Axis] = [Atom(v.shape[dim]) for v in call.node.outputs]
    outputs = _split(call, dim, parts)
    parts = [out[dim] for out in outputs]
    name = next((n for n in ("split_size", "split_sizes") if call.has(n)), "")
    if isinstance(call[name], (list, tuple)):
        for k, part in enumerate(parts):
            call.literal(part, name, k)
        return outputs
    if name:
        call.literal(parts[0], name)
    elif call.has("indices"):
        for k in range(len(parts) - 1):
            call.literal(Sum(*parts[: k + 1]), "indices", k)
        return outputs
    call.replacement = Replacement(
        "split_with_sizes.default",
        {"self": call["self"], "split_sizes": [p.size for p in parts], "dim": dim},
        tuple(Literal(("split_sizes", k), part) for k, part in enumerate(parts)),
        tuple(parts),
    )
    return outputs


@function("glu")
def glu(call: Call) -> Sequence[Dims]:
    """One half of a dim gates the other, position by position."""
    dims, zeros, dim = call.dims(call.first), call.zeros(call.first), call.dim()
    half = Atom(call.shape[dim])
    call.axes.unify(dims[dim], Sum(half, half), call.node)
    straight(call, [(d, d) for d in range(len(dims))])
    call.zero = [zeros]
    return [tuple(half if d == dim else a for d, a in enumerate(dims))]


def _without(call: Call, dim: int) -> Sequence[Dims]:
    """The outputs of an op that takes single positions of `dim`."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    call.pin(dims[dim], f"{call.node.op} takes single positions of it")
    kept = [d for d in range(len(dims)) if d != dim]
    for j, d in enumerate(kept):
        call.tie((0, d), *((1 + i, j) for i in range(len(call.node.outputs))))
    call.zero = [tuple(zeros[d] for d in kept) for _ in call.node.outputs]
    return [tuple(dims[d] for d in kept) for _ in call.node.outputs]


@function("unbind select")
def select(call: Call) -> Sequence[Dims]:
    """Single positions of a dim, which stays whole; the other dims are free."""
    return _without(call, call.dim())


@function("slice narrow")
def slice_(call: Call) -> Sequence[Dims]:
    """A run of positions of a dim."""
    dims, zeros, dim = call.dims(call.first), call.zeros(call.first), call.dim()
    run: Axis
    size, length = dims[dim].size, call.shape[dim]
    straight(call, [(d, d) for d in range(len(dims)) if d != dim])
    call.zero = [zeros]
    if length == size and call["step"] in (None, 1):
        straight(call, [(dim, dim)])
        return [dims]
    start = as_int(call["start"]) or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if call["step"] not in (None, 1):
        run = _every(call, dims[dim], start)
    else:
        before, run, after = Atom(start), Atom(length), Atom(size - start - length)
        call.axes.unify(dims[dim], Sum(before, run, after), call.node)
        if start:
            call.literal(before, "start")
        if call.has("length"):
            call.literal(run, "length")
        elif (end := as_int(call["end"])) is not None and end < size:
            call.literal(Sum(before, run), "end")
        straight(call, [(dim, dim)])
    return [tuple(run if d == dim else a for d, a in enumerate(dims))]


def _every(call: Call, axis: Axis, start: int) -> Axis:
    """Every so manyth position of a dim: one of each run of them, where whole runs make up the dim."""
    step, length, end = as_int(call["step"]) or 1, call.shape[call.dim()], as_int(call["end"])
    if start < step and step * length == axis.size:
        runs = Atom(length)
        if end is not None and end < axis.size:
            call.pin(runs, f"{call.node.op} ends before the last of its positions")
        places = call.pinned(step, f"{call.node.op} takes every {step}th position of it")
        call.axes.unify(axis, Prod(runs, places), call.node)
        if (as_int(call["start"]) or 0) < 0:
            call.literal(call.pinned(start, f"{call.node.op} starts behind it"), "start")
        return runs
    call.pin(axis, f"{call.node.op} takes every {step}th position of it")
    return call.pinned(length, f"{call.node.op} makes it")


@function("pad constant_pad_nd")
def pad(call: Call) -> Sequence[Dims]:
    """Positions added at both ends of some dims, each end an index set of its own."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    constant = call["mode"] in (None, "constant")
    filled = constant and bool(call["value"])
    out, flags = list(dims), [z and not filled for z in zeros]
    amounts = [as_int(p) or 0 for p in call["pad"]]
    for k in range(len(amounts) // 2):
        low, high = amounts[2 * k : 2 * k + 2]
        d = len(dims) - 1 - k
        if low == high == 0:
            continue
        if low < 0 or high < 0 or not constant:
            call.pin(dims[d], f"{call.node.op} takes single positions of it")
            out[d], flags[d] = call.pinned(call.shape[d], f"{call.node.op} makes it"), False
            continue
        before, after = Atom(low), Atom(high)
        out[d] = Sum(before, dims[d], after)
        for axis, at in ((before, 2 * k), (after, 2 * k + 1)):
            if axis.size:
                call.literal(axis, "pad", at)
    straight(call, [(d, d) for d in range(len(dims))])
    call.zero = [tuple(flags)]
    return [tuple(out)]


def _pinned_along(names: str, reason: str) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that keep the shape and move the positions of the dims in argument `names`."""

    def apply(call: Call) -> Sequence[Dims]:
        dims, given = call.dims(call.first), call[names]
        moved = {d % len(dims) for d in (given if isinstance(given, (list, tuple)) else [given])} if dims else set()
        for d, axis in enumerate(dims):
            if d in moved or not moved:
                call.pin(axis, reason.format(op=call.node.op))
            else:
                straight(call, [(d, d)])
        call.zero = [call.zeros(call.first)]
        return [dims]

    return apply


@function("fliplr flipud")
def flip_one(call: Call) -> Sequence[Dims]:
    """One dim reversed."""
    dims, dim = call.dims(call.first), int(call.node.op == "fliplr")
    call.pin(dims[dim], f"{call.node.op} reverses it")
    straight(call, [(d, d) for d in range(len(dims)) if d != dim])
    call.zero = [call.zeros(call.first)]
    return [dims]


@function("unfold")
def unfold(call: Call) -> Sequence[Dims]:
    """Sliding windows over one dim, which stays whole, as do the windows."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    dim = call.dim("dimension")
    call.pin(dims[dim], "unfold slides over it")
    straight(call, [(d, d) for d in range(len(dims)) if d != dim])
    made = [call.pinned(call.shape[j], "unfold makes it") for j in (dim, len(dims))]
    call.zero = [(*(z and d != dim for d, z in enumerate(zeros)), False)]
    return [(*dims[:dim], made[0], *dims[dim + 1 :], made[1])]


@function("meshgrid")
def meshgrid(call: Call) -> Sequence[Dims]:
    """Vectors spread over a common grid."""
    axes = [call.dims(v)[0] if v.shape else Atom(1) for v in call["tensors"]]
    if call["indexing"] == "xy" and len(axes) > 1:
        axes[:2] = axes[1::-1]
    return [tuple(axes) for _ in call.node.outputs]


CUT = table(
    op("flip", _pinned_along("dims", "{op} reverses it")),
    op("roll", _pinned_along("dims", "{op} rotates it")),
    module=globals(),
)
