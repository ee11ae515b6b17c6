"""Ops that reorder and repeat dims, or make tensors: views, permutations, expansion, filling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphprune.axes import Atom, Axis, Prod
from graphprune.errors import RuleError
from graphprune.program import SymbolicInt, Value
from graphprune.rules.call import Call, Dims, Replacement, operand_values
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule


def as_int(value: Any) -> int | None:
    """An int argument at the example inputs; None for anything else."""
    if isinstance(value, SymbolicInt):
        return value.hint
    return value if isinstance(value, int) else None


def _sizes(call: Call, name: str, out: Dims, offset: int = 0) -> None:
    """The ints of list argument `name` are the sizes of the dims of `out`, from `offset` on."""
    for k, given in enumerate(call[name] or ()):
        if as_int(given) not in (None, -1):
            call.literal(out[offset + k], name, k)


def straight(call: Call, pairs: Sequence[tuple[int, int]], operand: int = 0) -> None:
    """Dims of an operand that go straight to dims of the first output."""
    outputs = len(operand_values(call.node))
    for d, j in pairs:
        call.tie((operand, d), (outputs, j))


# -- views -------------------------------------------------------------------------------------------------------


def reshaped(call: Call, dims: Dims, shape: Sequence[int]) -> Dims:
    """Axes of a row-major reshape: cut both shapes where their running products agree, then one product each.

    Raises:
        RuleError: the sizes do not multiply to the same, since one of them depends on the data.
    """
    if math.prod(d.size for d in dims) != math.prod(shape):
        raise RuleError(f"a reshape whose sizes depend on the data has no rule, in {call.node}")
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
    straight(call, [(d, j) for j, d in enumerate(order)])
    call.zero = [tuple(zeros[d] for d in order)]
    return [tuple(dims[d] for d in order)]


@function("permute")
def permute(call: Call) -> Sequence[Dims]:
    """Dims in another order."""
    rank = len(call.dims(call.first))
    return _permuted(call, [d % rank for d in call["dims"]])


@function("transpose swapaxes swapdims t numpy_T mT mH matrix_H adjoint")
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
            straight(call, [(j - extra, j)])
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
    counts = [as_int(r) for r in call[name]]
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
            straight(call, [(d, j)])
    call.zero = [tuple(flags)]
    return [tuple(out)]


@function("repeat_interleave")
def repeat_interleave(call: Call) -> Sequence[Dims]:
    """Each position repeated in place: positions first, then copies."""
    times = as_int(call["repeats"])
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    if times is None or not call.has("self"):
        return _by_counts(call)
    copies = Atom(times)
    call.literal(copies, "repeats")
    if call["dim"] is None:
        call.zero = [(False,)]
        return [(Prod(*dims, copies),)]
    dim = call.dim()
    straight(call, [(d, d) for d in range(len(dims))])
    call.zero = [tuple(z and d != dim for d, z in enumerate(zeros))]
    return [tuple(Prod(a, copies) if d == dim else a for d, a in enumerate(dims))]


def _by_counts(call: Call) -> Sequence[Dims]:
    """Each position repeated as often as a tensor says: the dim stays whole."""
    counts = call["repeats"]
    dims, zeros = (call.dims(call["self"]), call.zeros(call["self"])) if call.has("self") else ((), ())
    dim = call["dim"] % len(dims) if dims and call["dim"] is not None else None
    for axis in (*call.dims(counts), *(a for d, a in enumerate(dims) if dim in (None, d))):
        call.pin(axis, "repeat_interleave counts along it")
    made = call.pinned(call.shape[dim or 0], "repeat_interleave counts along it")
    if dim is None:
        return [(made,)]
    straight(call, [(d, d) for d in range(len(dims)) if d != dim])
    call.zero = [tuple(z and d != dim for d, z in enumerate(zeros))]
    return [tuple(made if d == dim else a for d, a in enumerate(dims))]


@function("broadcast_tensors")
def broadcast_tensors(call: Call) -> Sequence[Dims]:
    """Every tensor expanded to the shape they have together."""
    values, rank = list(call["tensors"]), len(call.shape)
    common: list[Axis] = [Atom(1)] * rank
    for value in values:
        for k, axis in enumerate(reversed(call.dims(value)), start=1):
            common[-k] = call.unify(common[-k], axis)
    wide = [[v.shape[d] > 1 if -d <= len(v.shape) else False for d in range(-rank, 0)] for v in values]
    call.zero = [
        tuple(w and call.zeros(v)[d] for d, w in zip(range(-rank, 0), ws, strict=True))
        for v, ws in zip(values, wide, strict=True)
    ]
    return [tuple(common) for _ in values]


@function("diagonal diag_embed diag")
def diagonal(call: Call) -> Sequence[Dims]:
    """The diagonal of two dims, or a vector as a diagonal: of a square both dims are one index set."""
    dims, zeros = list(call.dims(call.first)), list(call.zeros(call.first))
    embeds = call.node.op == "diag_embed" or len(dims) == 1
    rank = len(dims) + embeds
    first, second = ((call[n] if call.has(n) else d) % rank for n, d in (("dim1", 0), ("dim2", 1)))
    shift = call["offset"] if call.has("offset") else call["diagonal"]
    if embeds:
        axis, zero = dims.pop(), zeros.pop()
        pair = [axis, axis]
        if shift:
            call.pin(axis, f"{call.node.op} shifts it")
            pair = [call.pinned(axis.size + abs(shift), f"{call.node.op} makes it") for _ in range(2)]
        for d, side in sorted(zip((first, second), pair, strict=True), key=lambda p: p[0]):
            dims.insert(d, side)
            zeros.insert(d, zero and not shift)
    else:
        a, b, zero = dims[first], dims[second], zeros[first] or zeros[second]
        made: Axis = a
        if shift or a.size != b.size:
            call.pin(a, f"{call.node.op} shifts it")
            call.pin(b, f"{call.node.op} shifts it")
            made, zero = call.pinned(call.shape[-1], f"{call.node.op} makes it"), False
        else:
            call.axes.unify(a, b, call.node)
        dims = [axis for d, axis in enumerate(dims) if d not in (first, second)] + [made]
        zeros = [z for d, z in enumerate(zeros) if d not in (first, second)] + [zero]
    call.zero = [tuple(zeros)]
    return [tuple(dims)]


# -- making ------------------------------------------------------------------------------------------------------


def _filled(zero: bool) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that fill a tensor of the size given with one value."""

    def apply(call: Call) -> Sequence[Dims]:
        out = tuple(Atom(size) for size in call.shape)
        _sizes(call, "size", out)
        call.zero = [tuple(zero for _ in out)]
        return [out]

    return apply


@function(
    "arange linspace logspace eye rand randn randint randperm "
    "bartlett_window hann_window hamming_window blackman_window kaiser_window scalar_tensor tril_indices triu_indices "
    "rand_like randn_like randint_like bernoulli multinomial normal exponential uniform poisson"
)
def positions(call: Call) -> Sequence[Dims]:
    """Tensors whose positions mean something; what is drawn for every position would be another with fewer of them."""
    for value in call.node.values():
        for axis in call.dims(value):
            call.pin(axis, f"{call.node.op} draws for every position of it")
    return [tuple(call.pinned(size, f"{call.node.op} makes it") for size in v.shape) for v in call.node.outputs]


@function("dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout")
def dropout(call: Call) -> Sequence[Dims]:
    """Nothing happens in eval mode; code that leaves it on draws for every position."""
    if call["train"] is not False and call["p"] != 0:
        return positions(call)
    return (_AS_IT_WAS if len(call.node.outputs) == 1 else _WITH_MASK)(call)


_AS_IT_WAS, _WITH_MASK = rule("*s -> *s", zero="a"), rule("*s -> *s, *s", zero="a")


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
    straight(call, [(d, d) for d in range(len(dims) - 2)])
    call.zero = [zeros]
    return [dims]


SHAPE = table(
    op("zeros new_zeros", _filled(zero=True)),
    op("ones full empty new_ones new_full new_empty empty_strided new_empty_strided", _filled(zero=False)),
    module=globals(),
)
