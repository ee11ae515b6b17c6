"""Ops that move, split, join and repeat dims: views, permutations, concatenation, slices, padding, expansion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphprune.axes import Atom, Axis, Prod, Sum
from graphprune.errors import RuleError
from graphprune.program import SymbolicInt, Value
from graphprune.rules.call import Call, Dims, Literal, Replacement, operand_values
from graphprune.rules.registry import function, op, table


def _int(value: Any) -> int | None:
    """An int argument at the example inputs; None for anything else."""
    if isinstance(value, SymbolicInt):
        return value.hint
    return value if isinstance(value, int) else None


def _sizes(call: Call, name: str, out: Dims, offset: int = 0) -> None:
    """The ints of list argument `name` are the sizes of the dims of `out`, from `offset` on."""
    for k, given in enumerate(call[name] or ()):
        if _int(given) not in (None, -1):
            call.literal(out[offset + k], name, k)


def _tied(call: Call, pairs: Sequence[tuple[int, int]], operand: int = 0) -> None:
    """Dims of an operand that go straight to dims of the first output."""
    outputs = len(operand_values(call.node))
    for d, j in pairs:
        call.tie((operand, d), (outputs, j))


# -- views -------------------------------------------------------------------------------------------------------


def reshaped(call: Call, dims: Dims, shape: Sequence[int]) -> Dims:
    """Axes of a row-major reshape: cut both shapes where their running products agree, then one product each."""
    wide = [d for d in dims if d.size != 1]
    out: list[Axis] = [Atom(1)] * len(shape)
    slots = [j for j, size in enumerate(shape) if size != 1]
    if math.prod(shape) == 0:
        return tuple(call.pinned(size, "an empty tensor") for size in shape)
    for ins, places in _runs(wide, slots, shape):
        if len(places) == 1:
            out[places[0]] = ins[0] if len(ins) == 1 else Prod(*ins)
            continue
        for j in places:
            out[j] = Atom(shape[j])
        call.axes.unify(ins[0] if len(ins) == 1 else Prod(*ins), Prod(*(out[j] for j in places)), call.node)
    return tuple(out)


def _runs(wide: list[Axis], slots: list[int], shape: Sequence[int]) -> Iterator[tuple[list[Axis], list[int]]]:
    i = j = 0
    while i < len(wide):
        ins, places = [wide[i]], [slots[j]]
        i, j = i + 1, j + 1
        a, b = ins[0].size, shape[places[0]]
        while a != b:
            if a < b:
                ins.append(wide[i])
                a, i = a * wide[i].size, i + 1
            else:
                places.append(slots[j])
                b, j = b * shape[slots[j]], j + 1
        yield ins, places


@function(
    "view reshape _unsafe_view flatten squeeze unsqueeze view_as reshape_as ravel atleast_1d atleast_2d atleast_3d"
)
def reshape(call: Call) -> Sequence[Dims]:
    """Any change of shape that keeps the row-major order.

    Raises:
        RuleError: this overload has no rule.
    """
    if call.has("dtype"):
        raise RuleError(f"a view under another dtype has no rule, in {call.node}")
    dims = call.dims(call.first)
    out = reshaped(call, dims, call.shape)
    for name in ("size", "shape"):
        if isinstance(call[name], (list, tuple)):
            _sizes(call, name, out)
    if isinstance(call["other"], Value):
        for axis, like in zip(out, call.dims(call["other"]), strict=True):
            call.unify(axis, like)
    if call.node.op.startswith("squeeze") and not call.has("dim"):
        gone = [d for d, axis in enumerate(dims) if axis.size == 1]
        call.replacement = Replacement("squeeze.dims", {"self": call["self"], "dim": gone}, (), dims)
    return [out]


@function("unflatten")
def unflatten(call: Call) -> Sequence[Dims]:
    """One dim becomes several."""
    out = reshaped(call, call.dims(call.first), call.shape)
    _sizes(call, "sizes", out, offset=call.dim())
    return [out]


def _permuted(call: Call, order: Sequence[int]) -> Sequence[Dims]:
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    _tied(call, [(d, j) for j, d in enumerate(order)])
    call.zero = [tuple(zeros[d] for d in order)]
    return [tuple(dims[d] for d in order)]


@function("permute")
def permute(call: Call) -> Sequence[Dims]:
    """Dims in another order."""
    rank = len(call.dims(call.first))
    return _permuted(call, [d % rank for d in call["dims"]])


@function("transpose swapaxes swapdims t numpy_T mT mH adjoint")
def transpose(call: Call) -> Sequence[Dims]:
    """Two dims swapped; by default the last two."""
    rank = len(call.dims(call.first))
    order = list(range(rank))
    first, second = (call["dim0"], call["dim1"]) if call.has("dim0") else (-1, -2)
    if call.has("axis0"):
        first, second = call["axis0"], call["axis1"]
    if rank > 1:
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return _permuted(call, order)


@function("movedim moveaxis")
def movedim(call: Call) -> Sequence[Dims]:
    """Some dims moved, the others in their order."""
    rank = len(call.dims(call.first))

    def positions(name: str) -> list[int]:
        given = call[name]
        return [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]

    source, destination = positions("source"), positions("destination")
    order = dict(zip(destination, source, strict=True))
    rest = iter(d for d in range(rank) if d not in source)
    return _permuted(call, [order[j] if j in order else next(rest) for j in range(rank)])


# -- repeating ---------------------------------------------------------------------------------------------------


@function("expand expand_as broadcast_to")
def expand(call: Call) -> Sequence[Dims]:
    """Single positions are repeated; the copies are a new axis."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    shape, extra = call.shape, len(call.shape) - len(dims)
    out: list[Axis] = []
    for j, size in enumerate(shape):
        kept = j >= extra and dims[j - extra].size == size
        out.append(dims[j - extra] if kept else Atom(size))
        if kept:
            _tied(call, [(j - extra, j)])
    if isinstance(call["other"], Value):
        for axis, like in zip(out, call.dims(call["other"]), strict=True):
            call.unify(axis, like)
    _sizes(call, "size", tuple(out))
    call.zero = [tuple(j >= extra and dims[j - extra] is a and zeros[j - extra] for j, a in enumerate(out))]
    return [tuple(out)]


@function("repeat tile")
def repeat(call: Call) -> Sequence[Dims]:
    """The whole of a dim repeated: copies first, then positions."""
    name = "repeats" if call.has("repeats") else "dims"
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    counts = [_int(r) for r in call[name]]
    lead = len(call.shape) - len(counts)
    out, flags = [], []
    for j in range(len(call.shape)):
        d = j - (len(call.shape) - len(dims))
        axis: Axis = dims[d] if d >= 0 else Atom(1)
        times = counts[j - lead] if j >= lead else 1
        flags.append(d >= 0 and zeros[d] and (times == 1))
        if times is not None and times > 1:
            copies = Atom(times)
            call.literal(copies, name, j - lead)
            axis = Prod(copies, axis)
        out.append(axis)
        if d >= 0:
            _tied(call, [(d, j)])
    call.zero = [tuple(flags)]
    return [tuple(out)]


@function("repeat_interleave")
def repeat_interleave(call: Call) -> Sequence[Dims]:
    """Each position repeated in place: positions first, then copies.

    Raises:
        RuleError: this overload has no rule.
    """
    times = _int(call["repeats"])
    if times is None or call["dim"] is None:
        raise RuleError(f"repeat_interleave with a tensor of counts, or over all dims, has no rule, in {call.node}")
    dims, zeros, dim = call.dims(call.first), call.zeros(call.first), call.dim()
    copies = Atom(times)
    call.literal(copies, "repeats")
    _tied(call, [(d, d) for d in range(len(dims))])
    call.zero = [tuple(z and d != dim for d, z in enumerate(zeros))]
    return [tuple(Prod(a, copies) if d == dim else a for d, a in enumerate(dims))]


# -- joining and splitting ---------------------------------------------------------------------------------------


@function("cat concat concatenate")
def cat(call: Call) -> Sequence[Dims]:
    """Tensors one after the other along a dim."""
    tensors = [v for v in call["tensors"] if v.shape != (0,)]
    rank = len(tensors[0].shape)
    dim = call["dim"] % rank
    dims = [call.dims(v) for v in tensors]
    out = list(dims[0])
    for d in range(rank):
        if d != dim:
            for axis in dict.fromkeys(call.axes.find(other[d]) for other in dims[1:]):
                out[d] = call.unify(out[d], axis)
    out[dim] = Sum(*(d[dim] for d in dims)) if len(dims) > 1 else dims[0][dim]
    zeros = [call.zeros(v) for v in tensors]
    call.zero = [tuple(all(z[d] for z in zeros) for d in range(rank))]
    return [tuple(out)]


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
    call.zero = [(*zeros[:dim], False, *zeros[dim:])]
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


@function("chunk split tensor_split unsafe_chunk unsafe_split split_with_sizes unsafe_split_with_sizes")
def split(call: Call) -> Sequence[Dims]:
    """A dim cut into runs. Equal runs need not stay equal: then the sizes are stated instead of their number."""
    dim = call.dim()
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
    size, length = dims[dim].size, call.shape[dim]
    _tied(call, [(d, d) for d in range(len(dims)) if d != dim])
    call.zero = [zeros]
    if length == size and call["step"] in (None, 1):
        _tied(call, [(dim, dim)])
        return [dims]
    start = _int(call["start"]) or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if call["step"] not in (None, 1):
        call.pin(dims[dim], f"{call.node.op} takes every {_int(call['step'])}th position of it")
        run: Axis = call.pinned(length, f"{call.node.op} makes it")
    else:
        before, run, after = Atom(start), Atom(length), Atom(size - start - length)
        call.axes.unify(dims[dim], Sum(before, run, after), call.node)
        if start:
            call.literal(before, "start")
        if call.has("length"):
            call.literal(run, "length")
        elif (end := _int(call["end"])) is not None and end < size:
            call.literal(Sum(before, run), "end")
        _tied(call, [(dim, dim)])
    return [tuple(run if d == dim else a for d, a in enumerate(dims))]


@function("pad constant_pad_nd")
def pad(call: Call) -> Sequence[Dims]:
    """Positions added at both ends of some dims, each end an index set of its own."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    constant = call["mode"] in (None, "constant")
    filled = constant and bool(call["value"])
    out, flags = list(dims), [z and not filled for z in zeros]
    amounts = [_int(p) or 0 for p in call["pad"]]
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
    _tied(call, [(d, d) for d in range(len(dims))])
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
                _tied(call, [(d, d)])
        call.zero = [call.zeros(call.first)]
        return [dims]

    return apply


@function("unfold")
def unfold(call: Call) -> Sequence[Dims]:
    """Sliding windows over one dim, which stays whole, as do the windows."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    dim = call.dim("dimension")
    call.pin(dims[dim], "unfold slides over it")
    _tied(call, [(d, d) for d in range(len(dims)) if d != dim])
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


# -- making ------------------------------------------------------------------------------------------------------


def _filled(zero: bool) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that fill a tensor of the size given with one value."""

    def apply(call: Call) -> Sequence[Dims]:
        out = tuple(Atom(size) for size in call.shape)
        _sizes(call, "size", out)
        call.zero = [tuple(zero for _ in out)]
        return [out]

    return apply


@function("arange linspace logspace eye rand randn randint randperm bartlett_window hann_window scalar_tensor")
def positions(call: Call) -> Sequence[Dims]:
    """Tensors whose positions mean something."""
    return [tuple(call.pinned(size, f"{call.node.op} makes it") for size in v.shape) for v in call.node.outputs]


@function("one_hot")
def one_hot(call: Call) -> Sequence[Dims]:
    """Numbers as unit vectors."""
    return [(*call.dims(call.first), call.pinned(call.shape[-1], "one_hot makes it"))]


@function("tril triu")
def triangle(call: Call) -> Sequence[Dims]:
    """A triangle of the last two dims, which stay whole."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    for axis in dims[-2:]:
        call.pin(axis, f"{call.node.op} compares positions of it")
    _tied(call, [(d, d) for d in range(len(dims) - 2)])
    call.zero = [zeros]
    return [dims]


SHAPE = table(
    op("flip", _pinned_along("dims", "{op} reverses it")),
    op("roll", _pinned_along("dims", "{op} rotates it")),
    op("zeros new_zeros", _filled(zero=True)),
    op("ones full empty new_ones new_full new_empty empty_strided new_empty_strided", _filled(zero=False)),
    module=globals(),
)
