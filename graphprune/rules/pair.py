"""Ops that sum over products or differences of two tensors, along dims that their arguments name."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Atom, Axis, Prod, Sum
from graphprune.program import Value
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule


def _aligned(call: Call, left: Value, right: Value) -> list[tuple[Axis, bool, bool]]:
    """Per dim of the broadcast shape, its axis, and whether each operand is zero where it is removed."""
    rank = max(len(left.shape), len(right.shape))
    out = []
    for d in range(-rank, 0):
        a = call.dims(left)[d] if -d <= len(left.shape) else Atom(1)
        b = call.dims(right)[d] if -d <= len(right.shape) else Atom(1)
        zeros = [v.shape[d] > 1 and call.zeros(v)[d] if -d <= len(v.shape) else False for v in (left, right)]
        out.append((call.unify(a, b), zeros[0], zeros[1]))
    return out


def _need(call: Call, axis: Axis, zero: bool) -> None:
    if not zero:
        call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")


@function("cosine_similarity linalg_vecdot")
def product_along(call: Call) -> Sequence[Dims]:
    """The product of two tensors summed along a dim; the cosine divides it by their norms along it."""
    left, right = call.node.values()[:2]
    aligned = _aligned(call, left, right)
    dim = call["dim"] % len(aligned)
    axis, a, b = aligned.pop(dim)
    _need(call, axis, a or b if call.node.op == "linalg_vecdot" else a and b)
    call.zero = [tuple(a or b for _, a, b in aligned)]
    return [tuple(axis for axis, _, _ in aligned)]


@function("cross linalg_cross")
def cross(call: Call) -> Sequence[Dims]:
    """The cross product of vectors of three."""
    left, right = call.node.values()
    aligned, given = _aligned(call, left, right), call["dim"]
    dim = call.shape.index(3) if given is None else given % len(aligned)
    call.pin(aligned[dim][0], f"{call.node.op} tells its positions apart")
    call.zero = [tuple(a or b for _, a, b in aligned)]
    return [tuple(axis for axis, _, _ in aligned)]


@function("dist")
def dist(call: Call) -> Sequence[Dims]:
    """The norm of a difference."""
    left, right = call.node.values()[:2]
    for axis, a, b in _aligned(call, left, right):
        _need(call, axis, a and b)
    return [()]


@function("pairwise_distance")
def pairwise_distance(call: Call) -> Sequence[Dims]:
    """The norm of a difference along the last dim; a constant is added to every position of it."""
    left, right = call.node.values()[:2]
    *rest, (axis, _, _) = _aligned(call, left, right)
    call.pin(axis, "pairwise_distance adds a constant to each of its positions")
    kept = [axis for axis, _, _ in rest]
    return [(*kept, Atom(1)) if len(call.shape) > len(kept) else tuple(kept)]


@function("tensordot")
def tensordot(call: Call) -> Sequence[Dims]:
    """A product summed over pairs of dims."""
    left, right = call.node.values()[:2]
    dims, others = call.dims(left), call.dims(right)
    gone = [d % len(dims) for d in call["dims_self"]]
    going = [d % len(others) for d in call["dims_other"]]
    for d, e in zip(gone, going, strict=True):
        _need(call, call.unify(dims[d], others[e]), call.zeros(left)[d] or call.zeros(right)[e])
    out = [(a, z) for d, (a, z) in enumerate(zip(dims, call.zeros(left), strict=True)) if d not in gone]
    out += [(a, z) for e, (a, z) in enumerate(zip(others, call.zeros(right), strict=True)) if e not in going]
    call.multiply((a for a, _ in out), (dims[d] for d in gone))
    call.zero = [tuple(z for _, z in out)]
    return [tuple(a for a, _ in out)]


@function("chain_matmul linalg_multi_dot")
def chain(call: Call) -> Sequence[Dims]:
    """A product of matrices in a row, the first and the last of which may be vectors."""
    values = call.node.values()
    first, *rest = values
    out = list(zip(call.dims(first), call.zeros(first), strict=True))
    for value in rest:
        (left, zero), (right, other) = out.pop(), (call.dims(value)[0], call.zeros(value)[0])
        _need(call, call.unify(left, right), zero or other)
        out += zip(call.dims(value)[1:], call.zeros(value)[1:], strict=True)
    call.zero = [tuple(z for _, z in out)]
    return [tuple(a for a, _ in out)]


@function("kron")
def kron(call: Call) -> Sequence[Dims]:
    """Every position of one tensor with every position of the other."""
    left, right = call.node.values()[:2]
    rank, out, zero = len(call.shape), [], []
    for d in range(-rank, 0):
        here = [v for v in (left, right) if -d <= len(v.shape)]
        out.append(Prod(*(call.dims(v)[d] for v in here)))
        zero.append(len(here) == 2 and all(call.zeros(v)[d] for v in here))
    call.zero = [tuple(zero)]
    return [tuple(out)]


@function("block_diag")
def block_diag(call: Call) -> Sequence[Dims]:
    """Matrices along a diagonal, zeros beside them."""
    values = list(call["tensors"])
    pairs = [(*[Atom(1)] * (2 - len(v.shape)), *call.dims(v)) for v in values]
    flags = [(*[False] * (2 - len(v.shape)), *call.zeros(v)) for v in values]
    call.zero = [tuple(all(flag[d] for flag in flags) for d in range(2))]
    return [tuple(Sum(*(pair[d] for pair in pairs)) for d in range(2))]


_INNER = rule("*a k, *b k -> *a *b", macs="*a *b k", zero="a*b")


@function("inner")
def inner(call: Call) -> Sequence[Dims]:
    """A product summed over the last dims; a single number multiplies."""
    left, right = call.node.values()
    if not left.shape or not right.shape:
        return rule("*s, *s -> *s", zero="a*b")(call)
    return _INNER(call)


PAIR = table(
    op("cdist", "*b m k, *b n k -> *b m n", macs="*b m n k", summand="a + b"),
    module=globals(),
)
